"""HF folder or GGUF → ``.nemo``, and back: one tensor at a time, so memory stays at a layer's worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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
from nemo_minitron.checkpoint.canonical import check_digest
from nemo_minitron.checkpoint.nemo_config import SECTION, dtype_from_precision, padded_vocab, vocab_divisor
from nemo_minitron.checkpoint.nemo_gate import not_taken_over
from nemo_minitron.checkpoint.tokenizer_files import FILES, tokenizer_files
from nemo_minitron.checkpoint.tokenizer_open import choose, facts
from nemo_minitron.config.schema import ConvertConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import Staging
from nemo_minitron.jobs.processes import notice
from nemo_minitron.model.layout import VOCAB


def convert(
    input_path: str | Path,
    output_path: str | Path,
    *,
    precision: str | int | None = None,
    make_vocab_size_divisible_by: int | None = None,
    verify: bool = False,
    max_shard_size: int | str = ConvertConfig.max_shard_size,
    tokenizer: Mapping[str, Any] | None = None,
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
        verify: before the output appears at its place, read it again and compare sizes, RoPE and every tensor, bit by
            bit, with the input's, and both with the checksums that a ``.nemo`` carries.
        max_shard_size: of HF's safetensors files.
        tokenizer: section with ``type`` or ``model`` that names one for an input which carries none.

    Raises:
        MinitronError: bad input or destination; the destination is then as it was.
    """
    source, target = Path(input_path), Path(output_path)
    if not source.exists():
        raise MinitronError(f"input_name_or_path: expected a HF folder, a .gguf or a .nemo, found nothing at {source}")
    if source.suffix == ".nemo" or (source / "model_config.yaml").is_file():
        if make_vocab_size_divisible_by is not None:
            raise MinitronError("make_vocab_size_divisible_by must be absent towards HF, whose tables have no padding")
        _to_hf(source, target, precision, max_shard_size, verify, tokenizer)
    else:
        _to_nemo(source, target, precision, make_vocab_size_divisible_by, verify, tokenizer)
    return target


def _to_nemo(
    source: Path,
    target: Path,
    precision: str | int | None,
    divisor: int | None,
    verify: bool,
    asked: Mapping[str, Any] | None,
) -> None:
    with ExitStack() as stack:
        reader = stack.enter_context(HfReader(source))
        dtype = reader.dtype if precision is None else dtype_from_precision(precision)
        divisor = vocab_divisor(reader.shape.vocab_size) if divisor is None else divisor
        shape = reader.shape.replace(padded_vocab_size=padded_vocab(reader.shape.vocab_size, divisor))
        tokenizer, made = None, None
        if not reader.is_gguf:
            tokenizer = choose(reader, asked, "tokenizer")
        else:
            tokenizer = Path(target.absolute()).with_name(f"{target.stem}.tokenizer")
            made = stack.enter_context(Staging(tokenizer, folder=True, replaceable=FILES)).path
            reader.save_tokenizer(made)
        entries = None
        if tokenizer is not None:
            entries, _ = _fitting(made or tokenizer, shape.vocab_size, source)
        config = nemo_config_from_hf(
            reader.hf_config,
            shape,
            dtype=dtype,
            divisor=divisor,
            tokenizer=tokenizer,
            tokenizer_size=entries,
            generation_config=reader.generation_config,
        )
        check = _comparison(reader, NemoReader) if verify else None
        with NemoWriter(target, config, shape, dtype, tokenizer=made or tokenizer, check=check) as writer:
            _copy(reader, writer)


def _to_hf(
    source: Path,
    target: Path,
    precision: str | int | None,
    max_shard_size: int | str,
    verify: bool,
    asked: Mapping[str, Any] | None,
) -> None:
    with NemoReader(source) as reader:
        dtype = reader.dtype if precision is None else dtype_from_precision(precision)
        kept = reader.config.get(SECTION) or {}
        tokenizer, ids, why_none = _tokenizer_for_hf(reader, asked)
        with HfWriter(
            target,
            kept.get("hf_config"),
            reader.shape,
            dtype,
            generation_config=kept.get("generation_config"),
            tokenizer=tokenizer,
            without_tokenizer=why_none,
            token_ids=ids,
            max_shard_size=max_shard_size,
            check=_comparison(reader, HfReader) if verify else None,
        ) as writer:
            _copy(reader, writer)


