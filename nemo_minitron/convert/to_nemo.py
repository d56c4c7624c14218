"""Towards ``.nemo``: NeMo's config from what the source says, its tokenizer packed inside."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from nemo_minitron.checkpoint import NemoReader, NemoWriter, nemo_config_from_hf
from nemo_minitron.checkpoint.formats import Reader
from nemo_minitron.checkpoint.nemo_config import padded_vocab, vocab_divisor
from nemo_minitron.checkpoint.tokenizer_files import FILES
from nemo_minitron.checkpoint.tokenizer_open import choose
from nemo_minitron.convert.target import Request
from nemo_minitron.convert.tokenizer import fitting
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import Staging


def writer(reader: Reader, request: Request, stack: ExitStack) -> NemoWriter:
    """A writer of ``request.path``; a ``.nemo`` that is the source keeps its own config.

    The tokenizer is packed inside, and ``tokenizer.type`` names its folder. One that has to be made first (a GGUF's)
    gets a new folder, ``<output stem>.tokenizer``, beside the output, where NeMo finds it.

    Raises:
        MinitronError: a tokenizer whose path NeMo could not read back.
    """
    divisor = request.make_vocab_size_divisible_by
    divisor = vocab_divisor(reader.shape.vocab_size) if divisor is None else divisor
    shape = reader.shape.replace(padded_vocab_size=padded_vocab(reader.shape.vocab_size, divisor))
    tokenizer = made = choose(reader, request.tokenizer, "tokenizer")
    if tokenizer is None:
        beside = Path(request.path.absolute()).with_name(f"{request.path.stem}.tokenizer")
        if (made := _make_beside(reader, beside, stack)) is not None:
            tokenizer = beside
    if tokenizer is not None and "${" in str(tokenizer.absolute()):
        raise MinitronError(
            f"{tokenizer.absolute()}: expected a tokenizer whose folder's path has no '${{', which NeMo would read "
            "as a reference to another key"
        )
    entries = None if made is None else fitting(made, shape.vocab_size, reader.path)[0]
    if isinstance(reader, NemoReader):
        config = {**reader.config, "make_vocab_size_divisible_by": divisor}
    else:
        config = nemo_config_from_hf(
            reader.hf_config,
            shape,
            dtype=request.dtype,
            divisor=divisor,
            tokenizer=tokenizer,
            tokenizer_size=entries,
            generation_config=reader.generation_config,
        )
    return NemoWriter(request.path, config, shape, request.dtype, tokenizer=made, check=request.check)


def _make_beside(reader: Reader, folder: Path, stack: ExitStack) -> Path | None:
    """Where the files of a tokenizer that is made lie until ``stack`` ends and ``folder`` appears; None without one."""
    staging = Staging(folder, folder=True, replaceable=FILES)
    try:
        made = reader.save_tokenizer(staging.path)
    except BaseException:
        staging.abort()
        raise
    if not made:
        staging.abort()
        return None
    return stack.enter_context(staging).path
