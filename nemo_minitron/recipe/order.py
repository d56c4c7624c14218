"""Which stages of a recipe read what which others write."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from nemo_minitron.recipe.stage import Stage


def readers(stages: Sequence[Stage]) -> dict[str, tuple[str, ...]]:
    """Name of each stage → names of the earlier ones whose outputs it reads, in their order.

    It reads its declared inputs, and every file, folder or prefix of files that its configuration names and that it
    does not write itself. A stage after the first that declares no inputs, and names nothing that another writes,
    cannot be told apart from one that needs all of the above: it is taken to read the one before it.
    """
    found: dict[str, tuple[str, ...]] = {}
    for number, stage in enumerate(stages):
        own = {os.path.abspath(path) for path in (*stage.outputs, *([str(stage.work)] if stage.work else []))}
        named = {os.path.abspath(text) for text in _texts(OmegaConf.to_container(stage.config)) if text}
        inputs = {os.path.abspath(path) for path in stage.inputs}
        earlier = stages[:number]
        before = [
            other.name
            for other in earlier
            if any(_touches(path, os.path.abspath(out)) for path in inputs | named - own for out in other.outputs)
        ]
        if not before and not stage.inputs and earlier:
            before = [earlier[-1].name]
        found[stage.name] = tuple(before)
    return found


def _touches(read: str, written: str) -> bool:
    """Whether ``read`` (a path, a pattern, a folder, a prefix of files) takes in ``written``, or lies in it."""
    if glob.has_magic(read):
        return fnmatch.fnmatch(written, read)
    return (
        read == written
        or written.startswith((read.rstrip(os.sep) + os.sep, f"{read}."))
        or read.startswith(written + os.sep)
    )


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _texts(item)
    elif isinstance(node, str):
        yield node
