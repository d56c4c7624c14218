"""Sums over the sequence as one Triton kernel: an activation on a GPU is read once.

Imported only where Triton is there; :mod:`nemo_minitron.importance.reductions` is the same in torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_AT_ONCE = 128
"""Tokens whose float32 sum is one number; these are added in float64."""


def sequence_sums(x: Tensor) -> Tensor:
    """:func:`nemo_minitron.importance.reductions.sequence_sums` without a mask, of ``x [s, b, C]`` in any float dtype
    to float32, contiguous along C: ``[3, b, C]`` float64."""
    length, batch, width = x.shape
    parts = triton.cdiv(length, ROWS_AT_ONCE)
    sums = torch.empty(parts, 3, batch, width, dtype=torch.float32, device=x.device)
    columns = 128
    _sums[(triton.cdiv(width, columns), batch, parts)](
        x, sums, length, batch, width, x.stride(0), x.stride(1), PART=ROWS_AT_ONCE, ROWS=16, COLUMNS=columns,
    )  # fmt: skip
    return sums.double().sum(dim=0)


@triton.jit
def _sums(
    x, sums, length, batch, width, row_stride, batch_stride,
    PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sample, part = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, ROWS)
    absolute = tl.zeros((ROWS, COLUMNS), tl.float32)
    plain = tl.zeros((ROWS, COLUMNS), tl.float32)
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, PART, ROWS):
        row = part * PART + start + rows
        there = (row < length)[:, None] & (column < width)[None, :]
        at = x + sample * batch_stride + row[:, None] * row_stride + column[None, :]
        value = tl.load(at, mask=there, other=0.0).to(tl.float32)
        absolute += tl.abs(value)
        plain += value
        square += value * value
    out = sums + (part * 3 * batch + sample) * width + column
    tl.store(out, tl.sum(absolute, axis=0), mask=column < width)
    tl.store(out + batch * width, tl.sum(plain, axis=0), mask=column < width)
    tl.store(out + 2 * batch * width, tl.sum(square, axis=0), mask=column < width)
