"""Towards an HF folder: ``config.json``, ``generation_config.json``, tokenizer files, safetensors."""

from __future__ import annotations

from contextlib import ExitStack

from nemo_minitron.checkpoint import HfWriter, NemoReader
from nemo_minitron.checkpoint.formats import Reader
from nemo_minitron.checkpoint.nemo_config import SECTION
from nemo_minitron.convert.target import Request
from nemo_minitron.convert.tokenizer import for_export


def writer(reader: Reader, request: Request, stack: ExitStack) -> HfWriter:
    """A writer of ``request.path``."""
    tokenizer, ids, why_none = for_export(reader, request.tokenizer, stack)
    return HfWriter(
        request.path,
        reader.hf_config,
        reader.shape,
        request.dtype,
        generation_config=reader.generation_config,
        tokenizer=tokenizer,
        without_tokenizer=why_none,
        token_ids=ids,
        layers=(reader.config.get(SECTION) or {}).get("layers") if isinstance(reader, NemoReader) else None,
        max_shard_size=request.max_shard_size,
        check=request.check,
    )
