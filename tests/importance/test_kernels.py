"""The Triton kernel against torch in float64: on a GPU, else (TRITON_INTERPRET=1) in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
pytest.importorskip("triton", reason="torch's builds for CPUs come without Triton")

from nemo_minitron.importance import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(7, 2, 130), (300, 1, 64), (257, 3, 257)], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_sums_are_those_of_float64(dtype, size, batch_first):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE) * 3 + 1
    if batch_first:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    exact = x.double()
    expected = torch.stack([exact.abs().sum(0), exact.sum(0), exact.square().sum(0)])
    torch.testing.assert_close(kernels.sequence_sums(x), expected, rtol=1e-5, atol=1e-4)
