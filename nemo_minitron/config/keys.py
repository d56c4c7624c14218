"""How a schema says its keys: typed fields of dataclasses with a default and a line of help."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from typing import Any

from nemo_minitron.config.nemo_keys import Tree

REQUIRED = "???"

SEED = 1234
"""Seed of everything random, where a config names no other."""


Choices = tuple[str, ...] | Callable[[], tuple[str, ...]]


def key(default: Any, help: str, choices: Choices | None = None, prose: bool = False) -> Any:
    """A documented key; a mutable default is copied for every instance.

    Args:
        choices: the values that it may have; a function where extensions can add some.
        prose: text for people, taken as it is typed: Hydra's grammar would refuse its first comma.
    """
    metadata = {"help": help, "choices": choices, "prose": prose}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def choices_of(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Values that a key may have; none where anything may stand."""
    choices = metadata.get("choices") or ()
    return choices() if callable(choices) else choices


def section(cls: type, help: str) -> Any:
    """A nested section of our own."""
    return field(default_factory=cls, metadata={"help": help})


def known(tree: Tree | None, help: str) -> Any:
    """A section whose names are another tool's: ``tree`` lists them, None takes anything."""
    return field(default_factory=dict, metadata={"help": help, "tree": tree, "foreign": True})


def keys(cls: type, prefix: str = "") -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Every documented key of a command below ``prefix``: (full name, type, default, metadata)."""
    for item in dataclasses.fields(cls):
        name = prefix + item.name
        make = item.default_factory
        default = item.default if make is dataclasses.MISSING else make()
        if dataclasses.is_dataclass(default):
            yield from keys(type(default), name + ".")
        else:
            yield name, str(item.type), default, dict(item.metadata)


def tree_of(cls: type) -> Tree:
    """Known names of a command as nested mappings; None where anything may stand below."""
    tree: Tree = {}
    for item in dataclasses.fields(cls):
        if item.metadata.get("foreign"):
            tree[item.name] = item.metadata["tree"]
        elif item.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(item.default_factory):
            tree[item.name] = tree_of(item.default_factory)  # type: ignore[arg-type]
        else:
            tree[item.name] = None
    return tree
