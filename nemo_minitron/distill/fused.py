"""Output head and losses in one operator: logits exist for a chunk of tokens at a time, never for all.

For each chunk both heads are multiplied, :func:`~nemo_minitron.distill.losses.block_losses` turns the student's logits
into their gradient in place, and the gradients of hidden states and head weight are accumulated at once; backward only
scales them. The same operator serves every tensor-parallel size, with and without sequence parallel, and plain cross
entropy.

Legend: s tokens of a sequence, b sequences, n = s·b, H hidden size (the teacher's may differ), V true and Vp padded
vocabulary, tp ranks of the tensor-parallel group, c tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distill.losses import CROSS_ENTROPY, Mix, Shard, TopK, block_losses, teacher_top_k
from nemo_minitron.errors import MinitronError

MEMORY_BYTES = {"cuda": 512 << 20, "cpu": 384 << 20}
"""Default budget of one call's temporaries: both sides' logits of a chunk, and what computing on a block needs."""

_BLOCK_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
"""float32 logits of the tokens that losses are computed on at a time: near a CPU's caches, enough work for a GPU."""
_SHARDED_BLOCK_BYTES = 16 << 20
"""The same on CPU under tensor parallelism, where every block costs collectives."""
_BLOCKS_ALIVE = 7  # float32 copies of a block while its losses are computed (jsd has most)


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
    teacher: Head | TopK | None = None,
    mix: Mix = CROSS_ENTROPY,
    vocab_start: int = 0,
    group: parallel.Group = None,
    memory_bytes: int | None = None,
) -> TokenLosses:
    """Loss of a micro-batch from final hidden states; see :mod:`nemo_minitron.distill.losses` for what L is.

    Args:
        student: receives gradients for ``hidden`` and ``weight``. Those of hidden states are summed over ``group``
            here (reduce-scattered where they came in scattered), so they must come straight from the final norm.
        labels: ``[b, s]`` global token ids.
        weights: ``[b, s]`` weight of each token's loss, 0 where it is masked; no gradient.
        vocab_size: true vocabulary V; rows of the head from V on take no part and receive a gradient of 0.
        teacher: hidden states ``[s, b, H_t]`` (or scattered) and head of the same columns; or the head of its
            distribution, ``[b, s, K]`` and ``[b, s]``, on every rank alike; None for cross entropy.
        vocab_start: global id of the first row of ``student.weight``.
        group: tensor-parallel group, None for one process.
        memory_bytes: bound of the temporaries beside gradients; that of :data:`MEMORY_BYTES` when None. One token's
            logits are the least.

    Products run in the dtype of autocast, else in that of the weight; sums, softmax and the accumulation over chunks
    in float32 (float64 for float64 weights). Gradients come in the dtypes of their inputs.

    Raises:
        MinitronError: a top-k teacher for another loss than ``topk``.
    """
    if isinstance(teacher, TopK) and mix.loss != "topk":
        raise MinitronError(f"distill.loss={mix.loss} needs all of the teacher's logits; a cache serves topk alone")
    tensors = (teacher.hidden, teacher.weight) if isinstance(teacher, Head) else (None, None)
    known = None
    if isinstance(teacher, TopK):  # [b, s, …] -> [n, …] in the order of hidden states
        known = TopK(*(x.transpose(0, 1).flatten(0, 1) for x in teacher))
    shard = Shard(vocab_size, vocab_start, group)
    loss, kd, lm, agree = _HeadLosses.apply(
        student.hidden, student.weight, *tensors, known, labels, weights, mix, shard, memory_bytes
    )
    terms = {"loss": mix.kd_weight * kd + mix.lm_weight * lm, "lm_loss": lm}
    if teacher is not None:
        terms |= {"kd_loss": kd, "top1_agreement": agree}
    return TokenLosses(loss, terms)


@torch.no_grad()
def head_top_k(
    teacher: Head, k: int, temperature: float, *, vocab_size: int, vocab_start: int = 0, group: parallel.Group = None
) -> TopK:
    """The k likeliest tokens of each position at ``temperature``: ``[b, s, K]`` and ``[b, s]``, on every rank alike.

    K is smaller than k where the whole vocabulary is. Args as for :func:`head_losses`; hidden states not scattered.
    """
    shard = Shard(vocab_size, vocab_start, group)
    dtype = _product_dtype(teacher.weight)
    with torch.autocast(teacher.hidden.device.type, enabled=False):
        weight = teacher.weight[: shard.width(teacher.weight.shape[0])].to(dtype)
        flat = teacher.hidden.flatten(0, 1).to(dtype)
        sizes = Sizes.fit(len(flat), vocab_size, dtype, flat.device.type, parallel.size(group))
        found = [
            teacher_top_k(torch.mm(flat[rows], weight.t()).to(sizes.compute), k, temperature, shard)
            for rows in _slices(0, len(flat), sizes.block)
        ]
    return TopK(
        *(torch.cat(parts).unflatten(0, teacher.hidden.shape[:2]).transpose(0, 1) for parts in zip(*found, strict=True))
    )


