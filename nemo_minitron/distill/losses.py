r"""Cross entropy and distillation losses on logits that stay sharded over the vocabulary.

``L = w_kd · τ² · KL(softmax(z_t/τ) ‖ softmax(z_s/τ)) + w_lm · CE`` per token (Hinton et al., arXiv 1503.02531;
Minitron, arXiv 2408.11796 section 3). Maxima, sums and losses are reduced over the tensor-parallel group; logits are
never gathered. Vocabulary rows at and past the true vocabulary are padding: they take no part in either softmax.

Every function works over chunks of tokens, so that its temporaries stay near :data:`CHUNK_BYTES` whatever the number
of tokens, and produces the gradient with respect to the student's logits in the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.errors import MinitronError

CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class TokenLosses:
    """Per-token results ``[b, s]``: ``loss`` carries the gradient, ``terms`` are named, detached parts of it."""

    loss: Tensor
    terms: dict[str, Tensor]


def cross_entropy_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    vocab_start: int = 0,
    group: torch.distributed.ProcessGroup | None = None,
) -> TokenLosses:
    """Next-token cross entropy in nats.

    Args:
        logits: ``[b, s, Vp/tp]``, any float dtype; computed in float32 (float64 stays float64).
        labels: ``[b, s]`` global token ids below ``vocab_size``.
        vocab_size: true vocabulary V; columns from V on are ignored.
        vocab_start: global id of this rank's first column.
        group: tensor-parallel group, None for one process.
    """
    loss, lm, _, _ = _Losses.apply(logits, None, labels, 1.0, 0.0, 1.0, vocab_size, vocab_start, group)
    return TokenLosses(loss, {"loss": loss.detach(), "lm_loss": lm})


def distillation_losses(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    lm_weight: float = 0.0,
    vocab_size: int,
    vocab_start: int = 0,
    group: torch.distributed.ProcessGroup | None = None,
) -> TokenLosses:
    """Forward KL from teacher to student at ``temperature``, mixed with cross entropy.

    Args:
        student: ``[b, s, Vp/tp]`` logits that receive the gradient.
        teacher: ``[b, s, Vp_t/tp]`` logits of the same true vocabulary, no gradient. Its padding may differ in
            length only where one rank holds the whole vocabulary.
        labels: ``[b, s]`` token ids.

    Terms: ``loss``; ``kd_loss`` = τ²·KL; ``lm_loss`` = CE at temperature 1; ``top1_agreement`` = 1 where both argmaxes
    are the same token.

    Raises:
        MinitronError: temperature not positive, or both weights zero.
    """
    if temperature <= 0.0:
        raise MinitronError(f"distill.temperature must be positive, found {temperature}")
    if kd_weight == 0.0 and lm_weight == 0.0:
        raise MinitronError("distill.kd_weight and distill.lm_weight are both 0: there is nothing to learn from")
    loss, lm, kd, agree = _Losses.apply(
        student, teacher, labels, temperature, kd_weight, lm_weight, vocab_size, vocab_start, group
    )
    return TokenLosses(loss, {"loss": loss.detach(), "kd_loss": kd, "lm_loss": lm, "top1_agreement": agree})


def _log_softmax(z: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """Log-probabilities ``[n, v]`` of a shard's columns under the softmax over the whole vocabulary.

    A rank whose columns are all padding has v = 0 and only takes part in the reductions.
    """
    top = z.amax(dim=-1, keepdim=True) if z.shape[-1] else z.new_full((z.shape[0], 1), -torch.inf)
    top = parallel.all_reduce(top, group, op="max")
    total = parallel.all_reduce((z - top).exp_().sum(dim=-1, keepdim=True), group)
    return z - top - total.log()


def _argmax(z: Tensor, vocab_start: int, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """Global index of each row's maximum ``[n]``; the lowest index where several are equal."""
    if z.shape[-1]:
        value, index = z.max(dim=-1)
        index = index + vocab_start
    else:
        value = z.new_full((z.shape[0],), -torch.inf)
        index = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
    best = parallel.all_reduce(value, group, op="max")
    index = index.masked_fill(value != best, torch.iinfo(torch.int64).max)
    return parallel.all_reduce(index, group, op="min")


class _Losses(torch.autograd.Function):
    """Per-token losses and, in the same pass, d loss / d student logits.

    d/dz_s [τ² KL] = τ (p_s^τ − p_t^τ); d/dz_s CE = p_s − onehot(label).
    """

    @staticmethod
    def forward(
        ctx,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        temperature: float,
        kd_weight: float,
        lm_weight: float,
        vocab_size: int,
        vocab_start: int,
        group: torch.distributed.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape, width = labels.shape, student.shape[-1]
        flat_s, flat_l = student.reshape(-1, width), labels.reshape(-1)
        flat_t = None if teacher is None else teacher.reshape(-1, teacher.shape[-1])
        real = max(0, min(width, vocab_size - vocab_start))
        compute = torch.float64 if student.dtype == torch.float64 else torch.float32
        grad = torch.zeros_like(flat_s) if ctx.needs_input_grad[0] else None
        out = torch.zeros(4, flat_s.shape[0], dtype=compute, device=student.device)
        step = max(1, CHUNK_BYTES // max(1, width * 4))
        for start in range(0, flat_s.shape[0], step):
            rows = slice(start, start + step)
            z_s = flat_s[rows, :real].to(compute)
            label = flat_l[rows] - vocab_start
            mine = (label >= 0) & (label < real)
            column = label.clamp(0, max(real - 1, 0)).unsqueeze(-1)
            log_p = _log_softmax(z_s, group)
            picked = z_s.new_zeros(z_s.shape[0], 1)
            if real:
                picked = torch.where(mine.unsqueeze(-1), log_p.gather(-1, column), picked)
            out[1, rows] = -parallel.all_reduce(picked, group).squeeze(-1)
            total_grad: Tensor | None = None
            if flat_t is not None:
                z_t = flat_t[rows, :real].to(compute)
                log_q = _log_softmax(z_t / temperature, group)
                log_p_tau = log_p if temperature == 1.0 else _log_softmax(z_s / temperature, group)
                q = log_q.exp()
                kl = parallel.all_reduce((q * (log_q - log_p_tau)).sum(-1), group)
                out[2, rows] = temperature**2 * kl
                same = _argmax(z_s, vocab_start, group) == _argmax(z_t, vocab_start, group)
                out[3, rows] = same.to(compute)
                if grad is not None and kd_weight:
                    total_grad = log_p_tau.exp().sub_(q).mul_(kd_weight * temperature)
            if grad is not None and lm_weight and real:
                ce = log_p.exp()
                ce.scatter_add_(-1, column, -mine.to(compute).unsqueeze(-1))
                total_grad = ce.mul_(lm_weight) if total_grad is None else total_grad.add_(ce, alpha=lm_weight)
            if grad is not None and total_grad is not None:
                grad[rows, :real] = total_grad.to(grad.dtype)
        out[0] = kd_weight * out[2] + lm_weight * out[1]
        ctx.grad, ctx.width = grad, width
        loss, lm, kd, agree = (x.view(shape) for x in out.unbind())
        ctx.mark_non_differentiable(lm, kd, agree)
        return loss, lm, kd, agree

    @staticmethod
    def backward(ctx, loss_grad: Tensor, *_: Tensor):  # type: ignore[override]
        grad = ctx.grad.mul_(loss_grad.reshape(-1, 1).to(ctx.grad.dtype))
        ctx.grad = None  # the buffer is handed on, a second backward would read scaled values
        return (grad.view(*loss_grad.shape, ctx.width), *([None] * 8))
