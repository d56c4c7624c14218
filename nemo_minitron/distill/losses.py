r"""Distillation losses of a block of tokens, on logits that stay sharded over the vocabulary.

``L = w_kd · τ² · D(teacher, student) + w_lm · CE`` per token (Hinton et al., arXiv 1503.02531; Minitron, arXiv
2408.11796 section 3), with q and p the teacher's and the student's softmax at temperature τ and D one of

==========  ==========================================================================================
forward_kl  KL(q ‖ p)
reverse_kl  KL(p ‖ q) (MiniLLM, arXiv 2306.08543)
jsd         β KL(q ‖ m) + (1−β) KL(p ‖ m), m = β q + (1−β) p (GKD, arXiv 2306.13649)
topk        KL(q ‖ p) over the teacher's k likeliest tokens and one bucket for all others, so that both sides
            remain distributions: nothing is renormalised away
==========  ==========================================================================================

Legend: r tokens of the block, v columns of this rank's shard (true vocabulary only), K tokens kept by ``topk``.
:func:`block_losses` turns the student's logits into the gradient in place; maxima and sums are reduced over the
tensor-parallel group, logits never travel. Sums per token are combined in float64, columns stay in the logits' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.errors import MinitronError

KINDS = ("forward_kl", "reverse_kl", "jsd", "topk")


@dataclass(frozen=True)
class Mix:
    """What is minimised: the config's ``distill`` section as far as it concerns logits.

    Raises:
        MinitronError: a value that is out of range or unknown, or nothing to learn from.
    """

    loss: str = "forward_kl"
    temperature: float = 1.0
    kd_weight: float = 1.0
    lm_weight: float = 0.0
    jsd_beta: float = 0.5
    top_k: int = 64

    def __post_init__(self) -> None:
        if self.loss not in KINDS:
            raise MinitronError(f"distill.loss must be one of {', '.join(KINDS)}, found {self.loss!r}")
        if self.temperature <= 0.0:
            raise MinitronError(f"distill.temperature must be positive, found {self.temperature}")
        if self.kd_weight == 0.0 and self.lm_weight == 0.0:
            raise MinitronError("distill.kd_weight and distill.lm_weight are both 0: there is nothing to learn from")
        if not 0.0 < self.jsd_beta < 1.0:
            raise MinitronError(
                f"distill.jsd_beta must lie between 0 and 1, found {self.jsd_beta}; its limits are "
                "distill.loss=forward_kl (0) and distill.loss=reverse_kl (1)"
            )
        if self.top_k < 1:
            raise MinitronError(f"distill.top_k must be at least 1, found {self.top_k}")


CROSS_ENTROPY = Mix(kd_weight=0.0, lm_weight=1.0)


class TopK(NamedTuple):
    """A teacher's distribution at the mix's temperature, of which only the head is known.

    ``log_probs [r, K]`` of the K likeliest tokens, the likeliest first; ``tokens [r, K]`` their global ids;
    ``log_tail [r]`` the log-probability of all other tokens together, −inf where there are none.
    """

    log_probs: Tensor
    tokens: Tensor
    log_tail: Tensor

    def rows(self, rows: slice) -> TopK:
        """The same for some of the tokens."""
        return TopK(self.log_probs[rows], self.tokens[rows], self.log_tail[rows])


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


class BlockLosses(NamedTuple):
    """Per token ``[r]``, float64: τ²·D, cross entropy at temperature 1, and 1 where both sides' likeliest token is
    the same."""

    kd: Tensor
    lm: Tensor
    agree: Tensor


def block_losses(
    z: Tensor,
    teacher: Tensor | TopK | None,
    labels: Tensor,
    weights: Tensor,
    mix: Mix,
    shard: Shard,
    *,
    gradient: bool = True,
) -> BlockLosses:
    """Losses of r tokens; ``z`` is overwritten by d Σ weights·L / dz (by anything without ``gradient``).

    Args:
        z: ``[r, v]`` the student's logits, float32 or float64, without padded columns; v may be 0 on some ranks.
        teacher: ``[r, v]`` logits of the same columns, overwritten; a :class:`TopK`; or None for cross entropy alone.
        labels: ``[r]`` global token ids.
        weights: ``[r]`` weight of each token in the total.
    """
    tau, width = mix.temperature, z.shape[1]
    logits = teacher if isinstance(teacher, Tensor) else None
    tops = parallel.all_reduce(torch.stack([_top(x) for x in (z, logits) if x is not None]), shard.group, op="max")
    z.sub_(tops[0].unsqueeze(-1))
    column, ours = shard.columns(labels.unsqueeze(-1), width)
    extra = [_gather(z, column, ours).squeeze(-1)]  # what the losses below reduce along with their own sums

    if teacher is None:
        total, label = shard.sums(z.exp_().sum(-1), *extra)
        if gradient:
            _scatter_add(z.mul_((mix.lm_weight * weights / total).to(z.dtype).unsqueeze(-1)), column, ours,
                         -mix.lm_weight * weights)  # fmt: skip
        zero = torch.zeros_like(total)
        return BlockLosses(zero, total.log() - label, zero)

    if logits is not None:
        logits.sub_(tops[1].unsqueeze(-1))
        extra.append((z + logits).amax(-1).eq(0).to(z.dtype) if width else z.new_zeros(z.shape[0]))
    else:
        best, here = shard.columns(teacher.tokens[:, :1], width)  # type: ignore[index, union-attr]
        extra.append((_gather(z, best, here).eq(0) & here).squeeze(-1).to(z.dtype))
    plain: Tensor | None = None  # exp(z) at temperature 1, where the one at τ does not serve
    if tau != 1.0 or (mix.lm_weight and gradient):
        plain = z.exp()
        extra.append(plain.sum(-1))
    if tau != 1.0:
        z.div_(tau)
        if logits is not None:
            logits.div_(tau)

    kd, at_tau, extra, slope = _KINDS[mix.loss if logits is not None else "topk"](z, teacher, extra, mix, shard)
    label, agree, total = extra if plain is not None else (*extra, at_tau)
    if gradient:
        if mix.kd_weight:
            slope().mul_((mix.kd_weight * tau * weights).to(z.dtype).unsqueeze(-1))
        else:
            z.zero_()
        if plain is not None and mix.lm_weight:
            z.add_(plain.mul_((mix.lm_weight * weights / total).to(z.dtype).unsqueeze(-1)))
            _scatter_add(z, column, ours, -mix.lm_weight * weights)
    return BlockLosses(tau**2 * kd, total.log() - label, (agree > 0).double())


def teacher_top_k(z: Tensor, k: int, temperature: float, shard: Shard) -> TopK:
    """The head of softmax(z/τ) from sharded logits ``z [r, v]``, which are overwritten; the same on every rank."""
    z.sub_(parallel.all_reduce(_top(z), shard.group, op="max").unsqueeze(-1)).div_(temperature)
    return _top_k(z, k, shard)


# ---- the divergences: student b, teacher a, both shifted to a maximum of 0 and divided by τ -------------------------
# Each returns D [r], Z_student [r], the reduced extras, and a function that turns b into dD/db in place.

Found = tuple[Tensor, Tensor, list[Tensor], Callable[[], Tensor]]


def _forward_kl(b: Tensor, a: Tensor, extra: list[Tensor], mix: Mix, shard: Shard) -> Found:
    q = a.exp()
    distance = a.sub_(b).mul_(q).sum(-1)
    p = b.exp_()
    distance, z_t, z_s, *extra = shard.sums(distance, q.sum(-1), p.sum(-1), *extra)

    def slope() -> Tensor:  # p/Z_s − q/Z_t, exactly 0 where both are equal
        return p.mul_(_column(1 / z_s, p)).sub_(q.mul_(_column(1 / z_t, q)))

    return distance / z_t + (z_s.log() - z_t.log()), z_s, extra, slope


def _reverse_kl(b: Tensor, a: Tensor, extra: list[Tensor], mix: Mix, shard: Shard) -> Found:
    z_t = a.exp().sum(-1)
    p = b.exp()
    b.sub_(a)
    distance, z_t, z_s, *extra = shard.sums(torch.mul(p, b, out=a).sum(-1), z_t, p.sum(-1), *extra)

    def slope() -> Tensor:
        return b.sub_(_column(distance / z_s, b)).mul_(p).mul_(_column(1 / z_s, b))

    return distance / z_s + (z_t.log() - z_s.log()), z_s, extra, slope


def _jsd(b: Tensor, a: Tensor, extra: list[Tensor], mix: Mix, shard: Shard) -> Found:
    """With d = log q − log p: log(p/m) = −log(β eᵈ + 1 − β), written so that nothing overflows and d = 0 gives 0."""
    beta = mix.jsd_beta
    z_t, z_s, *extra = shard.sums(a.exp().sum(-1), b.exp().sum(-1), *extra)
    a.sub_(_column(z_t.log(), a))
    b.sub_(_column(z_s.log(), b))
    p, q = b.exp(), a.exp()
    d = a.sub_(b)
    weight = (d > 0).to(d.dtype).mul_(1.0 - 2.0 * beta).add_(beta)  # 1 − β where d > 0, β elsewhere
    shared = d.abs().neg_().expm1_().mul_(weight).log1p_().neg_()  # log(q/m) where d > 0, log(p/m) elsewhere
    log_p_m = shared - d.clamp(min=0.0)
    log_q_m = d.add_(log_p_m)
    of_q, of_p = shard.sums(log_q_m.mul_(q).sum(-1), torch.mul(p, log_p_m, out=b).sum(-1))

    def slope() -> Tensor:
        return b.sub_(p.mul_(_column(of_p, p))).mul_(1.0 - beta)

    return beta * of_q + (1.0 - beta) * of_p, z_s, extra, slope


def _topk(b: Tensor, teacher: Tensor | TopK, extra: list[Tensor], mix: Mix, shard: Shard) -> Found:
    known = teacher if isinstance(teacher, TopK) else _top_k(teacher, mix.top_k, shard)
    column, ours = shard.columns(known.tokens, b.shape[1])
    chosen = parallel.all_reduce(_gather(b, column, ours), shard.group).double()
    p = b.exp_()
    _keep(p, column, ~ours)  # what is left is the tail
    tail, *extra = shard.sums(p.sum(-1), *extra)
    z_s = tail + chosen.exp().sum(-1)
    log_q, log_p = known.log_probs.double(), chosen - z_s.log().unsqueeze(-1)
    log_q_tail, log_p_tail = known.log_tail.double(), tail.clamp(min=torch.finfo(b.dtype).tiny).log() - z_s.log()
    q_tail = log_q_tail.exp()
    in_tail = torch.where(q_tail > 0, q_tail * (log_q_tail - log_p_tail), 0.0)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1) + in_tail

    def slope() -> Tensor:
        p.mul_(_column((1.0 - (log_q_tail - log_p_tail).exp()) / z_s, p))
        difference = (log_p.exp() - log_q.exp()).to(p.dtype)
        return _scatter_add(p, column, ours, difference)

    return kl, z_s, extra, slope


_KINDS: dict[str, Callable[[Tensor, Tensor | TopK, list[Tensor], Mix, Shard], Found]] = {
    "forward_kl": _forward_kl,  # type: ignore[dict-item]
    "reverse_kl": _reverse_kl,  # type: ignore[dict-item]
    "jsd": _jsd,  # type: ignore[dict-item]
    "topk": _topk,
}


def _top_k(a: Tensor, k: int, shard: Shard) -> TopK:
    """Of logits whose global maximum is 0; ``a [r, v]`` is overwritten."""
    rows, width = a.shape
    k = min(k, shard.vocab_size)
    value, index = a.topk(min(k, width), dim=-1)
    if parallel.size(shard.group) > 1:
        pad = k - value.shape[1]
        value = torch.cat([value, value.new_full((rows, pad), -math.inf)], -1)
        index = torch.cat([index + shard.start, index.new_full((rows, pad), -1)], -1)
        value = parallel.all_gather(value, shard.group, dim=-1)
        index = parallel.all_gather(index, shard.group, dim=-1)
        value, order = value.topk(k, dim=-1)
        index = index.gather(-1, order)
    column, ours = shard.columns(index, width)
    _keep(a.exp_(), column, ~ours)
    (tail,) = shard.sums(a.sum(-1))
    value = value.double()
    log_z = (tail + value.exp().sum(-1)).log()
    return TopK(value - log_z.unsqueeze(-1), index, tail.clamp(min=0.0).log() - log_z)


# ---- columns that another rank may have ------------------------------------------------------------------------------


def _top(z: Tensor) -> Tensor:
    """Maximum of each row ``[r]``; −inf of none."""
    return z.amax(-1) if z.shape[1] else z.new_full((z.shape[0],), -math.inf)


def _column(rows: Tensor, like: Tensor) -> Tensor:
    return rows.to(like.dtype).unsqueeze(-1)


def _gather(z: Tensor, column: Tensor, ours: Tensor) -> Tensor:
    """``z`` at some columns of each row, 0 where another rank has them."""
    return z.gather(-1, column).where(ours, 0.0) if z.shape[1] else z.new_zeros(column.shape)


def _keep(z: Tensor, column: Tensor, where: Tensor) -> None:
    """Zero the columns where ``where`` is False; those that only stand for another rank's remain."""
    if z.shape[1]:
        z.scatter_reduce_(-1, column, where.to(z.dtype), "prod")


def _scatter_add(z: Tensor, column: Tensor, ours: Tensor, value: Tensor) -> Tensor:
    if z.shape[1]:
        value = value.unsqueeze(-1) if value.dim() == 1 else value
        z.scatter_add_(-1, column, value.to(z.dtype).where(ours, 0.0))
    return z
