"""What is at hand at a time stays within its budget."""

from __future__ import annotations

import itertools

import torch

from nemo_minitron.distill.sizes import Sizes


def test_a_wide_sum_that_does_not_fit_is_not_made():
    """bf16 head of 1 MB, its float32 sums 2 MB: with room for them the logits are made once, without it twice."""
    size = {"tokens": 4096, "vocab_size": 4096, "dtype": torch.bfloat16, "device": "cuda", "ranks": 1}
    sums = {"hidden_sums": 4 * 4096 * 128, "weight_sums": 4 * 4096 * 128}
    for budget, kernels in itertools.product((3 << 20, 8 << 20, 64 << 20), (False, True)):
        sizes = Sizes.fit(**size, budget=budget, halves=True, kernels=kernels, **sums)
        assert (sizes.columns == 0) == (budget > 13 << 20), budget
        assert sizes.memory_bytes(4096, 4096, torch.bfloat16, 1) <= max(budget, 2 * 128 * 4096 * 2 + (2 << 20))
    assert Sizes.fit(**size, budget=8 << 20, **sums).columns == 0  # jsd and topk


def test_temporaries_stay_within_the_budget():
    sizes = Sizes.fit(8192, 128256, torch.bfloat16, "cuda", 1, 512 << 20)
    assert sizes.memory_bytes(8192, 128256, torch.bfloat16, 1) <= 512 << 20
    assert sizes.chunk > 256 and sizes.block > 64
    cpu = Sizes.fit(2048, 128256, torch.float32, "cpu", 1)
    assert cpu.memory_bytes(2048, 128256, torch.float32, 1) <= 384 << 20 and cpu.chunk == 342  # 6 nearly equal ones
