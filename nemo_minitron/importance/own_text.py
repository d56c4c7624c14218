"""Text that a model writes itself: a sample of what it can do, where calibration data show only a part of it.

Weights that are re-solved on one kind of text alone follow correlations that hold in it and nowhere else, and the
student gets worse than a merely cut one on all other text. A model's own samples, begun with a random token and drawn
at temperature 1, are spread over all that it was trained on and need no data (LLM-QAT, arXiv 2305.17888, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.model import layout
from nemo_minitron.model.decoder import Layer, LayerReader, Rotary, read_head, read_layer, rms_norm
from nemo_minitron.model.shape import ModelShape

LONGEST = 128
"""Tokens of a sample at most; a longer block is filled with several.

Among 64, 128, 256 and 512 the same number of tokens left unlike text nearest to the teacher with 128 (SmolLM2-135M, its
first 8 layers): more samples hold more kinds of text, too short ones little of any.
"""
CACHE_BYTES = 4 << 30
"""Bounds the keys and values of samples that are written together; the same on every machine, as is what is written."""

Told = Callable[[int], None]
"""Is told of every step that was done."""


@torch.no_grad()
def write_blocks(
    reader: LayerReader,
    count: int,
    length: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Told = lambda steps: None,
) -> Tensor:
    """``[count, length]`` int64 tokens of the true vocabulary, on the CPU: blocks of samples of at most
    :data:`LONGEST` tokens, one behind the other.

    The whole model is in memory in ``dtype``, on one process: no grid plays a part in what is written. As many samples
    as :data:`CACHE_BYTES` has room for grow together, token by token, with their keys and values kept. ``progress`` is
    told after each of their :func:`steps`.

    Raises:
        ValueError: no block or no token asked for.
    """
    if count < 1 or length < 1:
        raise ValueError(f"nothing to write: {count} blocks of {length} tokens")
    parts, each = _parts(length)
    model, generator = _Model.read(reader, device, dtype), torch.Generator().manual_seed(seed)
    written = torch.empty(count * parts, each, dtype=torch.int64)
    for some in written.split(_together(reader.shape, each, dtype)):
        model.write(some, generator, progress)
    return written.view(count, -1)[:, :length].contiguous()


def steps(shape: ModelShape, count: int, length: int, dtype: torch.dtype) -> int:
    """Steps in which :func:`write_blocks` writes its blocks."""
    parts, each = _parts(length)
    return -(-count * parts // _together(shape, each, dtype)) * (each - 1)


def _parts(length: int) -> tuple[int, int]:
    """Samples of a block, and tokens of each."""
    parts = -(-length // LONGEST)
    return parts, -(-length // parts)


def _together(shape: ModelShape, length: int, dtype: torch.dtype) -> int:
    """Samples that are written together."""
    numbers = 2 * shape.num_layers * shape.num_query_groups * length * shape.kv_channels
    return max(1, CACHE_BYTES // (numbers * dtype.itemsize))


@dataclass(frozen=True)
class _Model:
    """A whole model.

    Attributes:
        table: ``[V, H]`` embedding. norm: ``[H]`` of the final norm. head: ``[V, H]`` output layer; no padded rows.
    """

    shape: ModelShape
    table: Tensor
    layers: Sequence[Layer]
    norm: Tensor
    head: Tensor

    @classmethod
    def read(cls, reader: LayerReader, device: torch.device | str, dtype: torch.dtype) -> _Model:
        shape = reader.shape
        norm, head = read_head(reader, device, dtype)
        tied = shape.share_embeddings_and_output_weights
        table = head if tied else reader.tensor(layout.EMBEDDING)[: shape.vocab_size].to(device, dtype)
        layers = [read_layer(reader, number, device, dtype) for number in range(shape.num_layers)]
        return cls(shape, table, layers, norm, head)

    def write(self, written: Tensor, generator: torch.Generator, progress: Told) -> None:
        """Fill ``written [n, s]``, token by token."""
        shape, device, dtype = self.shape, self.table.device, self.table.dtype
        count, length = written.shape
        rotary = Rotary.of(shape, length, device)
        size = (shape.num_layers, 2, count, shape.num_query_groups, length, shape.kv_channels)
        kept = torch.empty(size, dtype=dtype, device=device)
        written[:, 0] = torch.randint(shape.vocab_size, (count,), generator=generator)
        for position in range(length - 1):
            x = self.table[written[:, position : position + 1].to(device)]
            for layer, (keys, values) in zip(self.layers, kept, strict=True):
                x = layer.forward_next(x, keys, values, position, rotary)
            logits = rms_norm(x[:, 0], self.norm, shape.layernorm_epsilon) @ self.head.T
            written[:, position + 1] = _draw(logits.float().cpu(), generator)
            progress(1)


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token for each row of ``logits [n, V]``, at temperature 1: ``[n]`` int64.

    Where a uniform number falls among the summed chances; ``torch.multinomial`` draws a number for every word of the
    vocabulary instead, which took longer than the model.
    """
    sums = (logits - logits.amax(dim=-1, keepdim=True)).exp_().cumsum(dim=-1, dtype=torch.float64)
    places = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64) * sums[:, -1:]
    return torch.searchsorted(sums, places, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
