"""The reading side of ``.bin/.idx``: token blocks for calibration and evaluation, and which data a run is to take."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nemo_minitron.config.keys import SEED
from nemo_minitron.config.sections import Calibration
from nemo_minitron.data.masks import open_mask, prove_mask, with_masks
from nemo_minitron.data.sources import Source
from nemo_minitron.data.tokenizer import TokenizerSpec
from nemo_minitron.data.tokens import TokenStream, check_range, data_fingerprint, open_tokens, token_files
from nemo_minitron.errors import MinitronError, did_you_mean
from nemo_minitron.jobs.processes import notice

SPLITS = ("train", "validation", "test")


class Drawn(NamedTuple):
    """Samples to calibrate on.

    Attributes:
        tokens: ``[n, s]`` int64, unpadded, on the CPU.
        counted: ``[n, s]`` bool: True at position t where token t + 1, which is predicted there, counts in a loss. Of
            the last position that is the token behind the sample. Each row has a True before its last column, where
            that is not the only one. None where all are True.
        fingerprint: of the data that they come from, and of what counts in it.
    """

    tokens: torch.Tensor
    counted: torch.Tensor | None
    fingerprint: str


def token_blocks(
    prefix: str | Path,
    seq_length: int,
    *,
    num_samples: int | None = None,
    seed: int = SEED,
    shuffle: bool = True,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Non-overlapping, unpadded blocks of consecutive tokens: inputs and their next-token labels.

    The documents of ``prefix`` are one stream, as Megatron's GPTDataset has it: concatenated in file order, each with
    the EOD that preprocessing appended. Block i is tokens ``[i * (s+1), (i+1) * (s+1))``; a remainder is dropped.

    Args:
        seq_length: s; blocks have one token more, so that every position has a label.
        num_samples: how many blocks; all when None.
        seed: of the shuffle: the same seed, data and length give the same blocks in the same order.
        shuffle: draw from the whole stream; False takes the first blocks.
        vocab_size: refuse ids that a model of this true vocabulary does not have.

    Returns:
        int64 ``[num_samples, seq_length + 1]``.

    Raises:
        MinitronError: too few blocks, ids out of range (naming the document), missing or truncated files.
    """
    stream, available, wanted = _open(prefix, seq_length, num_samples)
    width = seq_length + 1
    starts = _order(available, wanted, seed, shuffle) * width
    return _checked_rows(stream, prefix, starts, width, vocab_size)


def counted_blocks(
    prefix: str | Path,
    seq_length: int,
    *,
    num_samples: int | None = None,
    seed: int = SEED,
    shuffle: bool = True,
    vocab_size: int | None = None,
) -> Drawn:
    """Inputs of :func:`token_blocks`, and which of their positions predict a token that counts.

    Of a prefix with a mask, blocks in which no label counts are passed over, and those that follow in the same order
    are taken in their place: the data are cut without regard to documents, and a long prompt may fill a whole block.

    Args: as for :func:`token_blocks`.

    Raises:
        MinitronError: as :func:`token_blocks` and :func:`nemo_minitron.data.masks.prove_mask`; too few blocks with a
            label that counts.
    """
    content, of_mask = data_fingerprint(prefix), prove_mask(prefix)
    fingerprint = with_masks({str(prefix): content}, {str(prefix): of_mask})[str(prefix)]
    mask = open_mask(prefix)
    if mask is None:
        blocks = token_blocks(
            prefix, seq_length, num_samples=num_samples, seed=seed, shuffle=shuffle, vocab_size=vocab_size
        )
        return Drawn(blocks[:, :-1], None, fingerprint)  # the last token is only a label
    stream, available, wanted = _open(prefix, seq_length, num_samples)
    width, labels = seq_length + 1, slice(1, max(2, seq_length))
    starts: list[int] = []
    for start in (_order(available, available, seed, shuffle) * width).tolist():
        if len(starts) == wanted:
            break
        if mask.tokens[start : start + width][labels].any():
            starts.append(start)
    if len(starts) < (1 if num_samples is None else wanted):
        raise MinitronError(
            f"{prefix}: asked for {wanted} blocks of {width} tokens (seq_length {seq_length} + 1) of which a label "
            f"counts, available {len(starts)} (of {available} blocks)"
        )
    places = np.array(starts, dtype=np.int64)
    blocks = _checked_rows(stream, prefix, places, width, vocab_size)
    counted = torch.from_numpy(_rows(mask.tokens, places, width)[:, 1:]).bool()
    return Drawn(blocks[:, :-1], None if counted.all() else counted, fingerprint)


