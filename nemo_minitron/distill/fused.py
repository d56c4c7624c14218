"""Output head and losses in one operator: logits exist for a chunk of tokens at a time, never for all.

For each chunk both heads are multiplied, :func:`~nemo_minitron.distill.block.block_losses` turns the student's logits
into their gradient in place, and the gradients of hidden states and head weight are accumulated at once; backward only
scales them. The same operator serves every tensor-parallel size, with and without sequence parallel, and plain cross
entropy.

A bf16 head's gradient is accumulated in float32, which is twice the gradient itself. Where the budget has no room for
that, forward and reverse KL and cross entropy make the logits a second time, for some columns of all tokens, and finish
these columns' gradient in one product (:mod:`nemo_minitron.distill.rows`). On a GPU both ways use Triton kernels
(:mod:`nemo_minitron.distill.kernels`) for 16-bit logits.

Legend: s tokens of a sequence, b sequences, n = s·b, H hidden size (the teacher's may differ), V true and Vp padded
vocabulary, tp ranks of the tensor-parallel group, c tokens of a chunk.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distill import rows
from nemo_minitron.distill.block import CROSS_ENTROPY, block_losses
from nemo_minitron.distill.loss import Mix
from nemo_minitron.distill.sampled import Sampled, teacher_samples
from nemo_minitron.distill.shard import Shard
from nemo_minitron.distill.sizes import Sizes, compute_dtype
from nemo_minitron.distill.top_k import TopK, teacher_top_k


@dataclass(frozen=True)
class Head:
    """One model's final hidden states and output weight, as they lie on this rank.

    ``hidden [s, b, H]``, or ``[s/tp, b, H]`` under sequence parallel; ``weight [Vp/tp, H]``, rows in the order of the
    vocabulary; rows past V may lack.
    """

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class TokenLosses:
    """``loss``, a scalar with gradient: Σ weights·L. ``terms``: named parts of L per token ``[b, s]``, detached:
    ``loss``; ``lm_loss`` = CE at temperature 1; with a teacher also ``kd_loss`` = τ²·D and ``top1_agreement``."""

    loss: Tensor
    terms: dict[str, Tensor]


def head_losses(
    student: Head,
    labels: Tensor,
    weights: Tensor,
    *,
    vocab_size: int,
    teacher: Head | TopK | Sampled | None = None,
    mix: Mix = CROSS_ENTROPY,
    vocab_start: int = 0,
    group: parallel.Group = None,
    memory_bytes: int | None = None,
) -> TokenLosses:
    """Loss of a micro-batch from final hidden states; see :mod:`nemo_minitron.distill.loss` for what L is.

    Args:
        student: receives gradients for ``hidden`` and ``weight``. Those of hidden states are summed over ``group``
            here (reduce-scattered where they came in scattered), so they must come straight from the final norm.
        labels: ``[b, s]`` global token ids.
        weights: ``[b, s]`` weight of each token's loss, 0 where it is masked; no gradient.
        vocab_size: true vocabulary V; rows of the head from V on take no part and receive a gradient of 0.
        teacher: hidden states ``[s, b, H_t]`` (or scattered) and head of the same columns; or the head of its
            distribution or tokens drawn from it, ``[b, s, …]``, on every rank alike; None for cross entropy.
        vocab_start: global id of the first row of ``student.weight``.
        group: tensor-parallel group, None for one process.
        memory_bytes: bound of the temporaries beside gradients; None for
            :data:`~nemo_minitron.distill.sizes.MEMORY_BYTES`. One token's logits are the least; losses that
            are no KL keep a 16-bit head's sums beside it where it is too small.

    Products run in the dtype of autocast, else in that of the weight; sums, softmax and the accumulation over chunks
    in float32 (float64 for float64 weights). Gradients come in the dtypes of their inputs.

    Raises:
        MinitronError: a teacher's answers for a loss that does not learn from such.
    """
    tensors = (teacher.hidden, teacher.weight) if isinstance(teacher, Head) else (None, None)
    known = None
    if isinstance(teacher, (TopK, Sampled)):  # [b, s, …] -> [n, …] in the order of hidden states
        mix.check_learns_from(type(teacher))
        known = type(teacher)(*(x.transpose(0, 1).flatten(0, 1) for x in teacher))
    shard = Shard(vocab_size, vocab_start, group)
    loss, kd, lm, agree = _HeadLosses.apply(
        student.hidden, student.weight, *tensors, known, labels, weights, mix, shard, memory_bytes
    )
    terms = {"loss": mix.kd_weight * kd + mix.lm_weight * lm, "lm_loss": lm}
    if teacher is not None:
        terms |= {"kd_loss": kd, "top1_agreement": agree}
    return TokenLosses(loss, terms)


def head_top_k(
    teacher: Head, k: int, temperature: float, *, vocab_size: int, vocab_start: int = 0, group: parallel.Group = None
) -> TopK:
    """The k likeliest tokens of each position at ``temperature``: ``[b, s, K]`` and ``[b, s]``, on every rank alike.

    K is smaller than k where the whole vocabulary is. Args as for :func:`head_losses`; hidden states not scattered.
    """
    shard = Shard(vocab_size, vocab_start, group)
    return TopK(*_of_head(teacher, shard, lambda z, rows: teacher_top_k(z, k, temperature, shard)))


def head_samples(
    teacher: Head,
    k: int,
    temperature: float,
    uniform: Tensor,
    *,
    vocab_size: int,
    vocab_start: int = 0,
    group: parallel.Group = None,
) -> Sampled:
    """k tokens of each position, drawn at ``temperature``: ``[b, s, K]``, on every rank alike; as :func:`head_top_k`.

    Args:
        uniform: ``[b, s]`` float64 random numbers from 0 to below 1, the same on every rank.
    """
    shard, drawn = Shard(vocab_size, vocab_start, group), uniform.t().flatten().to(teacher.hidden.device)
    return Sampled(*_of_head(teacher, shard, lambda z, rows: teacher_samples(z, k, temperature, drawn[rows], shard)))


@torch.no_grad()
def _of_head(teacher: Head, shard: Shard, answer: Callable[[Tensor, slice], tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """What ``answer`` makes of some rows of logits ``[r, v]``, of all rows: ``[b, s, …]`` each."""
    dtype = _product_dtype(teacher.weight)
    with torch.autocast(teacher.hidden.device.type, enabled=False):
        weight = teacher.weight[: shard.width(teacher.weight.shape[0])].to(dtype)
        flat = teacher.hidden.flatten(0, 1).to(dtype)
        sizes = Sizes.fit(len(flat), shard.vocab_size, dtype, flat.device.type, parallel.size(shard.group))
        found = [
            answer(torch.mm(flat[rows], weight.t()).to(sizes.compute), rows)
            for rows in _slices(0, len(flat), sizes.block)
        ]
    return (
        torch.cat(parts).unflatten(0, teacher.hidden.shape[:2]).transpose(0, 1) for parts in zip(*found, strict=True)
    )


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        known: TopK | Sampled | None,
        labels: Tensor,
        weights: Tensor,
        mix: Mix,
        shard: Shard,
        budget: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        b, s = labels.shape
        dtype, device = _product_dtype(weight), hidden.device
        width = shard.width(weight.shape[0])
        with torch.autocast(device.type, enabled=False):
            sides = [(_whole(hidden, s, shard.group).to(dtype), weight.detach()[:width].to(dtype))]
            if teacher_hidden is not None and teacher_weight is not None:
                sides.append((_whole(teacher_hidden, s, shard.group).to(dtype), teacher_weight[:width].to(dtype)))
            call = _Call(sides, known, labels.t().reshape(-1), weights.t().reshape(-1), mix, shard)
            gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
            found, hidden_grad, weight_grad = call.run(gradient, hidden.dtype, weight.dtype, weight.shape[0], budget)
            kd, lm, agree = (x.view(s, b).t() for x in found.unbind())
            loss = ((mix.kd_weight * kd + mix.lm_weight * lm) * weights).sum()
            if hidden_grad is not None and weight_grad is not None:
                if hidden.shape[0] == s:
                    hidden_grad = parallel.all_reduce(hidden_grad, shard.group)
                else:
                    hidden_grad = parallel.reduce_scatter(hidden_grad, shard.group)
                ctx.gradients = hidden_grad.view_as(hidden).to(hidden.dtype), weight_grad.to(weight.dtype)
        kd, lm, agree = (x.to(call.compute) for x in (kd, lm, agree))
        ctx.mark_non_differentiable(kd, lm, agree)
        return loss.to(call.compute), kd, lm, agree

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("head_losses: its gradients were handed on by a first backward and cannot be had again")
        hidden_grad, weight_grad = (g.mul_(loss_grad.to(g.dtype)) for g in ctx.gradients)
        ctx.gradients = None
        return hidden_grad, weight_grad, *([None] * 8)


class _Call:
    """One micro-batch; ``sides`` are the student's hidden states ``[n, H]`` and head ``[v, H]`` and, where its logits
    are wanted, the teacher's."""

    def __init__(
        self,
        sides: list[tuple[Tensor, Tensor]],
        known: TopK | Sampled | None,
        labels: Tensor,
        weights: Tensor,
        mix: Mix,
        shard: Shard,
    ) -> None:
        self.sides, self.known, self.weights, self.mix, self.shard = sides, known, weights, mix, shard
        self.flat, self.head = sides[0]
        self.labels, self.column = labels, labels - shard.start
        self.tokens, self.width, self.dtype, self.device = *labels.shape, len(self.head), self.head.dtype, labels.device
        self.compute = compute_dtype(self.dtype)
        self.halves = known is None and (len(sides) == 1 or mix.divergence.kl is not None)
        self.kernels = self.halves and _has_kernels(self.device, self.dtype)

    def run(
        self, gradient: bool, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, head_rows: int, budget: int | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Losses ``[3, n]`` in float64, and where asked for the gradients of hidden states ``[n, H]``, before they are
        summed over ranks, and head ``[head_rows, H]``, each in its own dtype or the one of sums."""
        ranks = parallel.size(self.shard.group)
        columns, size = -(-self.shard.vocab_size // ranks), self.compute.itemsize * self.flat.shape[1]
        self.sizes = sizes = Sizes.fit(
            self.tokens, self.shard.vocab_size, self.dtype, self.device.type, ranks, budget,
            halves=self.halves, kernels=self.kernels,
            hidden_sums=self.tokens * size if gradient and hidden_dtype != self.compute else 0,
            weight_sums=columns * size if gradient and weight_dtype != self.compute else 0,
        )  # fmt: skip
        room = max(sizes.chunk * self.width, self.tokens * sizes.columns)
        self.buffers = [torch.empty(room, dtype=self.dtype, device=self.device) for _ in self.sides]
        found = torch.empty(3, self.tokens, dtype=torch.float64, device=self.device)
        if not gradient:
            for chunk in _slices(0, self.tokens, sizes.chunk):
                found[:, chunk] = self.losses(chunk, self.logits(chunk, slice(0, self.width)), gradient=False)
            return found, None, None
        twice = sizes.columns > 0
        hidden_grad = torch.empty(self.flat.shape, dtype=self.compute, device=self.device)
        weight_grad = torch.empty(
            head_rows, self.flat.shape[1], dtype=weight_dtype if twice else self.compute, device=self.device
        )
        weight_grad[self.width :] = 0.0
        (self.by_columns if twice else self.by_tokens)(found, hidden_grad, weight_grad[: self.width])
        return found, hidden_grad, weight_grad

    def by_tokens(self, found: Tensor, hidden_grad: Tensor, weight_grad: Tensor) -> None:
        """Logits once, for some tokens at a time; the head's gradient is summed up over them."""
        for chunk in _slices(0, self.tokens, self.sizes.chunk):
            logits = self.logits(chunk, slice(0, self.width))
            found[:, chunk] = self.losses(chunk, logits, gradient=True)
            _product(logits[0], self.head, hidden_grad[chunk], first=True)
            _product(logits[0].t(), self.flat[chunk], weight_grad, first=chunk.start == 0)

    def by_columns(self, found: Tensor, hidden_grad: Tensor, weight_grad: Tensor) -> None:
        """Logits twice: for each token's sums, and for the gradient, of which some columns are finished at once."""
        norms = torch.empty(len(rows.Norms._fields), self.tokens, dtype=self.compute, device=self.device)
        for chunk in _slices(0, self.tokens, self.sizes.chunk):
            losses, of_chunk = self.halves_of(chunk, self.logits(chunk, slice(0, self.width)))
            found[:, chunk], norms[:, chunk] = losses, torch.stack(of_chunk)
        everything = slice(0, self.tokens)
        for columns in _slices(0, self.width, self.sizes.columns):
            logits = self.logits(everything, columns)
            self.slope_(everything, logits, rows.Norms(*norms), columns.start)
            _product(logits[0].t(), self.flat, weight_grad[columns], first=True)
            _product(logits[0], self.head[columns], hidden_grad, first=columns.start == 0)
        if not self.width:
            hidden_grad.zero_()

    def logits(self, tokens: slice, columns: slice) -> list[Tensor]:
        """Logits ``[tokens, columns]`` of each side, in buffers that the next call overwrites."""
        shape = tokens.stop - tokens.start, columns.stop - columns.start
        return [
            torch.mm(flat[tokens], head[columns].t(), out=buffer[: shape[0] * shape[1]].view(shape))
            for (flat, head), buffer in zip(self.sides, self.buffers, strict=True)
        ]

    def losses(self, chunk: slice, logits: list[Tensor], *, gradient: bool) -> Tensor:
        """``[3, c]`` of a chunk; the student's logits become their gradient."""
        if self.kernels:
            found, norms = self.halves_of(chunk, logits)
            if gradient:
                self.slope_(chunk, logits, norms, 0)
            return found
        parts = []
        for block in _slices(chunk.start, chunk.stop, self.sizes.block):
            inside = slice(block.start - chunk.start, block.stop - chunk.start)
            # the buffers themselves where they have the dtype
            z, *others = (x[inside].to(self.compute) for x in logits)
            teacher: Tensor | TopK | Sampled | None = others[0] if others else None
            if self.known is not None:
                teacher = self.known.rows(block)
            losses = block_losses(
                z, teacher, self.labels[block], self.weights[block], self.mix, self.shard, gradient=gradient
            )
            parts.append(torch.stack(losses))
            if gradient and z.dtype != self.dtype:
                logits[0][inside] = z
        return torch.cat(parts, -1)

    def halves_of(self, chunk: slice, logits: list[Tensor]) -> tuple[Tensor, rows.Norms]:
        """Losses ``[3, c]`` and what their gradient needs, of logits of all columns."""
        if self.kernels:
            from nemo_minitron.distill import kernels

            sums = kernels.sums(*self._pair(logits), self.column[chunk], self.mix)
        else:
            parts = [
                rows.sums(*self._pair([x[block].to(self.compute) for x in logits]), self.column[chunk][block], self.mix)
                for block in _slices(0, chunk.stop - chunk.start, self.sizes.block)
            ]
            sums = rows.Sums(*(torch.cat(part, -1) for part in zip(*parts, strict=True)))
        losses, norms = rows.combine(sums, self.weights[chunk], self.mix, self.shard, len(logits) > 1)
        return torch.stack(losses), norms

    def slope_(self, tokens: slice, logits: list[Tensor], norms: rows.Norms, start: int) -> None:
        """Turn the student's logits of the columns from ``start`` on into their gradient."""
        column = self.column[tokens] - start
        if self.kernels:
            from nemo_minitron.distill import kernels

            kernels.slope_(*self._pair(logits), column, norms, self.mix)
            return
        for block in _slices(0, tokens.stop - tokens.start, self.sizes.block):
            z, a = self._pair([x[block].to(self.compute) for x in logits])
            slope = rows.slope_(z, a, column[block], rows.Norms(*(x[block] for x in norms)), self.mix)
            logits[0][block] = slope

    @staticmethod
    def _pair(logits: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        return logits[0], logits[1] if len(logits) > 1 else None


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype.itemsize == 2 and importlib.util.find_spec("triton") is not None


def _product_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def _whole(hidden: Tensor, length: int, group: parallel.Group) -> Tensor:
    """``[n, H]`` of hidden states ``[s, b, H]``, gathered over ``group`` where they are scattered along s."""
    hidden = hidden.detach()
    if hidden.shape[0] != length:
        hidden = parallel.all_gather(hidden, group)
    return hidden.flatten(0, 1)


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


_MIXED = "dtype_out" in torch.ops.aten.addmm.overloads()  # bf16 products into float32 sums in one call, torch >= 2.8


def _product(left: Tensor, right: Tensor, total: Tensor, *, first: bool) -> None:
    """``total [r, c] = left @ right``, or ``+=`` where it is not the ``first``; in parts of the rows where the sum has
    another dtype and the device cannot add to it at once."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=0.0 if first else 1.0)
    elif _MIXED and left.is_cuda:
        if first:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        for part in _slices(0, len(total), 8192):
            product = torch.mm(left[part], right)
            if first:
                total[part] = product
            else:
                total[part] += product
