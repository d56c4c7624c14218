"""Tokens drawn from a teacher: an unbiased stand-in for its distribution, on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nemo_minitron.distill.fused import Head, head_losses, head_samples, head_top_k
from nemo_minitron.distill.loss import Mix
from nemo_minitron.distill.sampled import Sampled, teacher_samples, uniforms
from nemo_minitron.distill.shard import Shard
from nemo_minitron.errors import MinitronError
from tests.ranks import run_ranks

V, PADDED, LENGTH, BATCH, H, H_T, K = 50, 64, 8, 3, 12, 20, 7
DTYPES = {torch.float64: 1e-9, torch.float32: 2e-5}


def _inputs(dtype: torch.dtype = torch.float64):
    """Student hidden and head, teacher hidden and head, labels, weights and random numbers."""
    g = torch.Generator().manual_seed(0)
    hidden, hidden_t = (torch.randn(LENGTH, BATCH, h, generator=g, dtype=torch.float64) for h in (H, H_T))
    weight, weight_t = (torch.randn(PADDED, h, generator=g, dtype=torch.float64) for h in (H, H_T))
    weight[V:] *= 20  # padding that would dominate a softmax if it entered one
    weight_t[V:] *= 30
    labels = torch.randint(0, V, (BATCH, LENGTH), generator=g)
    weights = torch.rand(BATCH, LENGTH, generator=g, dtype=torch.float64)
    weights[1], weights[2, ::3] = 0.0, 0.0
    uniform = torch.rand(BATCH, LENGTH, generator=g, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), hidden_t.to(dtype), (weight_t * 0.5).to(dtype), labels, weights, uniform


def _by_definition(q: np.ndarray, k: int, u: float) -> dict[int, float]:
    """Drawn tokens and their weights of one distribution: c by bisection, then one point after the other."""
    low, high = 1.0, 1e12
    for _ in range(400):
        c = (low * high) ** 0.5
        low, high = (c, high) if np.minimum(1.0, c * q).sum() < k else (low, c)
    inclusion = np.minimum(1.0, high * q)
    certain = inclusion > 1.0 - 1e-9
    drawn = {int(i): float(q[i]) for i in np.flatnonzero(certain)}
    reached, point = 0.0, u
    for i in np.flatnonzero(~certain):
        reached += inclusion[i]
        if point < reached:
            drawn[int(i)] = float(q[i] / inclusion[i])
            point += 1.0
    return drawn


def _draws(head: Head, temperature: float, uniform: torch.Tensor, **place) -> Sampled:
    return head_samples(head, K, temperature, uniform, vocab_size=V, **place)


def _on_ranks():
    """Drawn on this rank, of sharded rows."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    rows = slice(rank * PADDED // world, (rank + 1) * PADDED // world)
    place = {"vocab_start": rows.start, "group": torch.distributed.group.WORLD}
    inputs = [_inputs(dtype) for dtype in DTYPES]
    return [tuple(_draws(Head(x[2], x[3][rows]), 1.5, x[6], **place)) for x in inputs]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_draws_follow_the_definition(world):
    """At 4 ranks the last one holds padding alone."""
    if world > 1:
        ranks = run_ranks(_on_ranks, world)
    else:
        ranks = [[tuple(_draws(Head(x[2], x[3]), 1.5, x[6])) for x in map(_inputs, DTYPES)]]
    *_, hidden, weight, _, _, uniform = _inputs()
    log_q = ((hidden @ weight.t())[..., :V] / 1.5).log_softmax(-1).transpose(0, 1)
    for rank in ranks:
        for (dtype, tolerance), found in zip(DTYPES.items(), rank, strict=True):
            drawn = Sampled(*found)
            assert drawn.tokens.shape == (BATCH, LENGTH, K)
            for b in range(BATCH):
                for s in range(LENGTH):
                    ours = dict(zip(drawn.tokens[b, s].tolist(), drawn.log_weights[b, s].exp().tolist(), strict=True))
                    expected = _by_definition(log_q[b, s].exp().numpy(), K, float(uniform[b, s]))
                    assert ours == pytest.approx(expected, rel=tolerance), (dtype, b, s)
            torch.testing.assert_close(drawn.log_probs, log_q.gather(-1, drawn.tokens), rtol=tolerance, atol=tolerance)


SHAPES = {
    "one certain": [4.0, 0.5, 0.3, 0.0, -1.0, -1.0, -2.0, -3.0, -3.0, -9.0],
    "most certain": [8.0, 7.0, 6.0, 0.0, -1.0, -1.0, -2.0, -3.0, -3.0, -9.0],
    "none certain": [0.1, 0.0, 0.0, 0.0, 0.0, 0.0, -0.1, 0.0, 0.0, 0.2],
    "all alike": [0.0] * 10,
    "some impossible": [1.0, 0.0, 0.0, 0.0, 0.0, -1.0, -1.0] + [-1e4] * 3,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 4, 9])
