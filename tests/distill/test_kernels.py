"""The Triton kernels against the same halves in torch: on a GPU, else (TRITON_INTERPRET=1) in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
pytest.importorskip("triton", reason="torch's builds for CPUs come without Triton")

from nemo_minitron.distill import kernels, rows
from nemo_minitron.distill.loss import Mix
from nemo_minitron.distill.shard import Shard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXES = [
    Mix(kind, temperature, kd, lm)
    for kind in ("forward_kl", "reverse_kl")
    for temperature, kd, lm in [(1.0, 1.0, 0.0), (2.5, 0.7, 0.3), (1.0, 0.7, 0.3), (1.0, 0.0, 1.0)]
]


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("width", [5000, 300, 2048])
@pytest.mark.parametrize("teacher", [True, False])
def test_kernels_equal_torch(mix, width, teacher):
    g = torch.Generator().manual_seed(width)
    z, a = ((torch.randn(9, width, generator=g) * 4).bfloat16().to(DEVICE) for _ in range(2))
    column = torch.randint(-20, width + 20, (9,), generator=g).to(DEVICE)  # some labels are on another rank
    weights = torch.rand(9, generator=g).to(DEVICE)
    a = a if teacher else None
    exactly = None if a is None else a.double()
    ours, reference = kernels.sums(z, a, column, mix), rows.sums(z.double(), exactly, column, mix)
    if not teacher:  # the other rows are not used
        ours.values[[1, 4, 5]] = reference.values[[1, 4, 5]].float()
    torch.testing.assert_close(ours.values.double(), reference.values, rtol=1e-5, atol=1e-4)
    assert torch.equal(ours.best[: 1 + teacher], reference.best[: 1 + teacher])
    losses, norms = rows.combine(ours, weights, mix, Shard(width), teacher)
    expected, exact = rows.combine(reference, weights.double(), mix, Shard(width), teacher)
    for found, wanted in zip(losses, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    found = kernels.slope_(z.clone(), a, column, norms, mix)
    wanted = rows.slope_(z.double(), exactly, column, exact, mix)
    rounding = 4e-3 if DEVICE == "cuda" else 8e-3  # to the nearest bf16; the interpreter cuts off
    assert (found.double() - wanted).norm() <= rounding * wanted.norm()
    assert found.dtype == torch.bfloat16