def _open(prefix: str | Path, seq_length: int, num_samples: int | None) -> tuple[TokenStream, int, int]:
    """The tokens of a prefix, how many blocks they have, and how many are wanted."""
    for name, value in (("seq_length", seq_length), ("num_samples", num_samples)):
        if value is not None and value < 1:
            raise MinitronError(f"{name} must be at least 1, found {value}")
    stream = open_tokens(prefix)
    available = len(stream.tokens) // (seq_length + 1)
    wanted = available if num_samples is None else num_samples
    if wanted > available or not available:
        raise MinitronError(
            f"{prefix}: asked for {max(wanted, 1)} blocks of {seq_length + 1} tokens (seq_length {seq_length} + 1), "
            f"available {available} ({len(stream.tokens)} tokens)"
        )
    return stream, available, wanted


def _checked_rows(
    stream: TokenStream, prefix: str | Path, starts: np.ndarray, width: int, vocab_size: int | None
) -> torch.Tensor:
    """int64 ``[n, width]`` tokens, a row from each of ``starts``, all of the vocabulary."""
    blocks = _rows(stream.tokens, starts, width)
    check_range(blocks, starts, stream, prefix, vocab_size)
    return torch.from_numpy(blocks)


def mask_blocks(
    prefix: str | Path, seq_length: int, *, num_samples: int | None = None, seed: int = SEED, shuffle: bool = True
) -> torch.Tensor | None:
    """Which tokens of the same arguments' :func:`token_blocks` count in a loss.

    Returns:
        int64 ``[num_samples, seq_length + 1]`` of 1 and 0; None where the prefix has no mask, and all do.

    Raises:
        MinitronError: as :func:`nemo_minitron.data.masks.prove_mask`; none of these tokens counts as a label.
    """
    if prove_mask(prefix) is None or (mask := open_mask(prefix)) is None:
        return None
    tokens = 1 + seq_length
    available = len(mask.tokens) // tokens
    wanted = available if num_samples is None else num_samples
    blocks = _rows(mask.tokens, _order(available, wanted, seed, shuffle) * tokens, tokens)
    if not blocks[:, 1:].any():
        raise MinitronError(f"{prefix}: none of the tokens of {wanted} blocks counts in a loss; take more blocks")
    return torch.from_numpy(blocks)


def _order(available: int, wanted: int, seed: int, shuffle: bool) -> np.ndarray:
    """int64 numbers of ``wanted`` blocks out of ``available``."""
    if not shuffle:
        return np.arange(wanted, dtype=np.int64)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted]
    return order.numpy().astype(np.int64)


def _rows(tokens: np.ndarray, starts: np.ndarray, width: int) -> np.ndarray:
    """int64 ``[n, width]`` of a stream, a row from each of ``starts``."""
    blocks = np.empty((len(starts), width), dtype=np.int64)
    for row, start in enumerate(starts):
        blocks[row] = tokens[start : start + width]
    return blocks


def document_heads(prefix: str | Path, length: int, every: int = 1, *, vocab_size: int | None = None) -> torch.Tensor:
    """First ``length`` tokens of documents 0, ``every``, 2 * ``every``, …, as int64 ``[n, length]``.

    The Brown protocol is ``length=512, every=25`` over the 500 files in sorted order: 20 rows.

    Raises:
        MinitronError: a chosen document shorter than ``length`` (naming it), ids out of range, unreadable files.
    """
    if length < 1 or every < 1:
        raise MinitronError(f"length and every must be at least 1, found {length} and {every}")
    stream = open_tokens(prefix)
    begins = np.concatenate(([0], stream.ends[:-1]))[::every]
    sizes = stream.ends[::every] - begins
    if (sizes < length).any():
        short = int(np.argmax(sizes < length))
        raise MinitronError(
            f"{prefix}: document {short * every} has {sizes[short]} tokens, fewer than the {length} asked for"
        )
    heads = np.stack([stream.tokens[begin : begin + length] for begin in begins]).astype(np.int64)
    check_range(heads, begins, stream, prefix, vocab_size)
    return torch.from_numpy(heads)


