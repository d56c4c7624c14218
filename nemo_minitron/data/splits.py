"""Which tokens train and which validate: whether each split has a sample at all, before Megatron looks for one.

Megatron's dataset builder loops for ever over a split without tokens, ends on an unweighted blend after one pass, and
asks for a test split that nothing here reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nemo_minitron.data.blocks import split_lists
from nemo_minitron.data.index import read_index
from nemo_minitron.data.tokens import token_files
from nemo_minitron.errors import MinitronError

KEY = "model.data.data_prefix"


class Splits(NamedTuple):
    """Data of a run as NeMo's model is to be given them."""

    data_prefix: Any
    """A list, or lists by split with ``test`` null."""
    splits_string: str | None


def check_splits(
    data_prefix: Any,
    splits_string: str | None,
    seq_length: int,
    global_batch_size: int,
    limit_val_batches: int | float,
) -> Splits:
    """Check that training and validation have samples and batches enough, and complete what NeMo leaves open.

    A blend of several prefixes without weights gets those of their sizes, which is what it stands for: without them
    Megatron's data end after one pass. A share of validation batches (``limit_val_batches`` a float) is of one pass
    over the validation data, which Megatron has for unweighted data alone.

    Raises:
        MinitronError: naming ``model.data.data_prefix``, ``model.data.splits_string`` or ``trainer.limit_val_batches``.
    """
    lists = split_lists(data_prefix, KEY)
    share = limit_val_batches if isinstance(limit_val_batches, float) else None
    if isinstance(lists, dict):
        train = _samples(lists["train"], (0.0, 1.0), seq_length, f"{KEY}.train")
        val = _samples(lists["validation"], (0.0, 1.0), seq_length, f"{KEY}.validation")
        _check_share(share, sum(val), global_batch_size)
        validation = _unweighted(lists["validation"]) if share else _weighted(lists["validation"], val)
        by_split = {"train": _weighted(lists["train"], train), "validation": validation, "test": None}
        return Splits(by_split, splits_string)
    parts = _parse(splits_string)
    total = sum(parts)
    train_end, val_end = parts[0] / total, (parts[0] + parts[1]) / total
    said = f"model.data.splits_string={splits_string}"
    train = _samples(lists, (0.0, train_end), seq_length, f"{said} (train)")
    val = _samples(lists, (train_end, val_end), seq_length, f"{said} (validation)")
    _check_share(share, sum(val), global_batch_size)
    if parts[2]:
        sizes = [len(sequence_lengths(prefix)) for prefix in _prefixes(lists)]
        empty = [round(val_end * size) >= size for size in sizes]
        if all(empty):  # the same documents for the others, and no test split to loop over
            splits_string = f"{parts[0]},{parts[1] + parts[2]},0"
        elif any(empty):
            prefix = _prefixes(lists)[empty.index(True)]
            raise MinitronError(
                f"{said} (test): '{prefix}' has too few documents for it; nothing is tested here: write "
                f"'{parts[0]:g},{parts[1] + parts[2]:g},0'"
            )
    whole = [sum(pair) for pair in zip(train, val, strict=True)]
    return Splits(_unweighted(lists) if share else _weighted(lists, whole), splits_string)


def sequence_lengths(prefix: str) -> np.ndarray:
    """Tokens of every sequence of a prefix, ``int32``; a sequence is a document in files of ``minitron preprocess``.

    Raises:
        MinitronError: missing, damaged or truncated files.
    """
    return read_index(*token_files(prefix)).lengths


def _prefixes(blend: list) -> list[str]:
    return [item for item in blend if isinstance(item, str)]


def _samples(blend: list, part: tuple[float, float], seq_length: int, said: str) -> list[int]:
    """Samples that one pass over this part of every prefix's documents gives; documents as Megatron rounds them."""
    found = []
    for prefix in _prefixes(blend):
        lengths = sequence_lengths(prefix)
        begin, end = (round(bound * float(len(lengths))) for bound in part)
        tokens = int(lengths[begin:end].sum(dtype=np.int64))
        if tokens < seq_length + 1:
            raise MinitronError(
                f"{said}: '{prefix}' leaves {end - begin} of its {len(lengths)} documents with {tokens} tokens, fewer "
                f"than a sample of model.data.seq_length={seq_length} + 1; give files of their own, "
                f"{KEY}={{train: […], validation: […]}}, larger shares or shorter samples"
            )
        found.append((tokens - 1) // seq_length)
    return found


def _check_share(share: float | None, samples: int, global_batch_size: int) -> None:
    if share and int(share * (samples // global_batch_size)) < 1:
        raise MinitronError(
            f"trainer.limit_val_batches={share}: of {samples} validation samples, {samples // global_batch_size} "
            f"batches of model.global_batch_size={global_batch_size}, that is none; give a number of batches, for "
            "which data are repeated, or 0 for no validation"
        )


def _weighted(blend: list, samples: list[int]) -> list:
    """A blend of several prefixes with weights: those given, or the numbers of their samples."""
    if len(blend) == 1 or not isinstance(blend[0], str):
        return blend
    return [item for pair in zip(map(float, samples), blend, strict=True) for item in pair]


def _unweighted(blend: list) -> list:
    prefixes = _prefixes(blend)
    if len(prefixes) > 1 and len(prefixes) < len(blend):
        raise MinitronError(
            f"{KEY}: trainer.limit_val_batches as a share is of one pass over the validation data, which weights do "
            "not have; leave the weights out or give a number of batches"
        )
    return prefixes


def _parse(splits_string: str | None) -> tuple[float, float, float]:
    """Three shares, at least those of train and validation above 0."""
    items = str(splits_string).split(",")
    try:
        parts = [float(item) for item in items]
        good = len(parts) == 3 and all(0 <= part < float("inf") for part in parts) and parts[0] > 0 and parts[1] > 0
    except ValueError:
        good = False
    if not good:
        raise MinitronError(
            "model.data.splits_string: expected three shares TRAIN,VALIDATION,TEST as in 98,1,1, the first two above 0 "
            f"(test may be 0), found {splits_string!r}; or give files of their own, {KEY}={{train: […], "
            "validation: […]}"
        )
    return parts[0], parts[1], parts[2]
