"""Lists of a ``config.json`` that have one entry for each layer: layers that stay keep their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.checkpoint import known
from nemo_minitron.errors import MinitronError

_OTHER_LISTS = known.HF.neutral | {"architectures"}
"""Lists whose length has nothing to do with layers: token ids, names of labels."""


def per_layer(config: Mapping[str, Any], depth: int) -> dict[str, list[Any]]:
    """The lists of a config of ``depth`` layers that have one entry for each."""
    return {
        key: value
        for key, value in config.items()
        if isinstance(value, list) and len(value) == depth and key not in _OTHER_LISTS
    }


def differ(config: Mapping[str, Any], depth: int) -> bool:
    """Whether some list says of one layer what it does not say of another."""
    return any(entry != entries[0] for entries in per_layer(config, depth).values() for entry in entries)


def cut_lists(config: dict[str, Any], before: int, after: int, kept: Sequence[int] | None) -> None:
    """Cut every list per layer of a config of ``before`` layers to those that stay, in their order.

    Args:
        after: layers of the model that the config is going to describe.
        kept: index of each of them among the ``before`` layers, ascending; None where nobody has noted it.

    Raises:
        MinitronError: ``kept`` is None, layers were dropped, and a list's entries differ; or ``kept`` names others than
            ``after`` of the layers.
    """
    if kept is not None and not _are_indices(kept, before, after):
        raise MinitronError(f"minitron.layers must be {after} ascending indices below {before}, found {kept!r:.80}")
    if kept is None and before == after:
        return
    for key, entries in per_layer(config, before).items():
        if kept is not None:
            config[key] = [entries[index] for index in kept]
        elif all(entry == entries[0] for entry in entries):
            config[key] = entries[:1] * after
        else:
            raise MinitronError(
                f"config.json: {key} has another entry for each of {before} layers, of which {after} are left; which "
                "ones is not known of this checkpoint, so they cannot be cut with it"
            )


def _are_indices(kept: Any, before: int, after: int) -> bool:
    """Whether a value from a file is ``after`` ascending indices of ``before`` layers."""
    if not isinstance(kept, list) or len(kept) != after or any(type(index) is not int for index in kept):
        return False
    return kept == sorted({index for index in kept if 0 <= index < before})
