"""HF folder or GGUF → ``.nemo``, and back: one tensor at a time, so memory stays at a layer's worth."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from nemo_minitron.checkpoint import (
    HfReader,
    HfWriter,
    NemoReader,
    NemoWriter,
    each_tensor,
    nemo_config_from_hf,
    tensor_name,
)
from nemo_minitron.checkpoint.nemo_config import SECTION, dtype_from_precision, padded_vocab, vocab_divisor
from nemo_minitron.checkpoint.staging import Staging
from nemo_minitron.checkpoint.tokenizer_files import FILES, tokenizer_size
from nemo_minitron.errors import MinitronError
from nemo_minitron.layout import VOCAB


def convert(
    input_path: str | Path,
    output_path: str | Path,
    *,
    precision: str | int | None = None,
    make_vocab_size_divisible_by: int | None = None,
    verify: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Convert a checkpoint; the direction follows from the input. Return the output's path.

    A ``.nemo`` (file or folder) becomes a HF folder: ``config.json``, ``generation_config.json``, tokenizer files,
    safetensors. A HF folder or a GGUF becomes a ``.nemo``; its tokenizer is packed inside, and ``tokenizer.type`` names
    the source folder (for a GGUF a new folder ``<output stem>.tokenizer`` beside the output).

    Args:
        precision: storage dtype of the output (``32``, ``bf16``, ``16`` or NeMo's longer spellings); the input's when
            None.
        make_vocab_size_divisible_by: pads the table of a ``.nemo``; NeMo's own choice, which pads nothing at TP=1, when
            None. Meaningless towards HF.
        verify: read the output again and compare every tensor, bit by bit, with the input's.
        max_shard_size: of HF's safetensors files.

    Raises:
        MinitronError: bad input or destination; the destination is then as it was.
    """
    source, target = Path(input_path), Path(output_path)
    if not source.exists():
        raise MinitronError(f"input_name_or_path: expected a HF folder, a .gguf or a .nemo, found nothing at {source}")
    if source.suffix == ".nemo" or (source / "model_config.yaml").is_file():
        if make_vocab_size_divisible_by is not None:
            raise MinitronError("make_vocab_size_divisible_by must be absent towards HF, whose tables have no padding")
        _to_hf(source, target, precision, max_shard_size)
    else:
        _to_nemo(source, target, precision, make_vocab_size_divisible_by)
    if verify:
        _compare(source, target)
    return target


def _to_nemo(source: Path, target: Path, precision: str | int | None, divisor: int | None) -> None:
    with ExitStack() as stack:
        reader = stack.enter_context(HfReader(source))
        dtype = reader.dtype if precision is None else dtype_from_precision(precision)
        divisor = vocab_divisor(reader.shape.vocab_size) if divisor is None else divisor
        shape = reader.shape.replace(padded_vocab_size=padded_vocab(reader.shape.vocab_size, divisor))
        tokenizer, made = reader.tokenizer_folder(), None
        if reader.is_gguf:
            tokenizer = Path(target.absolute()).with_name(f"{target.stem}.tokenizer")
            made = stack.enter_context(_TokenizerFolder(tokenizer))
            reader.save_tokenizer(made)
        entries = None
        if tokenizer is not None:
            entries = tokenizer_size(made or tokenizer)
            if entries > shape.vocab_size:
                raise MinitronError(
                    f"{source}: the tokenizer has {entries} entries, the model's table {shape.vocab_size} rows; "
                    "expected a tokenizer no larger than the table"
                )
        config = nemo_config_from_hf(
            reader.hf_config,
            shape,
            dtype=dtype,
            divisor=divisor,
            tokenizer=tokenizer,
            tokenizer_size=entries,
            generation_config=reader.generation_config,
        )
        with NemoWriter(target, config, shape, dtype, tokenizer=made or tokenizer) as writer:
            _copy(reader, writer)


def _to_hf(source: Path, target: Path, precision: str | int | None, max_shard_size: int | str) -> None:
    with NemoReader(source) as reader:
        dtype = reader.dtype if precision is None else dtype_from_precision(precision)
        kept = reader.config.get(SECTION) or {}
        with HfWriter(
            target,
            kept.get("hf_config"),
            reader.shape,
            dtype,
            generation_config=kept.get("generation_config"),
            tokenizer=reader.tokenizer_folder(),
            max_shard_size=max_shard_size,
        ) as writer:
            _copy(reader, writer)


def _copy(reader: HfReader | NemoReader, writer: HfWriter | NemoWriter) -> None:
    from tqdm import tqdm

    with tqdm(total=reader.num_bytes(), unit="B", unit_scale=True, desc=f"to {writer.path.name}", disable=None) as bar:
        for parameter, layer in each_tensor(reader.shape):
            tensor = reader.tensor(parameter, layer)
            writer.write(parameter, tensor, layer)
            bar.update(tensor.numel() * tensor.element_size())


def _compare(source: Path, target: Path) -> None:
    """Every tensor of ``target`` against the same one of ``source``, cast as the conversion cast it."""
    with _open(source) as before, _open(target) as after:
        for parameter, layer in each_tensor(after.shape):
            rows = slice(0, after.shape.vocab_size) if parameter.axes[0] == VOCAB else None
            expected = before.tensor(parameter, layer, rows).to(after.dtype)
            if not torch.equal(expected, after.tensor(parameter, layer, rows)):
                raise MinitronError(f"{target}: tensor '{tensor_name(parameter, layer)}' differs from {source}'s")


def _open(path: Path) -> HfReader | NemoReader:
    is_nemo = path.suffix == ".nemo" or (path / "model_config.yaml").is_file()
    return NemoReader(path) if is_nemo else HfReader(path)


class _TokenizerFolder:
    """A new tokenizer folder that appears only if the conversion succeeds."""

    def __init__(self, folder: Path) -> None:
        self._staging = Staging(folder, folder=True, replaceable=FILES)

    def __enter__(self) -> Path:
        return self._staging.path

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self._staging.commit()
        else:
            self._staging.abort()
