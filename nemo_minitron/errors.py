"""The one kind of error that a user is meant to read, and near-miss suggestions for names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class MinitronError(Exception):
    """Bad input, said in one message that names the key or file, what was expected and what was found.

    The command line prints the message alone and exits with status 2; any other exception is a defect of ours and
    keeps its traceback.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``known`` to ``name``, or ``""`` where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def check_choice(what: str, value: object, known: Iterable[str]) -> None:
    """Refuse a ``value`` that is none of ``known``; ``what`` names its key.

    Raises:
        MinitronError: with all that is known, and the nearest.
    """
    names = list(known)
    if value not in names:
        raise MinitronError(
            f"{what}: expected one of {', '.join(names)}, found {value!r:.80}.{did_you_mean(str(value), names)}"
        )


def required(cfg: Any, key: str) -> str:
    """The value of a dotted key that must be given, as text; ``cfg`` has mappings or attributes.

    Raises:
        MinitronError: naming the key.
    """
    node: Any = cfg
    for name in key.split("."):
        node = node.get(name) if isinstance(node, Mapping) else getattr(node, name, None)
    if node in (None, "", "???"):
        raise MinitronError(f"{key} is required: expected a path, found nothing")
    return str(node)
