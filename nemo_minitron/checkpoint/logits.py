"""Equality of a checkpoint's logits with those that transformers computes of its HF folder or GGUF file.

One side is transformers' own model, built from its own reading of ``config.json`` and the weights. The other is a walk
over canonical tensors in plain torch (:mod:`nemo_minitron.model.decoder`), one layer in memory at a time, which knows
neither transformers nor NeMo. Both are in float32 on the CPU.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_minitron.checkpoint.tokenizer_open import foreign
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.decoder import LayerReader, Rotary, read_head, read_layer, rms_norm
from nemo_minitron.model.layout import EMBEDDING
from nemo_minitron.model.parameter import Parameter
from nemo_minitron.model.shape import ModelShape

TOLERANCE = 1e-4
"""Largest difference of two logits, relative to the largest logit where that is above 1."""
_TOKENS = 128


@dataclass(frozen=True)
class _Cast:
    """A checkpoint's tensors as they are once they are stored in ``dtype``."""

    reader: LayerReader
    dtype: torch.dtype

    @property
    def shape(self) -> ModelShape:
        return self.reader.shape

    def tensor(self, parameter: Parameter, layer: int | None = None) -> Tensor:
        return self.reader.tensor(parameter, layer).to(self.dtype)


def prompt(vocab_size: int, length: int) -> Tensor:
    """Ids ``[1, s]`` drawn over the whole vocabulary, at most ``length`` of them; the same for every model."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (1, min(_TOKENS, length)), generator=generator)


def needed_bytes(shape: ModelShape) -> int:
    """Memory that the comparison takes at most: transformers' model in float32, one more of its tables, both logits."""
    table = shape.vocab_size * shape.hidden_size
    return 4 * (shape.num_parameters() + table + 3 * _TOKENS * shape.vocab_size)


def check_memory(shape: ModelShape) -> None:
    """Refuse a model that transformers cannot hold in float32 here, before any work.

    Raises:
        MinitronError: saying how much is needed and there.
    """
    needed, there = needed_bytes(shape), available_bytes()
    if needed > there:
        raise MinitronError(
            f"verify=logits needs about {needed / 2**30:.1f} GiB of memory for transformers' model in float32, found "
            f"{there / 2**30:.1f} GiB; verify=true compares every tensor without it"
        )


def available_bytes() -> int:
    """Memory that this process may still take: the machine's, or its control group's where that is less."""
    found = [1 << 62]
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) << 10)
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        numbers = ["".join(_lines(group / name)[:1]) for name in (limit, used)]
        if all(number.isdigit() for number in numbers):
            found.append(int(numbers[0]) - int(numbers[1]))
    return min(found)


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


@torch.no_grad()
def walk(reader: LayerReader, tokens: Tensor) -> Tensor:
    """Logits ``[s, V]`` float32 of ids ``[1, s]``, from canonical tensors."""
    shape = reader.shape
    x = F.embedding(tokens, reader.tensor(EMBEDDING)).float()
    rotary = Rotary.of(shape, tokens.shape[1])
    for layer in range(shape.num_layers):
        x = read_layer(reader, layer).forward(x, rotary)
    norm, head = read_head(reader)
    return F.linear(rms_norm(x[0], norm, shape.layernorm_epsilon), head)


@torch.no_grad()
def of_transformers(path: Path, tokens: Tensor, dtype: torch.dtype, tied: bool) -> Tensor:
    """Logits ``[s, V]`` float32 that transformers computes of a HF folder or a GGUF file, its weights rounded to
    ``dtype`` first.

    Args:
        tied: whether the head is the table; by request a config that says so is not believed.

    Raises:
        MinitronError: it does not load there. No code of the folder is run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, object] = {"local_files_only": True}
    ggufs = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    folder = path
    if not (path / "config.json").is_file() and ggufs:
        folder, options["gguf_file"] = ggufs[0].parent, ggufs[0].name
    with foreign(f"{path}: verify=logits: expected a model that transformers loads"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
        if config.tie_word_embeddings and not tied:
            config.tie_word_embeddings = False
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, torch_dtype=torch.float32, trust_remote_code=False, **options
        )
        for weight in model.parameters():
            weight.copy_(weight.to(dtype))
        logits: Tensor = model.eval()(tokens).logits[0].float()
    del model
    gc.collect()
    return logits


def compare_logits(ours: LayerReader, theirs: Path, dtype: torch.dtype, vocab_size: int) -> tuple[float, float]:
    """Largest difference of ``ours``, stored in ``dtype``, from transformers' logits of ``theirs``, and largest logit.

    Args:
        vocab_size: tokens that both have; others, by which a vocabulary was grown, are left out.

    Raises:
        MinitronError: a difference above :data:`TOLERANCE`, or logits that are not finite.
    """
    tokens = prompt(vocab_size, ours.shape.max_position_embeddings)
    expected = of_transformers(theirs, tokens, dtype, ours.shape.share_embeddings_and_output_weights)
    found = walk(_Cast(ours, dtype), tokens)
    difference = float((found[:, :vocab_size] - expected[:, :vocab_size]).abs().max())
    largest = float(expected.abs().max())
    if not difference <= TOLERANCE * max(1.0, largest):
        raise MinitronError(
            f"verify=logits: logits must be those that transformers computes of {theirs}, to {TOLERANCE:g} of the "
            f"largest, {largest:.4g}; found a difference of {difference:.3g}"
        )
    return difference, largest