def test_weights_are_unbiased_and_sum_to_1(shape, k):
    """The mean over all u, which a fine grid gives: a token is drawn in few intervals of u, so that it errs by 1/N."""
    number = 4000
    logits = torch.tensor(SHAPES[shape], dtype=torch.float64)
    uniform = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    drawn = teacher_samples(logits.repeat(number, 1), k, 1.0, uniform, Shard(10))
    weights = drawn.log_weights.exp()
    torch.testing.assert_close(weights.sum(-1), torch.ones(number, dtype=torch.float64))
    mean = torch.zeros(10, dtype=torch.float64).index_add(0, drawn.tokens.flatten(), weights.flatten()) / number
    assert (mean - logits.softmax(-1)).abs().max() <= 2 / number
    real = weights > 0
    for ids, one in zip(drawn.tokens[::97], real[::97], strict=True):
        assert len(set(ids[one].tolist())) == int(one.sum())  # none twice


def test_a_teacher_that_is_sure_and_a_vocabulary_that_is_small():
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    sure = torch.full((3, 10), -1e5)
    sure[:, 4] = 0.0
    drawn = teacher_samples(sure, 4, 1.0, uniform, Shard(10))
    assert (drawn.tokens[:, 0] == 4).all() and torch.isfinite(drawn.log_probs).all()
    torch.testing.assert_close(drawn.log_weights.exp(), torch.eye(4, dtype=torch.float64)[[0]].repeat(3, 1))
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = teacher_samples(logits.clone(), 12, 1.0, uniform, Shard(5))
    expected = logits.log_softmax(-1).gather(-1, whole.tokens)
    assert whole.tokens.sort(-1).values.tolist() == [[0, 1, 2, 3, 4]] * 3
    torch.testing.assert_close(whole.log_weights, expected)
    torch.testing.assert_close(whole.log_probs, expected)


def _dense(inputs, drawn: Sampled | None, mix: Mix):
    """Loss, gradients of hidden and head, and terms by autograd on whole logits: of the draw, or of the whole KL."""
    hidden, weight, hidden_t, weight_t = (x.double().clone() for x in inputs[:4])
    labels, weights = inputs[4], inputs[5]
    hidden.requires_grad_(True)
    weight.requires_grad_(True)
    z, z_t = ((h @ w.t())[..., :V].transpose(0, 1) for h, w in ((hidden, weight), (hidden_t, weight_t)))
    log_p, log_q = (F.log_softmax(x / mix.temperature, -1) for x in (z, z_t))
    if drawn is None:
        kd = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        kd = (drawn.log_weights.exp() * (log_q - log_p).gather(-1, drawn.tokens)).sum(-1)
    kd = mix.temperature**2 * kd
    lm = F.cross_entropy(z.reshape(-1, V), labels.reshape(-1), reduction="none").view_as(labels)
    loss = ((mix.kd_weight * kd + mix.lm_weight * lm) * weights).sum()
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad, kd.detach(), lm.detach()


MIXES = [Mix("sampled_kl"), Mix("sampled_kl", 2.0, 0.7, 0.3), Mix("sampled_kl", 1.0, 0.7, 0.3)]


