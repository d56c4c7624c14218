"""Towards an HF folder: ``config.json``, ``generation_config.json``, tokenizer files, safetensors."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from nemo_minitron.checkpoint import HfWriter, NemoReader
from nemo_minitron.checkpoint.formats import Reader
from nemo_minitron.checkpoint.hf_config import shape_from_hf
from nemo_minitron.checkpoint.model_card import ModelCard, base_model
from nemo_minitron.checkpoint.nemo_config import SECTION
from nemo_minitron.checkpoint.run_records import records_of
from nemo_minitron.convert.target import Request
from nemo_minitron.convert.tokenizer import for_export, loadable
from nemo_minitron.jobs.processes import notice


def writer(reader: Reader, request: Request, stack: ExitStack) -> HfWriter:
    """A writer of ``request.path``."""
    tokenizer, ids, why_none = for_export(reader, request.tokenizer, stack)
    made = HfWriter(
        request.path,
        reader.hf_config,
        reader.shape,
        request.dtype,
        generation_config=reader.generation_config,
        tokenizer=loadable(tokenizer),
        without_tokenizer=why_none,
        token_ids=ids,
        layers=(reader.config.get(SECTION) or {}).get("layers") if isinstance(reader, NemoReader) else None,
        max_shard_size=request.max_shard_size,
        card=ModelCard(
            reader.path,
            reader.shape,
            None if reader.hf_config is None else shape_from_hf(reader.hf_config),
            base_model(reader.hf_config),
            records_of(Path(os.path.abspath(reader.path)), reader.shape),
        ),
        check=request.check,
    )
    if made.dress.note and not request.temporary:
        notice(f"{request.path}: {made.dress.note}")
    return made
