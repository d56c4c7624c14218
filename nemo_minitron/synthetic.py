"""A random Llama of any shape with its tokenizer, as a complete HF folder, streamed to disk a tensor at a time."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from nemo_minitron.checkpoint.fuse import fuse, hf_part_rows
from nemo_minitron.checkpoint.hf_config import hf_config_from_shape
from nemo_minitron.checkpoint.hf_write import HfWriter
from nemo_minitron.config.schema import ConvertConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.layout import EMBEDDING, FC2_WEIGHT, OUTPUT, PROJ_WEIGHT, Parameter, parameters
from nemo_minitron.model.shape import ModelShape

EOS = "<|endoftext|>"
_BLOCK_ROWS = 8192


def make_llama(
    folder: Path,
    shape: ModelShape,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer_texts: Iterable[str] | None = None,
    max_shard_size: int | str = ConvertConfig.max_shard_size,
) -> Path:
    """Write a random model of ``shape`` and a byte-level BPE tokenizer of exactly V entries; return ``folder``.

    Weights have the scale of a trained model's: matrices N(0, 1/fan_in), those that write to the residual stream
    divided by sqrt(2L) as GPT-2 does, norms near 1. The same seed, shape and texts give the same bytes.
    HF tables have V rows; ``shape.padded_vocab_size`` is not HF's concern. The folder appears whole or not at all.

    Args:
        tokenizer_texts: what the tokenizer is trained on; CPython's ``pydoc_data.topics`` when None.
    """
    folder = Path(folder)
    shape = shape.replace(padded_vocab_size=shape.vocab_size)
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as made:
        tokenizer = Path(made)
        eos = _write_tokenizer(tokenizer, shape, _topics() if tokenizer_texts is None else tokenizer_texts)
        ids = {"bos_token_id": eos, "eos_token_id": eos}
        config, generation = hf_config_from_shape(shape, dtype) | ids, {"_from_model_config": True} | ids
        with HfWriter(
            folder,
            config,
            shape,
            dtype,
            generation_config=generation,
            tokenizer=tokenizer,
            max_shard_size=max_shard_size,
        ) as writer:
            for parameter in parameters(shape):
                for layer in range(shape.num_layers) if parameter.per_layer else (None,):
                    parts = list(_random_parts(parameter, shape, dtype, generator))
                    writer.write(parameter, fuse(parameter, parts, shape), layer)
    return folder


def _random_parts(
    parameter: Parameter, shape: ModelShape, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    size = parameter.size(shape)
    for name, rows in zip(parameter.hf, hf_part_rows(parameter, shape), strict=True):
        if len(size) == 1:  # norms around one, biases around zero
            noise = torch.randn((rows,), generator=generator)
            yield (noise * 0.1 + (0.0 if name.endswith("bias") else 1.0)).to(dtype)
            continue
        scale = 1 / math.sqrt(shape.hidden_size if parameter in (EMBEDDING, OUTPUT) else size[1])
        if parameter in (PROJ_WEIGHT, FC2_WEIGHT):
            scale /= math.sqrt(2 * shape.num_layers)
        tensor = torch.empty((rows, *size[1:]), dtype=dtype)
        for block in tensor.split(_BLOCK_ROWS):  # a table in float32 would be twice the largest tensor of the file
            block.copy_(torch.randn(block.shape, generator=generator).mul_(scale))
        yield tensor


def _topics() -> list[str]:
    from pydoc_data import topics

    return [topics.topics[key] for key in sorted(topics.topics)]


def _write_tokenizer(folder: Path, shape: ModelShape, texts: Iterable[str]) -> int:
    """Write ``tokenizer.json`` and its two configs; return the id of the end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Below 257 entries not every byte fits: keep those that the texts use most and drop the others when encoding.
    room = shape.vocab_size - 1
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab_size,
        special_tokens=[EOS],
        initial_alphabet=alphabet if room >= len(alphabet) else [],
        limit_alphabet=min(room, len(alphabet)),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    missing = shape.vocab_size - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<|unused_{i}|>" for i in range(missing)])
    if tokenizer.get_vocab_size() != shape.vocab_size:
        raise MinitronError(f"vocab_size {shape.vocab_size}: the tokenizer has {tokenizer.get_vocab_size()} entries")
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": EOS, "eos_token": EOS}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        special
        | {
            "clean_up_tokenization_spaces": False,
            "model_max_length": shape.max_position_embeddings,
            "model_input_names": ["input_ids", "attention_mask"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    return int(tokenizer.token_to_id(EOS))


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
