"""The two halves of :mod:`nemo_minitron.distill.rows` as Triton kernels, for 16-bit logits on a GPU.

One program walks one token's columns for the sums, each lane with a maximum of its own, so that nothing is reduced
before the end; the gradient is one elementwise pass. Both read the logits as they come out of the matrix product.
Imported only where Triton is there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemo_minitron.distill.loss import Mix
from nemo_minitron.distill.rows import Norms, Sums


def sums(z: Tensor, a: Tensor | None, column: Tensor, mix: Mix) -> Sums:
    """:func:`nemo_minitron.distill.rows.sums` in float32, of logits of any float dtype in contiguous rows."""
    rows, width = z.shape
    values = torch.empty(7, rows, dtype=torch.float32, device=z.device)
    best = torch.empty(2, rows, dtype=torch.int64, device=z.device)
    _sums[(rows,)](
        z, z if a is None else a, column, values, best, z.stride(0), width, rows, 1.0 / mix.temperature,
        TEACHER=a is not None, TEMPERED=mix.temperature != 1.0, REVERSE=mix.divergence.kl == "reverse", BLOCK=2048,
        num_warps=8,
    )  # fmt: skip
    return Sums(values, best)


def slope_(z: Tensor, a: Tensor | None, column: Tensor, norms: Norms, mix: Mix) -> Tensor:
    """:func:`nemo_minitron.distill.rows.slope_`; ``a`` is left as it is."""
    rows, width = z.shape
    if width:
        block = 4096
        _slope[(rows, triton.cdiv(width, block))](
            z, z if a is None else a, column, *norms, z.stride(0), width, 1.0 / mix.temperature,
            TEACHER=a is not None and mix.kd_weight != 0.0, REVERSE=mix.divergence.kl == "reverse",
            LABELS=mix.lm_weight != 0.0, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return z


@triton.jit
def _sums(
    z_rows, a_rows, columns, values, best, stride, width, rows, inverse_tau,
    TEACHER: tl.constexpr, TEMPERED: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_rows += row * stride
    a_rows += row * stride
    lanes = tl.arange(0, BLOCK)
    lowest = -1e30  # where there is no column: −inf less −inf would be no number
    top_s = tl.full((BLOCK,), lowest, tl.float32)
    best_s = tl.zeros((BLOCK,), tl.int32)
    sum_s = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    top_t = tl.full((BLOCK,), lowest, tl.float32)
    best_t = tl.zeros((BLOCK,), tl.int32)
    sum_t = tl.zeros((BLOCK,), tl.float32)
    cross = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + lanes
        inside = column < width
        z = tl.load(z_rows + column, mask=inside, other=lowest).to(tl.float32)
        new_s = tl.maximum(top_s, z)
        best_s = tl.where(z > top_s, column, best_s)
        fade_s = tl.exp((top_s - new_s) * inverse_tau)
        e_s = tl.exp((z - new_s) * inverse_tau)
        sum_s = sum_s * fade_s + e_s
        if TEMPERED:
            plain = plain * tl.exp(top_s - new_s) + tl.exp(z - new_s)
        top_s = new_s
        if TEACHER:
            a = tl.load(a_rows + column, mask=inside, other=lowest).to(tl.float32)
            new_t = tl.maximum(top_t, a)
            best_t = tl.where(a > top_t, column, best_t)
            fade_t = tl.exp((top_t - new_t) * inverse_tau)
            e_t = tl.exp((a - new_t) * inverse_tau)
            sum_t = sum_t * fade_t + e_t
            apart = tl.where(inside, (a - z) * inverse_tau, 0.0)
            if REVERSE:
                cross = cross * fade_s - e_s * apart
            else:
                cross = cross * fade_t + e_t * apart
            top_t = new_t
    top = tl.max(top_s, 0)
    scale = tl.exp((top_s - top) * inverse_tau)
    tl.store(values + row, top)
    tl.store(values + 2 * rows + row, tl.sum(sum_s * scale, 0))
    tl.store(best + row, tl.min(tl.where(top_s == top, best_s, width), 0).to(tl.int64))
    if TEMPERED:
        tl.store(values + 3 * rows + row, tl.sum(plain * tl.exp(top_s - top), 0))
    else:
        tl.store(values + 3 * rows + row, tl.sum(sum_s * scale, 0))
    _store_teacher(
        values + row, best + rows + row, top_t, best_t, sum_t, cross, scale, width, rows, inverse_tau,
        TEACHER=TEACHER, REVERSE=REVERSE,
    )  # fmt: skip
    label = tl.load(columns + row)
    ours = (label >= 0) & (label < width)
    at_label = tl.load(z_rows + label, mask=ours, other=0.0).to(tl.float32)
    tl.store(values + 6 * rows + row, at_label)


@triton.jit
def _store_teacher(
    values, best, top_t, best_t, sum_t, cross, scale_s, width, rows, inverse_tau,
    TEACHER: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a token's lanes have of the teacher, as one number each; what no teacher has where there is none."""
    if TEACHER:
        above = tl.max(top_t, 0)
        scale_t = tl.exp((top_t - above) * inverse_tau)
        tl.store(values + rows, above)
        tl.store(values + 4 * rows, tl.sum(sum_t * scale_t, 0))
        if REVERSE:
            tl.store(values + 5 * rows, tl.sum(cross * scale_s, 0))
        else:
            tl.store(values + 5 * rows, tl.sum(cross * scale_t, 0))
        tl.store(best, tl.min(tl.where(top_t == above, best_t, width), 0).to(tl.int64))
    else:
        tl.store(values + rows, -1e30)
        tl.store(values + 4 * rows, 0.0)
        tl.store(values + 5 * rows, 0.0)
        tl.store(best, tl.zeros((), tl.int64))


@triton.jit
def _slope(
    z_rows, a_rows, columns, log_s, log_t, log_plain, distance, kd, lm, stride, width, inverse_tau,
    TEACHER: tl.constexpr, REVERSE: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = z_rows + row * stride + column
    z = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    slope = tl.zeros((BLOCK,), tl.float32)
    if TEACHER:
        a = tl.load(a_rows + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        log_p = z * inverse_tau - tl.load(log_s + row)
        log_q = a * inverse_tau - tl.load(log_t + row)
        if REVERSE:
            slope = tl.exp(log_p) * (log_p - log_q - tl.load(distance + row))
        else:
            slope = tl.exp(log_p) - tl.exp(log_q)
        slope *= tl.load(kd + row)
    if LABELS:
        hit = tl.where(column == tl.load(columns + row), 1.0, 0.0)
        slope += tl.load(lm + row) * (tl.exp(z - tl.load(log_plain + row)) - hit)
    tl.store(place, slope.to(z_rows.dtype.element_ty), mask=inside)
