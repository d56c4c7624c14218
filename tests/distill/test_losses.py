"""Values and gradients against an independent dense float64 reference, at one and two tensor-parallel ranks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nemo_minitron.distill import losses as under_test
from nemo_minitron.distill.losses import cross_entropy_losses, distillation_losses
from nemo_minitron.errors import MinitronError
from tests.ranks import run_ranks

V, PADDED = 50, 64


def _inputs(dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(0)
    student = torch.randn(2, 5, PADDED, generator=g, dtype=torch.float64) * 3
    teacher = torch.randn(2, 5, PADDED, generator=g, dtype=torch.float64) * 3
    student[..., V:] += 20  # padding that would dominate a softmax if it entered one
    teacher[..., V:] += 30
    labels = torch.randint(0, V, (2, 5), generator=g)
    weight = torch.rand(2, 5, generator=g, dtype=torch.float64)  # stands for mask and normalisation
    return student.to(dtype), teacher.to(dtype), labels, weight


def _dense(student, teacher, labels, weight, temperature, kd, lm):
    student = student.double().clone().requires_grad_(True)
    s, t = student[..., :V], teacher.double()[..., :V]
    kl = F.kl_div(
        F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1), reduction="none", log_target=True
    ).sum(-1)
    ce = F.cross_entropy(s.reshape(-1, V), labels.reshape(-1), reduction="none").view_as(labels)
    per_token = kd * temperature**2 * kl + lm * ce
    (per_token * weight).sum().backward()
    agree = (s.argmax(-1) == t.argmax(-1)).double()
    return per_token.detach(), (temperature**2 * kl).detach(), ce.detach(), agree, student.grad


def _ours(dtype, temperature, kd, lm):
    student, teacher, labels, weight = _inputs(dtype)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    part = PADDED // world
    mine = slice(rank * part, (rank + 1) * part)
    shard = student[..., mine].contiguous().requires_grad_(True)
    found = distillation_losses(
        shard,
        teacher[..., mine].contiguous(),
        labels,
        temperature=temperature,
        kd_weight=kd,
        lm_weight=lm,
        vocab_size=V,
        vocab_start=rank * part,
        group=torch.distributed.group.WORLD if world > 1 else None,
    )
    (found.loss * weight.to(found.loss.dtype)).sum().backward()
    t = found.terms
    return t["loss"], t["kd_loss"], t["lm_loss"], t["top1_agreement"], shard.grad


MIXES = [(1.0, 1.0, 0.0), (2.5, 1.0, 0.0), (2.5, 0.7, 0.3), (1.0, 0.0, 1.0)]


@pytest.mark.parametrize("temperature,kd,lm", MIXES)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_one_rank_equals_dense(dtype, tolerance, temperature, kd, lm, monkeypatch):
    monkeypatch.setattr(under_test, "CHUNK_BYTES", 3 * PADDED * 4)  # 10 tokens in chunks of 3: does not divide
    expected = _dense(*_inputs(), temperature, kd, lm)
    for ours, dense in zip(_ours(dtype, temperature, kd, lm), expected, strict=True):
        torch.testing.assert_close(ours.double(), dense, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("world", [2, 4])
def test_tensor_parallel_equals_dense(world):
    """At 4 ranks the last one holds padding alone."""
    for temperature, kd, lm in [(2.5, 0.7, 0.3)]:
        expected = _dense(*_inputs(), temperature, kd, lm)
        ranks = run_ranks(_ours, world, torch.float64, temperature, kd, lm)
        for result in ranks:
            for ours, dense in zip(result[:4], expected[:4], strict=True):
                torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-10)
        grad = torch.cat([r[4] for r in ranks], dim=-1)
        torch.testing.assert_close(grad, expected[4], rtol=1e-10, atol=1e-12)


def test_zero_loss_and_gradient_at_equality():
    student, _, labels, _ = _inputs(torch.float32)
    student.requires_grad_(True)
    found = distillation_losses(student, student.detach(), labels, temperature=2.0, vocab_size=V)
    found.loss.sum().backward()
    assert found.terms["kd_loss"].abs().max() < 1e-6
    assert student.grad.abs().max() == 0
    assert found.terms["top1_agreement"].min() == 1


def test_cross_entropy_alone_ignores_padding():
    student, _, labels, _ = _inputs()
    found = cross_entropy_losses(student, labels, vocab_size=V)
    expected = F.cross_entropy(student[..., :V].reshape(-1, V), labels.reshape(-1), reduction="none")
    torch.testing.assert_close(found.loss.reshape(-1), expected)


def test_bfloat16_logits_keep_their_dtype_and_float32_sums():
    student, teacher, labels, weight = _inputs(torch.bfloat16)
    expected = _dense(student, teacher, labels, weight, 1.0, 1.0, 0.0)
    student.requires_grad_(True)
    found = distillation_losses(student, teacher, labels, vocab_size=V)
    (found.loss * weight.float()).sum().backward()
    assert student.grad.dtype == torch.bfloat16 and found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student.grad.double(), expected[4], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("options,key", [({"temperature": 0.0}, "temperature"), ({"kd_weight": 0.0}, "kd_weight")])
def test_bad_options_name_their_key(options, key):
    student, teacher, labels, _ = _inputs()
    with pytest.raises(MinitronError, match=f"distill.{key}"):
        distillation_losses(student, teacher, labels, vocab_size=V, **options)