def split_lists(data_prefix: Any, key: str = "model.data.data_prefix") -> list | dict[str, list]:
    """Check NeMo's forms of ``model.data.data_prefix`` and that their files exist.

    The forms: ``[p]``; ``[w, p]`` and ``[w1, p1, w2, p2, …]`` with weights; ``[p1, p2, …]`` without; and
    ``{train: …, validation: …, test: …}`` of such lists (train and validation required). NeMo itself splits a plain
    string into characters and fails on an odd list with weights in it; here both are errors that show the right form.

    Returns:
        The same form in plain containers, prefixes as ``str`` and weights as ``float``.
    """
    if not isinstance(data_prefix, Mapping):
        return _blend(data_prefix, key)
    for name in data_prefix:
        if name not in SPLITS:
            raise MinitronError(f"{key}: unknown split '{name}', expected {list(SPLITS)}.{did_you_mean(name, SPLITS)}")
    for name in SPLITS[:2]:
        if data_prefix.get(name) is None:
            raise MinitronError(f"{key}: split '{name}' is missing, found {sorted(data_prefix)}")
    given = {name: data_prefix.get(name) for name in SPLITS}
    return {name: _blend(value, f"{key}.{name}") for name, value in given.items() if value is not None}


def _blend(value: Any, key: str) -> list:
    if isinstance(value, str | Path):
        raise MinitronError(f"{key} must be a list: write [{value}] instead of {value}")
    if not isinstance(value, Sequence):
        raise MinitronError(f"{key} must be [prefix], [weight, prefix, …] or a mapping of splits, found {value!r}")
    items = list(value)
    if not items:
        raise MinitronError(f"{key} must name at least one prefix, found an empty list")
    weights = [_weight(item) for item in items]
    if all(weight is None for weight in weights):
        blend: list = [str(item) for item in items]
        prefixes = blend
    else:
        blend, prefixes = _weighted(items, weights, key)
    for prefix in prefixes:
        token_files(prefix, key)
    return blend


def _weighted(items: list, weights: list[float | None], key: str) -> tuple[list, list[str]]:
    """Items as ``[w1, p1, …]``; a prefix may look like a number, a weight must be one."""
    if len(items) % 2 or any(weight is None for weight in weights[::2]):
        raise MinitronError(
            f"{key} must alternate weights and prefixes ([0.7, a_text_document, 0.3, b_text_document]), found {items}"
        )
    values = [float(weight) for weight in weights[::2] if weight is not None]
    if not all(0 < weight < float("inf") for weight in values):
        raise MinitronError(
            f"{key}: weights must be finite and above 0, found {values}; leave out a prefix that is not to be used"
        )
    prefixes = [str(item) for item in items[1::2]]
    blend: list = []
    for weight, prefix in zip(values, prefixes, strict=True):
        blend += [weight, prefix]
    return blend, prefixes


def _weight(item: Any) -> float | None:
    try:
        return float(item)
    except (TypeError, ValueError):
        return None


def text_blocks(
    source: str | Path | Source,
    tokenizer: TokenizerSpec,
    seq_length: int,
    *,
    num_samples: int | None = None,
    seed: int = SEED,
    shuffle: bool = True,
    vocab_size: int | None = None,
    on_bad_record: str = Calibration.on_bad_record,
) -> Drawn:
    """What :func:`counted_blocks` gives, straight from text.

    The tokens are those that :func:`preprocess` would write (``append_eod`` where there is an EOD), and so is what
    counts where ``text`` of a record is a list of messages; no file is kept.
    """
    from nemo_minitron.data.preprocess import preprocess, read_facts

    with tempfile.TemporaryDirectory() as folder:
        prefix = preprocess(
            source,
            Path(folder) / "blocks",
            tokenizer_library=tokenizer.library,
            tokenizer_type=tokenizer.type,
            tokenizer_model=tokenizer.model,
            split_special_tokens=tokenizer.split_special_tokens,
            append_eod=tokenizer.load().eod is not None,
            on_bad_record=on_bad_record,
        )[0]
        if skipped := read_facts(prefix).get("skipped", {}).get("records"):
            notice(f"{source}: {skipped} bad records skipped (on_bad_record=skip)")
        try:
            return counted_blocks(
                prefix, seq_length, num_samples=num_samples, seed=seed, shuffle=shuffle, vocab_size=vocab_size
            )
        except MinitronError as error:  # said of the text, which the user knows, not of a temporary file
            raise MinitronError(str(error).replace(str(prefix), str(source))) from None
