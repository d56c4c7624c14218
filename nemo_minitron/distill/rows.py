r"""Forward and reverse KL and cross entropy in two halves: sums over a token's columns, and the gradient from them.

They serve losses that say by ``Loss.kl`` which of the two they are. :func:`~nemo_minitron.distill.block.block_losses`
has all columns of a token before it at once. Here they may come in pieces, so that the head's gradient can be finished
for some columns after the other (:mod:`.fused`), and each half is one pass over the logits, which on a GPU is one
kernel (:mod:`.kernels`).

Legend: r tokens, v columns of this rank's shard, z the student's and a the teacher's logits, τ the temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distill.block import BlockLosses
from nemo_minitron.distill.loss import Mix
from nemo_minitron.distill.shard import Shard


class Sums(NamedTuple):
    """Sums over one shard's columns; ``values [7, r]`` are, with tops m = max z and m_t = max a of these columns,

    m, m_t, Σ exp((z−m)/τ), Σ exp(z−m), Σ exp((a−m_t)/τ), the cross term (Σ exp((a−m_t)/τ) (a−z)/τ for forward KL,
    Σ exp((z−m)/τ) (z−a)/τ for reverse KL), and z at the label (0 where another rank has it). ``best [2, r]``, int64:
    first column with z = m and with a = m_t.
    """

    values: Tensor
    best: Tensor


class Norms(NamedTuple):
    """What a token's gradient needs beside its logits, ``[r]`` each, over all ranks: log Σ exp(z/τ), log Σ exp(a/τ),
    log Σ exp z, D; and the factors d loss / d D · 1/τ and d loss / d CE."""

    log_s: Tensor
    log_t: Tensor
    log_plain: Tensor
    distance: Tensor
    kd: Tensor
    lm: Tensor


def sums(z: Tensor, a: Tensor | None, column: Tensor, mix: Mix) -> Sums:
    """One pass over ``z [r, v]`` and the teacher's ``a [r, v]`` (None: cross entropy alone); neither is changed.

    ``column [r]`` is the label's column here, outside of [0, v) where another rank has it.
    """
    rows, width = z.shape
    values = z.new_zeros(7, rows)
    best = torch.zeros(2, rows, dtype=torch.int64, device=z.device)
    values[:2] = -torch.inf
    if not width:
        return Sums(values, best)
    values[0], best[0] = z.max(-1)
    tau = mix.temperature
    shifted = z - values[0].unsqueeze(-1)
    values[3] = shifted.exp().sum(-1)
    e = shifted.div_(tau).exp_()
    values[2] = e.sum(-1)
    here = (column >= 0) & (column < width)
    values[6] = z.gather(-1, column.clamp(0, width - 1).unsqueeze(-1)).squeeze(-1).where(here, 0.0)
    if a is not None:
        values[1], best[1] = a.max(-1)
        e_t = (a - values[1].unsqueeze(-1)).div_(tau).exp_()
        values[4] = e_t.sum(-1)
        difference = (a - z).div_(tau)
        values[5] = e_t.mul_(difference).sum(-1) if mix.divergence.kl == "forward" else -e.mul_(difference).sum(-1)
    return Sums(values, best)


def combine(found: Sums, weights: Tensor, mix: Mix, shard: Shard, teacher: bool) -> tuple[BlockLosses, Norms]:
    """Over the ranks of the shard's group: two reductions of a few numbers per token.

    ``weights [r]`` as for ``block_losses``. Where several tokens are the likeliest, the first one counts.
    """
    tau, values = mix.temperature, found.values.double()
    tops = parallel.all_reduce(values[:2], shard.group, op="max")
    apart = values[:2] - tops  # −inf on a rank that has no columns
    apart = torch.where(torch.isneginf(values[:2]), -torch.inf, apart)
    scale_s, scale_t = (apart / tau).exp()
    of_cross = scale_t if mix.divergence.kl == "forward" else scale_s
    z_s, plain, z_t, cross, label = parallel.all_reduce(
        torch.stack([values[2] * scale_s, values[3] * apart[0].exp(), values[4] * scale_t, values[5] * of_cross,
                     values[6]]), shard.group,
    ).unbind()  # fmt: skip
    log_s, log_plain = tops[0] / tau + z_s.log(), tops[0] + plain.log()
    lm = log_plain - label
    distance, log_t, agree = (torch.zeros_like(lm) for _ in range(3))
    if teacher:
        log_t = tops[1] / tau + z_t.log()
        distance = cross / z_t - log_t + log_s if mix.divergence.kl == "forward" else cross / z_s - log_s + log_t
        ids = torch.where(apart == 0, found.best + shard.start, torch.iinfo(torch.int64).max)
        ids = parallel.all_reduce(ids, shard.group, op="min")
        agree = (ids[0] == ids[1]).double()
    weights = weights.double()
    slopes = (mix.kd_weight * tau * weights if teacher else torch.zeros_like(lm)), mix.lm_weight * weights
    norms = (x.to(found.values.dtype) for x in (log_s, log_t, log_plain, distance, *slopes))
    return BlockLosses(tau**2 * distance, lm, agree), Norms(*norms)


def slope_(z: Tensor, a: Tensor | None, column: Tensor, norms: Norms, mix: Mix) -> Tensor:
    """Turn ``z [r, v]`` into d Σ weights·L / dz; ``a [r, v]`` is overwritten. Exactly 0 for KL where both are equal."""
    tau = mix.temperature
    log_s, log_t, log_plain, distance, kd, lm = (x.unsqueeze(-1) for x in norms)
    plain = (z - log_plain).exp_().mul_(lm) if mix.lm_weight else None
    if a is None:
        z.zero_()
    elif mix.divergence.kl == "forward":
        z.div_(tau).sub_(log_s).exp_().sub_(a.div_(tau).sub_(log_t).exp_()).mul_(kd)
    else:
        z.div_(tau).sub_(log_s)
        a.div_(tau).sub_(log_t)
        torch.sub(z, a, out=a).sub_(distance)
        z.exp_().mul_(a).mul_(kd)
    if plain is not None:
        z.add_(plain)
        here = (column >= 0) & (column < z.shape[1])
        if z.shape[1]:
            z.scatter_add_(-1, column.clamp(0, z.shape[1] - 1).unsqueeze(-1), -lm.where(here.unsqueeze(-1), 0.0))
    return z