def _learn(mix: Mix, dtype: torch.dtype, drawn: Sampled, scattered: bool = False, memory: int | None = 9000):
    inputs = _inputs(dtype)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if world > 1 else 0
    rows = slice(rank * PADDED // world, (rank + 1) * PADDED // world)
    tokens = slice(rank * LENGTH // world, (rank + 1) * LENGTH // world) if scattered else slice(None)
    hidden = inputs[0][tokens].clone().requires_grad_(True)
    weight = inputs[1][rows].clone().requires_grad_(True)
    group = torch.distributed.group.WORLD if world > 1 else None
    found = head_losses(Head(hidden, weight), inputs[4], inputs[5], vocab_size=V, teacher=drawn, mix=mix,
                        vocab_start=rows.start, group=group, memory_bytes=memory)  # fmt: skip
    found.loss.backward()
    return found.loss.detach(), hidden.grad, weight.grad, found.terms["kd_loss"], found.terms["lm_loss"]


def _drawn(mix: Mix) -> Sampled:
    inputs = _inputs()
    return _draws(Head(inputs[2], inputs[3]), mix.temperature, inputs[6])


def _learn_all(scattered: bool):
    return [_learn(mix, dtype, _drawn(mix), scattered) for mix in MIXES for dtype in DTYPES]


@pytest.mark.parametrize("world,scattered", [(1, False), (2, False), (2, True), (4, False), (4, True)])
def test_what_is_learnt_from_a_draw_equals_dense(world, scattered):
    """Loss, gradients and terms, with temperature and cross entropy, with and without sequence parallel."""
    ranks = run_ranks(_learn_all, world, scattered) if world > 1 else [_learn_all(scattered)]
    for i, (mix, dtype) in enumerate((mix, dtype) for mix in MIXES for dtype in DTYPES):
        expected = _dense(_inputs(dtype), _drawn(mix), mix)
        parts = [rank[i] for rank in ranks]
        hidden = torch.cat([p[1] for p in parts]) if scattered else parts[0][1]
        weight = torch.cat([p[2] for p in parts])
        for loss, _, _, *terms in parts:
            for found, one in zip((loss, hidden, weight, *terms), expected, strict=True):
                assert (found.double() - one).norm() <= DTYPES[dtype] * one.norm()
        assert weight[V:].abs().max() == 0


def test_the_mean_gradient_over_draws_is_that_of_the_whole_kl():
    """Over a grid of u, which errs by 1/N. The same number of likeliest tokens is off by far more."""
    mix, number = Mix("sampled_kl", 2.0), 800
    inputs = _inputs()
    whole = _dense(inputs, None, mix)
    mean = [torch.zeros_like(x) for x in whole[:4]]
    teacher = Head(inputs[2], inputs[3])
    for at in range(number):
        uniform = torch.full((BATCH, LENGTH), (at + 0.5) / number, dtype=torch.float64)
        for total, one in zip(mean, _learn(mix, torch.float64, _draws(teacher, 2.0, uniform)), strict=False):
            total += one / number

    def off(found) -> list[float]:
        return [float((x - y).norm() / y.norm()) for x, y in zip(found, whole, strict=False)]

    assert max(off(mean)) < 2e-3
    hidden, weight = (x.clone().requires_grad_(True) for x in inputs[:2])
    likeliest = head_top_k(teacher, K, 2.0, vocab_size=V)
    head_losses(Head(hidden, weight), inputs[4], inputs[5], vocab_size=V, teacher=likeliest,
                mix=Mix("topk", 2.0, top_k=K)).loss.backward()  # fmt: skip
    assert min(off([whole[0], hidden.grad, weight.grad])[1:]) > 0.1


def test_independent_draws_average_within_their_standard_error():
    """With numbers as a cache draws them, a sample's own for each token."""
    mix, number = Mix("sampled_kl"), 400
    inputs = _inputs()
    whole = _dense(inputs, None, mix)[1]
    found = []
    for seed in range(number):
        uniform = torch.stack([uniforms(seed, "train", b, LENGTH) for b in range(BATCH)])
        found.append(_learn(mix, torch.float64, _draws(Head(inputs[2], inputs[3]), 1.0, uniform))[1])
    values = torch.stack(found)
    error = values.std(0) / number**0.5
    known = error > 1e-12
    z = ((values.mean(0) - whole) / error)[known]
    assert z.abs().max() < 5.0 and 0.7 < float(z.square().mean().sqrt()) < 1.3


def test_all_of_a_small_vocabulary_is_forward_kl():
    inputs, mix = _inputs(), Mix("sampled_kl", 2.0, teacher_samples=1000)
    drawn = head_samples(Head(inputs[2], inputs[3]), 1000, 2.0, inputs[6], vocab_size=V)
    found, expected = _learn(mix, torch.float64, drawn), _dense(inputs, None, mix)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_with_the_teacher_itself_it_is_forward_kl():
    hidden, weight, hidden_t, weight_t, labels, weights, _ = _inputs()
    results = []
    for kind in ("forward_kl", "sampled_kl"):
        student = Head(hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True))
        found = head_losses(
            student, labels, weights, vocab_size=V, teacher=Head(hidden_t, weight_t), mix=Mix(kind, 2.0)
        )
        found.loss.backward()
        results.append((found.loss.detach(), student.hidden.grad, student.weight.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_bfloat16_and_a_batch_that_is_all_masked():
    inputs, mix = _inputs(torch.bfloat16), Mix("sampled_kl", lm_weight=0.5)
    drawn = _draws(Head(inputs[2], inputs[3]), 1.0, inputs[6])
    torch.testing.assert_close(drawn.log_weights.exp().sum(-1), torch.ones(BATCH, LENGTH, dtype=torch.float64))
    found, expected = _learn(mix, torch.bfloat16, drawn), _dense(inputs, drawn, mix)
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert (one.double() - other).norm() / other.norm() < 1e-2
    student = Head(inputs[0].requires_grad_(True), inputs[1].requires_grad_(True))
    none = head_losses(student, inputs[4], torch.zeros_like(inputs[5]), vocab_size=V, teacher=drawn, mix=mix)
    none.loss.backward()
    assert none.loss == 0 and student.hidden.grad.abs().max() == 0 and student.weight.grad.abs().max() == 0


def test_other_losses_do_not_learn_from_a_draw():
    drawn = _drawn(MIXES[0])
    hidden, weight, _, _, labels, weights, _ = _inputs()
    for kind in ("topk", "forward_kl"):
        with pytest.raises(MinitronError, match=rf"expected distill\.loss=sampled_kl, found {kind}"):
            head_losses(Head(hidden, weight), labels, weights, vocab_size=V, teacher=drawn, mix=Mix(kind))


def test_numbers_are_those_of_a_sample():
    one = uniforms(1, "train", 5, 100)
    assert torch.equal(one, uniforms(1, "train", 5, 100)) and torch.equal(one[:10], uniforms(1, "train", 5, 10))
    assert float(one.min()) >= 0.0 and float(one.max()) < 1.0 and one.dtype == torch.float64
    for other in ((2, "train", 5), (1, "validation", 5), (1, "train", 6)):
        assert not (one == uniforms(*other, 100)).any()
