r"""Losses of a block of tokens and their gradient, from logits that stay sharded over the vocabulary.

:func:`block_losses` adds to a divergence (:mod:`nemo_minitron.distill.loss`) what all of them share: the shift by each
row's maximum, the temperature, cross entropy, the weights and the share of tokens on which both sides agree. It turns
the student's logits into the gradient in place; maxima and sums are reduced over the tensor-parallel group, logits
never travel. Sums per token are combined in float64, columns stay in the logits' dtype.

Legend: r tokens of the block, v columns of this rank's shard (true vocabulary only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distill.loss import Divergence, Mix, Reduction
from nemo_minitron.distill.sampled import Sampled
from nemo_minitron.distill.shard import Shard, gather, scatter_add, top
from nemo_minitron.distill.top_k import TopK

CROSS_ENTROPY = Mix(kd_weight=0.0, lm_weight=1.0)


class BlockLosses(NamedTuple):
    """Per token ``[r]``, float64: τ²·D, cross entropy at temperature 1, and 1 where both sides' likeliest token is
    the same."""

    kd: Tensor
    lm: Tensor
    agree: Tensor


@dataclass
class _Labels:
    """Where the label of each token is: ``column [r, 1]`` of this shard, and ``ours``, whether it is here."""

    column: Tensor
    ours: Tensor

    def add_slope(self, z: Tensor, plain: Tensor, total: Tensor, weights: Tensor) -> None:
        """Add the gradient of Σ weights·CE to ``z [r, v]``; ``plain``, exp of the student's logits, is overwritten."""
        scaled = plain.mul_((weights / total).to(z.dtype).unsqueeze(-1))
        if z is not plain:
            z.add_(scaled)
        scatter_add(z, self.column, self.ours, -weights)


def block_losses(
    z: Tensor,
    teacher: Tensor | TopK | Sampled | None,
    labels: Tensor,
    weights: Tensor,
    mix: Mix,
    shard: Shard,
    *,
    gradient: bool = True,
) -> BlockLosses:
    """Losses of r tokens; ``z`` is overwritten by d Σ weights·L / dz (by anything without ``gradient``).

    Collectives: one for the maxima, and those of the divergence; without a teacher one for the sums.

    Args:
        z: ``[r, v]`` the student's logits, float32 or float64, without padded columns; v may be 0 on some ranks.
        teacher: ``[r, v]`` logits of the same columns, overwritten; a :class:`TopK` or
            :class:`Sampled`; or None for cross entropy alone.
        labels: ``[r]`` global token ids.
        weights: ``[r]`` weight of each token in the total.
    """
    tau = mix.temperature
    logits = teacher if isinstance(teacher, Tensor) else None
    tops = parallel.all_reduce(torch.stack([top(x) for x in (z, logits) if x is not None]), shard.group, op="max")
    z.sub_(tops[0].unsqueeze(-1))
    if logits is not None:
        logits.sub_(tops[1].unsqueeze(-1))
    label = _Labels(*shard.columns(labels.unsqueeze(-1), z.shape[1]))
    waiting = [gather(z, label.column, label.ours).squeeze(-1)]
    if teacher is None:
        total, at_label = shard.sums(z.exp_().sum(-1), *waiting)
        if gradient:
            label.add_slope(z, z, total, mix.lm_weight * weights)
        return BlockLosses(torch.zeros_like(total), total.log() - at_label, torch.zeros_like(total))

    waiting.append(_same_top(z, teacher, shard))
    plain: Tensor | None = None  # exp(z) at temperature 1, where the one at τ does not serve
    if tau != 1.0 or (mix.lm_weight and gradient):
        plain = z.exp()
        waiting.append(plain.sum(-1))
    if tau != 1.0:
        z.div_(tau)
        if logits is not None:
            logits.div_(tau)
    reduction = Reduction(shard, waiting)
    if isinstance(teacher, (TopK, Sampled)):
        found = mix.divergence.of_answers(z, teacher, mix, reduction)
    else:
        found = mix.divergence.of_logits(z, teacher, mix, reduction)
    at_label, agree, *plain_total = reduction.rest()
    total = plain_total[0] if plain_total else found.total
    if gradient:
        _distance_slope_(z, found, mix, weights)
        if plain is not None and mix.lm_weight:
            label.add_slope(z, plain, total, mix.lm_weight * weights)
    return BlockLosses(tau**2 * found.distance, total.log() - at_label, (agree > 0).double())


def _same_top(z: Tensor, teacher: Tensor | TopK | Sampled, shard: Shard) -> Tensor:
    """``[r]``, above 0 where a column of this rank is the likeliest on both sides; logits have a maximum of 0.

    Of tokens that were drawn, the likeliest is among them where its probability is at least 1/K; elsewhere another one
    may stand for it, which hardly ever agrees.
    """
    width = z.shape[1]
    if isinstance(teacher, Tensor):
        return (z + teacher).amax(-1).eq(0).to(z.dtype) if width else z.new_zeros(z.shape[0])
    first = teacher.tokens[:, :1]
    if isinstance(teacher, Sampled):
        first = teacher.tokens.gather(-1, teacher.log_probs.argmax(-1, keepdim=True))
    best, here = shard.columns(first, width)
    return (gather(z, best, here).eq(0) & here).squeeze(-1).to(z.dtype)


def _distance_slope_(z: Tensor, found: Divergence, mix: Mix, weights: Tensor) -> None:
    """Overwrite ``z [r, v]`` by the gradient of Σ weights·w_kd·τ²·D; the inner 1/τ leaves one τ of the two."""
    if not mix.kd_weight:
        z.zero_()
        return
    slope = found.slope()
    if slope is not z:
        z.copy_(slope)
    z.mul_((mix.kd_weight * mix.temperature * weights).to(z.dtype).unsqueeze(-1))
