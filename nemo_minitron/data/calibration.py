"""Calibration tokens: which blocks of which text a model sees while it is scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.tokenizer_open import choose
from nemo_minitron.config.sections import Calibration
from nemo_minitron.data.blocks import Drawn, counted_blocks, split_lists, text_blocks
from nemo_minitron.data.tokenizer import TokenizerSpec
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.processes import notice


def block_length(calibration: Calibration, reader: NemoReader) -> int:
    """Tokens of a block: ``calibration.seq_length``, or the checkpoint's ``encoder_seq_length``.

    Raises:
        MinitronError: more than the model has positions, or its window holds.
    """
    longest = reader.shape.max_position_embeddings
    length = calibration.seq_length or int(reader.config.get("encoder_seq_length") or longest)
    reader.shape.check_window(length, "calibration.seq_length")
    if length > longest:
        raise MinitronError(f"calibration.seq_length: {length} asked, the model has {longest} positions")
    return length


def draw_blocks(
    calibration: Calibration, length: int, reader: NemoReader, tokenizer: Mapping[str, Any] | None = None
) -> Drawn:
    """Draw calibration blocks without replacement from the whole stream of each text, in an order that mixes the texts.

    Of conversations only blocks are drawn in which the assistant says something.

    Args:
        tokenizer: the run's ``model.tokenizer``, for text where the checkpoint carries none.

    Raises:
        MinitronError: a setting that cannot be; missing or too little data; tokens that the model does not have.
    """
    if (calibration.data_prefix is None) == (calibration.path is None):
        raise MinitronError(
            "calibration: expected one of calibration.data_prefix and calibration.path, found both or none"
        )
    if calibration.own_samples is not None and calibration.own_samples < 0:
        raise MinitronError(f"calibration.own_samples: expected 0 or more, found {calibration.own_samples}")
    if calibration.num_samples < 1:
        raise MinitronError(f"calibration.num_samples: expected at least 1, found {calibration.num_samples}")
    if calibration.path is None:
        return _from_prefixes(shares(calibration), calibration.seed, length, reader.shape.vocab_size)
    return _from_text(calibration.path, calibration, length, reader, tokenizer)


def shares(calibration: Calibration) -> list[tuple[str, int]]:
    """Prefixes of ``calibration.data_prefix``, each with the number of samples to draw from it.

    Weights are NeMo's, ``[w1, p1, w2, p2, …]``; what is left after rounding down goes to the earlier prefixes. One that
    no sample falls to is told of.

    Raises:
        MinitronError: several prefixes without weights, or none of NeMo's forms.
    """
    given = calibration.data_prefix
    if isinstance(given, str | Path):
        return [(str(given), calibration.num_samples)]
    blend = split_lists(given, "calibration.data_prefix")
    if isinstance(blend, dict):
        blend = blend["train"]
    if len(blend) == 1:
        return [(blend[0], calibration.num_samples)]
    if not isinstance(blend[0], float):
        raise MinitronError(f"calibration.data_prefix: several prefixes need weights, found {blend}")
    weights, prefixes = blend[::2], blend[1::2]
    counts = [int(calibration.num_samples * weight / sum(weights)) for weight in weights]
    for index in range(calibration.num_samples - sum(counts)):
        counts[index] += 1
    for prefix, weight, count in zip(prefixes, weights, counts, strict=True):
        if not count:
            notice(
                f"calibration.data_prefix: none of calibration.num_samples={calibration.num_samples} is drawn from "
                f"'{prefix}', whose weight is {weight:g} of {sum(weights):g}; more samples would reach it"
            )
    return [(prefix, count) for prefix, count in zip(prefixes, counts, strict=True) if count]


def _from_prefixes(parts: Iterable[tuple[str, int]], seed: int, length: int, vocab_size: int) -> Drawn:
    found: list[Drawn] = []
    facts: list[tuple[str, int]] = []
    for prefix, count in parts:
        found.append(counted_blocks(prefix, length, num_samples=count, seed=seed, vocab_size=vocab_size))
        facts.append((found[-1].fingerprint, count))
    if len(found) == 1:
        return found[0]
    counted = None
    if any(one.counted is not None for one in found):
        every = (torch.ones_like(one.tokens, dtype=torch.bool) if one.counted is None else one.counted for one in found)
        counted = torch.cat(list(every))
    order = _mixed([len(one.tokens) for one in found])
    tokens = torch.cat([one.tokens for one in found])[order]
    counted = None if counted is None else counted[order]
    return Drawn(tokens, counted, hashlib.sha256(json.dumps(facts).encode()).hexdigest())


def _mixed(counts: Sequence[int]) -> Tensor:
    """Order of samples that lie part behind part, under which any first few of them have each part's share, int64.

    Whoever works on some of the samples takes the first: re-solving, the choice of layers and of query groups.
    """
    places = torch.cat([(torch.arange(count, dtype=torch.float64) + 0.5) / count for count in counts])
    return places.argsort(stable=True)


def _from_text(
    path: str, calibration: Calibration, length: int, reader: NemoReader, tokenizer: Mapping[str, Any] | None
) -> Drawn:
    if not Path(path).exists():
        raise MinitronError(f"calibration.path: no file or folder '{path}'")
    folder = choose(reader, tokenizer, "model.tokenizer")
    if folder is None:
        raise MinitronError(
            f"calibration.path: '{reader.path}' carries no tokenizer; give one with model.tokenizer.type, or give "
            "calibration.data_prefix"
        )
    return text_blocks(
        path,
        TokenizerSpec("huggingface", str(folder), None, calibration.split_special_tokens),
        length,
        on_bad_record=calibration.on_bad_record,
        num_samples=calibration.num_samples,
        seed=calibration.seed,
        vocab_size=reader.shape.vocab_size,
    )
