"""The walk of a conversion: every tensor of a source into a writer, and the comparison of both afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoint import HfReader, NemoReader, each_tensor, tensor_name
from nemo_minitron.checkpoint.canonical import check_digest
from nemo_minitron.checkpoint.formats import Format, Reader, Writer, format_of, named
from nemo_minitron.checkpoint.grown import Grown
from nemo_minitron.checkpoint.hub import located
from nemo_minitron.checkpoint.logits import check_memory, compare_logits
from nemo_minitron.checkpoint.nemo_config import dtype_from_precision
from nemo_minitron.checkpoint.tokenizer_open import choose, facts
from nemo_minitron.config.schema import VOCAB, ConvertConfig
from nemo_minitron.convert.target import Request, format_for, open_writer
from nemo_minitron.errors import MinitronError, check_choice
from nemo_minitron.jobs.processes import notice
from nemo_minitron.jobs.progress import progress_bar
from nemo_minitron.model import layout


def convert(
    input_path: str | Path,
    output_path: str | Path,
    *,
    format: str | None = None,
    precision: str | int | None = None,
    make_vocab_size_divisible_by: int | None = None,
    transformer_engine: bool = False,
    verify: bool | str = False,
    vocab: str = ConvertConfig.vocab,
    untie: bool = False,
    max_shard_size: int | str = ConvertConfig.max_shard_size,
    tokenizer: Mapping[str, Any] | None = None,
    quantization: str | None = None,
    model: Mapping[str, Any] | None = None,
    temporary: bool = False,
) -> Path:
    """Convert a checkpoint of any format that is read to any that is written. Return the output's path.

    Args:
        input_path: a path; a text may be a model's name on the hub (:func:`located`).
        format: of the output, one of ``CONVERT_FORMATS``; when None by its name (``.nemo``, ``.gguf``), else a HF
            folder of a ``.nemo`` and a ``.nemo`` folder of all others.
        precision: storage dtype of the output (``32``, ``bf16``, ``16`` or NeMo's longer spellings); the input's when
            None.
        make_vocab_size_divisible_by: pads the table of the formats that have padding; the format's own rule when None.
        transformer_engine: whether Megatron's formats get the empty states that Transformer Engine's modules ask for.
        verify: before the output appears at its place, read it again and compare sizes, RoPE and every tensor, bit by
            bit, with the input's and its checksums; ``"logits"``: transformers' too (:func:`compare_logits`).
        vocab: ``grow`` gives the tables rows for a tokenizer with more tokens (:class:`Grown`), ``refuse`` refuses it.
        untie: use the output head that the file of a tied model has beside its table, which is refused otherwise.
        max_shard_size: of HF's safetensors files.
        tokenizer: section with ``type`` or ``model`` that names one for an input which carries none.
        quantization: ``q8_0`` for the matrices of a GGUF, in place of ``precision``.
        model: NeMo's keys of the shape of an input which does not say all of it, see
            :class:`nemo_minitron.checkpoint.megatron_folder.MegatronReader`.
        temporary: whether the output is removed again, and nothing is to be said of its architecture.

    Raises:
        MinitronError: bad input or destination; the destination is then as it was.
    """
    source, target = located(input_path, "input_name_or_path"), Path(output_path)
    if not source.exists():
        raise MinitronError(f"input_name_or_path: expected a HF folder, a .gguf or a .nemo, found nothing at {source}")
    with ExitStack() as stack:
        found = format_of(source)
        name = format_for(target, format, found.name)
        reader = stack.enter_context(_asked(found, source, model, untie, vocab, tokenizer))
        dtype = reader.dtype if precision is None else _dtype(precision, quantization)
        check = _comparison(reader, name, found.name, verify)
        sizes = (make_vocab_size_divisible_by, max_shard_size)
        request = Request(target, dtype, *sizes, tokenizer, quantization, check, name, transformer_engine, temporary)
        with open_writer(name, reader, request, stack) as writer:
            _copy(reader, writer)
    return target


def _dtype(precision: str | int, quantization: str | None) -> torch.dtype:
    if quantization is not None:
        raise MinitronError(
            f"quantization={quantization} is in place of precision, which must be absent, found {precision}"
        )
    return dtype_from_precision(precision)


def _open(found: Format, source: Path, model: Mapping[str, Any] | None) -> Reader:
    if not model:
        return found.open(source)
    if found.open_as is None:
        raise MinitronError(f"model must be absent: {source} is {found.what}, which says its shape itself")
    return found.open_as(source, model)


def _copy(reader: Reader, writer: Writer) -> None:
    """Every tensor in the order of the files, the next one read while one is written.

    Only a vocabulary table is large, and its neighbours are small, so two tensors at a time take little more than one.
    """

    order = list(each_tensor(reader.shape))
    padded = reader.shape.padded_vocab_size != reader.shape.vocab_size

    def read(parameter: layout.Parameter, layer: int | None) -> torch.Tensor:
        rows = slice(0, reader.shape.vocab_size) if padded and parameter.axes[0] == layout.VOCAB else None
        return reader.tensor(parameter, layer, rows)  # padding is the writer's own

    bar = progress_bar(reader.num_bytes(), f"to {writer.destination.name}", "B")
    with bar, ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(read, *order[0])
        for number, (parameter, layer) in enumerate(order, start=1):
            tensor = following.result()
            if number < len(order):
                following = ahead.submit(read, *order[number])
            writer.write(parameter, tensor, layer)
            bar.update(tensor.numel() * tensor.element_size())


def _asked(
    found: Format,
    source: Path,
    model: Mapping[str, Any] | None,
    untie: bool,
    vocab: str,
    tokenizer: Mapping[str, Any] | None,
) -> Reader:
    """The source, its head untied and its vocabulary grown where that is asked for and there is anything to do."""
    check_choice("vocab", vocab, VOCAB)
    for key, asked, does in (
        ("untie", untie, found.name == "hf"),
        ("vocab=grow", vocab == "grow", found.name != "nemo"),
    ):
        if asked and not does:
            raise MinitronError(f"{key} must be absent for {found.what}; it is for a HF folder")
    reader = HfReader(source, untie=True) if untie and not model else _open(found, source, model)
    try:
        folder = choose(reader, tokenizer, "tokenizer") if vocab == "grow" else None
        if folder is None and vocab == "grow":
            raise MinitronError(f"vocab=grow: expected a tokenizer whose tokens get rows, found none in {source}")
        entries = 0 if folder is None else facts(folder)[0]
    except BaseException:
        reader.close()
        raise
    if entries <= reader.shape.vocab_size:
        return reader
    notice(f"{source}: the vocabulary grows from {reader.shape.vocab_size} to the tokenizer's {entries} tokens")
    return Grown(reader, entries)


_LOADED = ("hf", "gguf")
"""Formats that transformers loads."""


def _comparison(reader: Reader, name: str, source: str, verify: bool | str) -> Callable[[Path], None] | None:
    """What is asked of the output before it appears.

    Args:
        name: format of the output. source: that of the input.
    """
    if not verify:
        return None
    if verify not in (True, "logits"):
        raise MinitronError(f"verify: expected true, false or logits, found {verify!r:.80}")
    if verify == "logits":
        if name not in _LOADED and source not in _LOADED:
            raise MinitronError(f"verify=logits must have a HF folder or a GGUF on one side, found {source} and {name}")
        check_memory(reader.shape)

    def check(written: Path) -> None:
        with named(name).open(written) as after:
            compare(reader, after)
            if verify == "logits":
                ours = reader if name == "hf" else after
                theirs, which = (written, "output") if name in _LOADED else (reader.path, "input")
                difference, largest = compare_logits(ours, theirs, after.dtype, _rows_of(reader))
                notice(
                    f"verify=logits: the largest difference from transformers' logits of the {which} is "
                    f"{difference:.2g}, the largest logit {largest:.3g}"
                )

    return check


def _rows_of(reader: Reader) -> int:
    """Tokens that the source's own tables have."""
    return reader.before if isinstance(reader, Grown) else reader.shape.vocab_size


def compare(before: Reader, after: Reader) -> None:
    """The shapes, RoPE and all, and every tensor of ``after`` against the same one of ``before`` cast to its dtype (or,
    in a GGUF, quantised as it is there), bit by bit; checksums as well.

    Raises:
        MinitronError: the first size or tensor that differs from the other's, or from its own file's checksum, by name.
    """
    for name, found in vars(after.shape).items():
        expected = getattr(before.shape, name)
        if found != expected and name != "padded_vocab_size":
            raise MinitronError(f"{after.path}: {name} must be {expected} as in {before.path}, found {found}")
    sums = [reader.checksums() if isinstance(reader, NemoReader) else None for reader in (before, after)]
    for parameter, layer in each_tensor(after.shape):
        tensors = [reader.tensor(parameter, layer) for reader in (before, after)]
        for reader, expected, tensor in zip((before, after), sums, tensors, strict=True):
            if expected is not None:
                check_digest(reader.path, expected, parameter, layer, tensor)
        if parameter.axes[0] == layout.VOCAB:
            tensors = [tensor[: after.shape.vocab_size] for tensor in tensors]
        # as bytes: as numbers, a zero would equal its negative
        if isinstance(after, HfReader):
            tensors[0] = after.as_stored(tensors[0], parameter, layer)
        old, new = (tensor.to(after.dtype).contiguous().view(torch.uint8) for tensor in tensors)
        if not torch.equal(old, new):
            raise MinitronError(f"{after.path}: tensor '{tensor_name(parameter, layer)}' differs from {before.path}'s")
