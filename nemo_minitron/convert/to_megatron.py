"""Towards the checkpoints of Megatron-Bridge, Megatron-LM and NeMo 2."""

from __future__ import annotations

from contextlib import ExitStack

from nemo_minitron.checkpoint.formats import Reader
from nemo_minitron.checkpoint.megatron_args import further_arguments
from nemo_minitron.checkpoint.megatron_fields import llama3_factor
from nemo_minitron.checkpoint.megatron_write import MegatronWriter
from nemo_minitron.checkpoint.nemo_config import padded_vocab, vocab_divisor
from nemo_minitron.convert.target import Request
from nemo_minitron.convert.tokenizer import for_export
from nemo_minitron.jobs.processes import notice

_DIVISOR = 128
"""``make_vocab_size_divisible_by`` of Megatron-LM and Megatron-Bridge, where none is asked for."""


def writer(reader: Reader, request: Request, stack: ExitStack) -> MegatronWriter:
    """A writer of ``request.path`` in the dress ``request.format``."""
    divisor, vocab = request.make_vocab_size_divisible_by, reader.shape.vocab_size
    if divisor is None:  # NeMo 2 has the size of the table alone: its own importers pad nothing
        divisor = vocab_divisor(vocab) if request.format == "nemo2" else _DIVISOR
    shape = reader.shape.replace(padded_vocab_size=padded_vocab(vocab, divisor))
    tokenizer, _, _ = for_export(reader, request.tokenizer, stack)
    if request.format == "megatron":
        said = " ".join(further_arguments(shape, str(request.path)))
        notice(f"{request.path}: beside --use-checkpoint-args, the command line of Megatron-LM must say {said}")
        factor = llama3_factor(shape, str(request.path))
        if factor not in (None, 8):
            notice(
                f"{request.path}: the RoPE scaling has the factor {factor:g}, which is in the "
                "checkpoint; pretrain_gpt.py of Megatron-LM (0.13 to 0.19) builds its GPT with 8 whatever it is told"
            )
    return MegatronWriter(
        request.path,
        request.format,
        shape,
        request.dtype,
        divisor=divisor,
        tokenizer=tokenizer,
        hf_config=reader.hf_config,
        generation_config=reader.generation_config,
        transformer_engine=request.transformer_engine,
        check=request.check,
    )
