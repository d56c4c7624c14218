"""Columns of a vocabulary that is split over the tensor-parallel group: where they lie, and what is on another rank.

Legend: r tokens, v columns of this rank's shard (true vocabulary only; 0 on a rank that has padding alone).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_minitron import parallel


class Shard(NamedTuple):
    """Where this rank's columns lie: the true vocabulary's size, the global id of the first column here, and the
    tensor-parallel group (None: all columns are here)."""

    vocab_size: int
    start: int = 0
    group: parallel.Group = None

    def width(self, rows: int) -> int:
        """Columns of the true vocabulary among the ``rows`` rows of this rank's head weight; the rest is padding."""
        return max(0, min(rows, self.vocab_size - self.start))

    def sums(self, *rows: Tensor) -> list[Tensor]:
        """Each ``[r]`` summed over the group, in float64; one collective."""
        return list(parallel.all_reduce(torch.stack(rows), self.group).double().unbind())

    def columns(self, index: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Local columns of global ids (some column where another rank has it), and 1 where they are ours, else 0."""
        local = index - self.start
        return local.clamp(0, max(width - 1, 0)), (local >= 0) & (local < width)


def top(z: Tensor) -> Tensor:
    """Maximum of each row ``[r]`` of ``z [r, v]``; −inf where there are no columns."""
    return z.amax(-1) if z.shape[1] else z.new_full((z.shape[0],), -math.inf)


def likeliest(z: Tensor, k: int, shard: Shard) -> tuple[Tensor, Tensor]:
    """The k largest of ``z [r, v]`` over all ranks and their global ids, ``[r, k]`` each, the largest first; the same
    on every rank. k is at most the vocabulary's size."""
    value, index = z.topk(min(k, z.shape[1]), dim=-1)
    index = index + shard.start
    if parallel.size(shard.group) > 1:
        pad = (len(z), k - value.shape[1])
        value = torch.cat([value, value.new_full(pad, -math.inf)], -1)
        index = torch.cat([index, index.new_full(pad, -1)], -1)
        value = parallel.all_gather(value, shard.group, dim=-1)
        index = parallel.all_gather(index, shard.group, dim=-1)
        value, order = value.topk(k, dim=-1)
        index = index.gather(-1, order)
    return value, index


def column_of(values: Tensor, like: Tensor) -> Tensor:
    """One value per token, ``[r]``, as a column ``[r, 1]`` in the dtype of ``like [r, v]``."""
    return values.to(like.dtype).unsqueeze(-1)


def gather(z: Tensor, column: Tensor, ours: Tensor) -> Tensor:
    """``z [r, v]`` at some columns ``[r, k]`` of each row, 0 where another rank has them."""
    return z.gather(-1, column).where(ours, 0.0) if z.shape[1] else z.new_zeros(column.shape)


def keep(z: Tensor, column: Tensor, where: Tensor) -> None:
    """Zero the columns where ``where`` is False; those that only stand for another rank's remain."""
    if z.shape[1]:
        z.scatter_reduce_(-1, column, where.to(z.dtype), "prod")


def scatter_add(z: Tensor, column: Tensor, ours: Tensor, value: Tensor) -> Tensor:
    """Add ``value [r]`` or ``[r, k]`` to ``z [r, v]`` in place at the columns that are ours; returns ``z``."""
    if z.shape[1]:
        value = value.unsqueeze(-1) if value.dim() == 1 else value
        z.scatter_add_(-1, column, value.to(z.dtype).where(ours, 0.0))
    return z