def _fitting(folder: Path, rows: int, where: Path) -> tuple[int, dict[str, int | None]]:
    """Entries and ids of a folder's tokenizer, which must not be larger than the model's table."""
    entries, ids = facts(folder)
    if entries > rows:
        raise MinitronError(
            f"{where}: the tokenizer has {entries} entries, the model's table {rows} rows; expected a tokenizer no "
            "larger than the table"
        )
    return entries, ids


def _tokenizer_for_hf(
    reader: NemoReader, asked: Mapping[str, Any] | None
) -> tuple[Path | None, dict[str, int | None], str]:
    """Tokenizer for an export, its ids (null where they are not known), and why there is none.

    What the file packs comes first, then what the user asks for. A folder of this machine that the file merely names,
    as NeMo's do, is the last resort: it is said, files with a tokenizer's names and plain content are all that is read
    there, and it must fit the table. A name on the hub is never followed.
    """
    unknown: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
    rows, named = reader.shape.vocab_size, reader.named_tokenizer()
    for key in not_taken_over(reader.config):
        notice(f"{reader.path}: {key} has no place in an HF folder and is left out")
    folder = choose(reader, asked, "tokenizer")
    packed = folder is not None and folder == reader.tokenizer_folder()
    if packed and (reader.config.get(SECTION) or {}).get("hf_config") is not None:
        return folder, {}, ""  # the ids are the source's; it was read when it was packed
    if folder is not None:
        try:
            return folder, _fitting(folder, rows, reader.path)[1], ""
        except MinitronError as error:
            if not packed:
                raise
            notice(f"{error}; it is exported as it is, with no bos_token_id and eos_token_id")
            return folder, unknown, ""
    said = "carries no tokenizer"
    if named is not None and Path(named).is_absolute():
        try:
            if Path(named).is_dir() and tokenizer_files(Path(named)):
                ids = _fitting(Path(named), rows, reader.path)[1]
                notice(f"{reader.path} carries no tokenizer; taken from the folder that it names, {named}")
                return Path(named), ids, ""
            said += f", and {named}, which it names, holds none here"
        except MinitronError as error:
            said += f", and the folder that it names cannot be used: {error}"
    elif named is not None:
        said += f", only the name '{named}', which is not followed"
    said = f"{reader.path} {said}; the export has none. tokenizer.type=... gives one"
    notice(said)
    return None, unknown, said


def _copy(reader: HfReader | NemoReader, writer: HfWriter | NemoWriter) -> None:
    """Every tensor in the order of the files, the next one read while one is written.

    Only a vocabulary table is large, and its neighbours are small, so two tensors at a time take little more than one.
    """
    from tqdm import tqdm

    order = list(each_tensor(reader.shape))
    bar = tqdm(total=reader.num_bytes(), unit="B", unit_scale=True, desc=f"to {writer.destination.name}", disable=None)
    with bar, ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(reader.tensor, *order[0])
        for number, (parameter, layer) in enumerate(order, start=1):
            tensor = following.result()
            if number < len(order):
                following = ahead.submit(reader.tensor, *order[number])
            writer.write(parameter, tensor, layer)
            bar.update(tensor.numel() * tensor.element_size())


def _comparison(reader: HfReader | NemoReader, kind: type[HfReader] | type[NemoReader]) -> Callable[[Path], None]:
    def check(written: Path) -> None:
        with kind(written) as after:
            compare(reader, after)

    return check


def compare(before: HfReader | NemoReader, after: HfReader | NemoReader) -> None:
    """The shapes, RoPE and all, and every tensor of ``after`` against the same one of ``before`` cast to its dtype, bit
    by bit; checksums as well.

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
        if parameter.axes[0] == VOCAB:
            tensors = [tensor[: after.shape.vocab_size] for tensor in tensors]
        # as bytes: as numbers, a zero would equal its negative
        old, new = (tensor.to(after.dtype).contiguous().view(torch.uint8) for tensor in tensors)
        if not torch.equal(old, new):
            raise MinitronError(f"{after.path}: tensor '{tensor_name(parameter, layer)}' differs from {before.path}'s")