@dataclass(frozen=True)
class Sizes:
    """How many tokens make a ``chunk`` (matrix products) and a ``block`` of it (losses) within a budget of bytes."""

    chunk: int
    block: int
    compute: torch.dtype

    @classmethod
    def fit(
        cls, tokens: int, vocab_size: int, dtype: torch.dtype, device: str, ranks: int, budget: int | None = None
    ) -> Sizes:
        """The same on every rank, whatever its share of padding: all must meet in the same collectives.

        Chunks are of nearly equal sizes: a small last one would waste its matrix products.
        """
        budget = budget or MEMORY_BYTES.get(device, MEMORY_BYTES["cuda"])
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        width = -(-vocab_size // ranks)
        row = width * compute.itemsize
        block_bytes = (
            _SHARDED_BLOCK_BYTES if device == "cpu" and ranks > 1 else _BLOCK_BYTES.get(device, _BLOCK_BYTES["cuda"])
        )
        block = max(1, min(block_bytes, budget // (2 * _BLOCKS_ALIVE)) // row)
        left = budget - _BLOCKS_ALIVE * block * row
        chunk = max(1, left // (2 * width * dtype.itemsize))
        chunk = -(-tokens // -(-tokens // chunk))
        return cls(chunk, min(block, chunk), compute)

    def memory_bytes(self, vocab_size: int, dtype: torch.dtype, ranks: int) -> int:
        """Temporaries of a call that has a teacher's logits."""
        width = -(-vocab_size // ranks)
        return width * (2 * self.chunk * dtype.itemsize + _BLOCKS_ALIVE * self.block * self.compute.itemsize)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        known: TopK | None,
        labels: Tensor,
        weights: Tensor,
        mix: Mix,
        shard: Shard,
        budget: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        b, s = labels.shape
        dtype, device = _product_dtype(weight), hidden.device
        gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        label, token_weight = labels.t().reshape(-1), weights.t().reshape(-1)
        sizes = Sizes.fit(s * b, shard.vocab_size, dtype, device.type, parallel.size(shard.group), budget)
        width = shard.width(weight.shape[0])
        with torch.autocast(device.type, enabled=False):
            flat = _whole(hidden, s, shard.group).to(dtype)
            rows_of_head = weight.detach()[:width].to(dtype)
            buffer = torch.empty(sizes.chunk, width, dtype=dtype, device=device)
            if teacher_hidden is not None and teacher_weight is not None:
                flat_t, head_t = _whole(teacher_hidden, s, shard.group).to(dtype), teacher_weight[:width].to(dtype)
                buffer_t = torch.empty_like(buffer)
            found = torch.empty(3, s * b, dtype=torch.float64, device=device)
            hidden_grad = torch.empty(flat.shape, dtype=sizes.compute, device=device) if gradient else None
            weight_grad = torch.empty(weight.shape, dtype=sizes.compute, device=device) if gradient else None
            if weight_grad is not None:
                weight_grad[width:] = 0.0
            for chunk in _slices(0, s * b, sizes.chunk):
                z = torch.mm(flat[chunk], rows_of_head.t(), out=buffer[: chunk.stop - chunk.start])
                if teacher_hidden is not None:
                    z_t = torch.mm(flat_t[chunk], head_t.t(), out=buffer_t[: chunk.stop - chunk.start])
                for block in _slices(chunk.start, chunk.stop, sizes.block):
                    inside = slice(block.start - chunk.start, block.stop - chunk.start)
                    logits = z[inside].to(sizes.compute)  # the buffer itself where that is its dtype
                    teacher: Tensor | TopK | None = known.rows(block) if known is not None else None
                    if teacher_hidden is not None:
                        teacher = z_t[inside].to(sizes.compute)
                    losses = block_losses(
                        logits, teacher, label[block], token_weight[block], mix, shard, gradient=gradient
                    )
                    found[:, block] = torch.stack(losses)
                    if gradient and logits.dtype != dtype:
                        z[inside] = logits
                if hidden_grad is not None and weight_grad is not None:
                    _product(z, rows_of_head, hidden_grad[chunk])
                    _accumulate(weight_grad[:width], z, flat[chunk], first=chunk.start == 0)
            kd, lm, agree = (x.view(s, b).t() for x in found.unbind())
            loss = ((mix.kd_weight * kd + mix.lm_weight * lm) * weights).sum()
            if hidden_grad is not None and weight_grad is not None:
                if hidden.shape[0] == s:
                    hidden_grad = parallel.all_reduce(hidden_grad, shard.group)
                else:
                    hidden_grad = parallel.reduce_scatter(hidden_grad, shard.group)
                ctx.gradients = hidden_grad.view_as(hidden).to(hidden.dtype), weight_grad.to(weight.dtype)
        kd, lm, agree = (x.to(sizes.compute) for x in (kd, lm, agree))
        ctx.mark_non_differentiable(kd, lm, agree)
        return loss.to(sizes.compute), kd, lm, agree

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("head_losses: its gradients were handed on by a first backward and cannot be had again")
        hidden_grad, weight_grad = (g.mul_(loss_grad.to(g.dtype)) for g in ctx.gradients)
        ctx.gradients = None
        return hidden_grad, weight_grad, *([None] * 8)


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


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(torch.mm(left, right))


def _accumulate(total: Tensor, z: Tensor, hidden: Tensor, first: bool) -> None:
    """``total [v, H] += zᵀ hidden``; in parts of the vocabulary where the product has another dtype than the sum."""
    if z.dtype == total.dtype:
        total.addmm_(z.t(), hidden, beta=0.0 if first else 1.0)
        return
    for rows in _slices(0, total.shape[0], 8192):
        part = torch.mm(z[:, rows].t(), hidden)
        if first:
            total[rows] = part
        else:
            total[rows] += part
