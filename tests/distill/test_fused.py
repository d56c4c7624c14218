"""Head and losses in one operator against a dense float64 computation, on one rank and on tensor-parallel ones."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from nemo_minitron.distill.fused import Head, head_losses, head_top_k
from nemo_minitron.distill.loss import Mix
from nemo_minitron.distill.sizes import Sizes
from nemo_minitron.errors import MinitronError
from tests.ranks import run_ranks

V, PADDED, LENGTH, BATCH, H, H_T = 50, 64, 8, 3, 12, 20
SMALL = 9000  # bytes: 24 tokens in chunks and blocks that do not divide them
BETA, K = 0.3, 7
KINDS = ("forward_kl", "reverse_kl", "jsd", "topk")
MIXES = [
    Mix(kind, temperature, kd, lm, BETA, K)
    for kind, (temperature, kd, lm) in itertools.product(
        KINDS, [(1.0, 1.0, 0.0), (2.5, 0.7, 0.3), (1.0, 0.7, 0.3), (1.0, 0.0, 1.0)]
    )
]
HALVES = [mix for mix in MIXES if mix.divergence.kl is not None]


def _inputs(dtype: torch.dtype = torch.float64):
    """Student hidden and head, teacher hidden and head, labels, and weights of which one sequence's are 0."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(LENGTH, BATCH, H, generator=g, dtype=torch.float64)
    weight = torch.randn(PADDED, H, generator=g, dtype=torch.float64)
    weight[V:] *= 20  # padding that would dominate a softmax if it entered one
    hidden_t = torch.randn(LENGTH, BATCH, H_T, generator=g, dtype=torch.float64)
    weight_t = torch.randn(PADDED, H_T, generator=g, dtype=torch.float64) * 0.5
    weight_t[V:] *= 30
    labels = torch.randint(0, V, (BATCH, LENGTH), generator=g)
    weights = torch.rand(BATCH, LENGTH, generator=g, dtype=torch.float64)
    weights[1], weights[2, ::3] = 0.0, 0.0
    return hidden.to(dtype), weight.to(dtype), hidden_t.to(dtype), weight_t.to(dtype), labels, weights


def _dense(inputs, mix: Mix):
    """Loss, gradients of hidden and head, and the terms, in float64 by autograd on whole logits."""
    hidden, weight, hidden_t, weight_t = (x.detach().double().clone() for x in inputs[:4])
    labels, weights = inputs[4], inputs[5].double()
    hidden.requires_grad_(True)
    weight.requires_grad_(True)
    z, z_t = ((h @ w.t())[..., :V].transpose(0, 1) for h, w in ((hidden, weight), (hidden_t, weight_t)))
    log_p, log_q = (F.log_softmax(x / mix.temperature, -1) for x in (z, z_t))
    if mix.loss == "forward_kl":
        kd = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    elif mix.loss == "reverse_kl":
        kd = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    elif mix.loss == "jsd":
        log_m = (BETA * log_q.exp() + (1 - BETA) * log_p.exp()).log()
        kd = BETA * F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
        kd = kd + (1 - BETA) * F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    else:
        chosen = z_t.topk(mix.top_k, -1).indices
        q, p = log_q.exp().gather(-1, chosen), log_p.exp().gather(-1, chosen)
        q, p = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (q, p))
        kd = (q * (q / p).log()).sum(-1)
    kd = mix.temperature**2 * kd
    lm = F.cross_entropy(z.reshape(-1, V), labels.reshape(-1), reduction="none").view_as(labels)
    loss = ((mix.kd_weight * kd + mix.lm_weight * lm) * weights).sum()
    loss.backward()
    agree = (z.argmax(-1) == z_t.argmax(-1)).double()
    return loss.detach(), hidden.grad, weight.grad, kd.detach(), lm.detach(), agree


def _ours(dtype, mix: Mix, scattered: bool = False, memory: int | None = SMALL, whole_teacher: bool = False):
    hidden, weight, hidden_t, weight_t, labels, weights = _inputs(dtype)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if world > 1 else 0
    rows = slice(rank * PADDED // world, (rank + 1) * PADDED // world)
    tokens = slice(rank * LENGTH // world, (rank + 1) * LENGTH // world) if scattered else slice(None)
    hidden = hidden[tokens].clone().requires_grad_(True)
    weight = weight[rows].clone().requires_grad_(True)
    # a teacher that is whole on each rank has a table that ends with the vocabulary
    teacher = Head(hidden_t, weight_t[:V][rows]) if whole_teacher else Head(hidden_t[tokens], weight_t[rows])
    found = head_losses(
        Head(hidden, weight),
        labels,
        weights,
        vocab_size=V,
        teacher=teacher,
        mix=mix,
        vocab_start=rows.start,
        group=torch.distributed.group.WORLD if world > 1 else None,
        memory_bytes=memory,
    )
    (found.loss * 3.0).backward()
    hidden.grad /= 3.0
    weight.grad /= 3.0
    t = found.terms
    return found.loss.detach(), hidden.grad, weight.grad, t["kd_loss"], t["lm_loss"], t["top1_agreement"]


@contextmanager
def _in_columns(columns: int = 11):
    """Every call that may, makes its logits twice, some columns at a time."""
    fit = Sizes.fit.__func__

    def pieces(cls, *args, **options):
        found = fit(cls, *args, **options)
        return replace(found, columns=columns if options["halves"] else 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sizes, "fit", classmethod(pieces))
        yield


def _in_columns_mixes(scattered: bool):
    with _in_columns():
        return [_ours(dtype, mix, scattered) for dtype in DTYPES for mix in HALVES]


def _all_mixes(scattered: bool, whole_teacher: bool):
    return [_ours(dtype, mix, scattered, whole_teacher=whole_teacher) for dtype in DTYPES for mix in MIXES]


DTYPES = {torch.float64: 1e-6, torch.float32: 1e-5}


def _assert_equal(ours, dense, tolerance, what):
    for name, found, expected in zip(("loss", "d hidden", "d weight", "kd", "lm", "agree"), ours, dense, strict=True):
        error = ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
        assert error <= tolerance, f"{what}: {name} off by {error:.1e}"


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", [1, SMALL, None], ids=["one token", "small", "default"])
def test_one_rank_equals_dense(dtype, mix, memory):
    _assert_equal(_ours(dtype, mix, memory=memory), _dense(_inputs(dtype), mix), DTYPES[dtype], mix)


@pytest.mark.parametrize("world,scattered", [(2, False), (2, True), (4, False), (4, True)])
def test_tensor_parallel_equals_dense(world, scattered):
    """With and without sequence parallel; at 4 ranks the last one holds padding alone."""
    ranks = run_ranks(_all_mixes, world, scattered, False)
    for i, (dtype, mix) in enumerate(itertools.product(DTYPES, MIXES)):
        dense = _dense(_inputs(dtype), mix)
        parts = [rank[i] for rank in ranks]
        hidden = torch.cat([p[1] for p in parts]) if scattered else parts[0][1]
        weight = torch.cat([p[2] for p in parts])
        for loss, _, _, *terms in parts:
            _assert_equal((loss, hidden, weight, *terms), dense, DTYPES[dtype], f"{mix} {dtype}")


@pytest.mark.parametrize("world,scattered", [(1, False), (2, False), (2, True), (4, False), (4, True)])
def test_columns_in_pieces_equal_dense(world, scattered):
    ranks = run_ranks(_in_columns_mixes, world, scattered) if world > 1 else [_in_columns_mixes(scattered)]
    for i, (dtype, mix) in enumerate(itertools.product(DTYPES, HALVES)):
        parts = [rank[i] for rank in ranks]
        hidden = torch.cat([p[1] for p in parts]) if scattered else parts[0][1]
        weight = torch.cat([p[2] for p in parts])
        for loss, _, _, *terms in parts:
            ours = (loss, hidden, weight, *terms)
            _assert_equal(ours, _dense(_inputs(dtype), mix), DTYPES[dtype], f"{mix} {dtype}")


def test_columns_in_pieces_serve_cross_entropy_and_no_gradient():
    hidden, weight, hidden_t, weight_t, labels, weights = _inputs()
    dense = _dense(_inputs(), Mix(kd_weight=0.0, lm_weight=1.0))
    student = Head(hidden.requires_grad_(True), weight.requires_grad_(True))
    with _in_columns():
        found = head_losses(student, labels, weights, vocab_size=V, memory_bytes=SMALL)
        found.loss.backward()
        with torch.no_grad():
            kd = head_losses(student, labels, weights, vocab_size=V, teacher=Head(hidden_t, weight_t), mix=MIXES[0])
    torch.testing.assert_close(found.loss.detach(), dense[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(hidden.grad, dense[1], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(weight.grad, dense[2], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(kd.terms["kd_loss"], _dense(_inputs(), MIXES[0])[3], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_columns_in_pieces_are_zero_at_equality(kind):
    hidden, weight, _, _, labels, weights = _inputs(torch.bfloat16)
    student = Head(hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True))
    with _in_columns():
        found = head_losses(
            student, labels, weights, vocab_size=V, teacher=Head(hidden, weight), mix=Mix(kind, temperature=2.0)
        )
        found.loss.backward()
    assert found.terms["kd_loss"].abs().max() <= 1e-6
    assert student.hidden.grad.abs().max() <= 1e-6 and student.weight.grad.abs().max() <= 1e-6


def test_a_teacher_whole_on_each_rank_equals_dense():
    for i, (dtype, mix) in enumerate(itertools.product(DTYPES, MIXES)):
        if i == 0:
            ranks = run_ranks(_all_mixes, 2, False, True)
        loss, hidden, _, *terms = ranks[1][i]
        weight = torch.cat([rank[i][2] for rank in ranks])
        _assert_equal((loss, hidden, weight, *terms), _dense(_inputs(dtype), mix), DTYPES[dtype], f"{mix} {dtype}")


def test_padding_receives_no_gradient():
    assert _ours(torch.float32, MIXES[0])[2][V:].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_loss_and_gradient_at_equality(kind, dtype):
    hidden, weight, _, _, labels, weights = _inputs(dtype)
    student = Head(hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True))
    mix = Mix(kind, temperature=2.0, jsd_beta=BETA, top_k=K)
    found = head_losses(student, labels, weights, vocab_size=V, teacher=Head(hidden, weight), mix=mix)
    found.loss.backward()
    bound = 1e-6 if kind == "topk" else 0.0  # its tail is a sum of its own on either side
    assert found.terms["kd_loss"].abs().max() <= bound
    assert student.hidden.grad.abs().max() <= bound and student.weight.grad.abs().max() <= bound
    assert found.terms["top1_agreement"].min() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_is_all_masked_gives_zero(kind):
    hidden, weight, hidden_t, weight_t, labels, weights = _inputs(torch.float32)
    student = Head(hidden.requires_grad_(True), weight.requires_grad_(True))
    mix = Mix(kind, lm_weight=0.5)
    teacher = Head(hidden_t, weight_t)
    found = head_losses(student, labels, torch.zeros_like(weights), vocab_size=V, teacher=teacher, mix=mix)
    found.loss.backward()
    assert found.loss == 0 and hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_sequences_changes_nothing(kind):
    """Nor does their division into micro-batches."""
    hidden, weight, hidden_t, weight_t, labels, weights = _inputs()
    weight.requires_grad_(True)

    def run(groups):
        weight.grad = None
        total = torch.zeros((), dtype=torch.float64)
        for group in groups:
            found = head_losses(
                Head(hidden[:, group], weight), labels[group], weights[group], vocab_size=V,
                teacher=Head(hidden_t[:, group], weight_t), mix=Mix(kind, lm_weight=0.2),
            )  # fmt: skip
            found.loss.backward()
            total += found.loss.detach()
        return total, weight.grad

    expected = run([[0, 1, 2]])
    for groups in ([[2, 0, 1]], [[1], [0], [2]], [[2, 1], [0]]):
        for ours, reference in zip(run(groups), expected, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind):
    hidden, weight, hidden_t, weight_t, labels, weights = _inputs(torch.float32)
    student = Head((hidden * 100).requires_grad_(True), weight.requires_grad_(True))
    teacher = Head(hidden_t * 100, weight_t)
    found = head_losses(student, labels, weights, vocab_size=V, teacher=teacher, mix=Mix(kind, lm_weight=0.5))
    found.loss.backward()
    assert torch.isfinite(found.loss) and torch.isfinite(student.hidden.grad).all()


def test_top_k_of_everything_is_forward_kl():
    for kind in ("forward_kl", "topk"):
        results = [_ours(torch.float64, Mix(kind, 2.0, top_k=k)) for kind, k in (("forward_kl", 1), ("topk", 1000))]
        _assert_equal(results[1], results[0], 1e-12, kind)


def test_cross_entropy_alone_ignores_padding():
    hidden, weight, _, _, labels, weights = _inputs()
    mix = Mix(kd_weight=0.0, lm_weight=1.0)
    dense = _dense(_inputs(), mix)
    hidden.requires_grad_(True)
    weight.requires_grad_(True)
    found = head_losses(Head(hidden, weight), labels, weights, vocab_size=V, memory_bytes=SMALL)
    found.loss.backward()
    assert set(found.terms) == {"loss", "lm_loss"}
    for ours, expected in zip((found.loss, hidden.grad, weight.grad, found.terms["lm_loss"]), (*dense[:3], dense[4]),
                              strict=True):  # fmt: skip
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_products_keep_float32_sums(autocast):
    """bf16 rounds the logits (2⁻⁹ relative) and their gradients, not the sums over chunks; dtypes stay."""
    inputs = _inputs(torch.bfloat16)
    kind = torch.float32 if autocast else torch.bfloat16
    hidden, weight = (x.to(kind).requires_grad_(True) for x in inputs[:2])
    dense = _dense(inputs, Mix(lm_weight=0.3))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = head_losses(
            Head(hidden, weight), *inputs[4:], vocab_size=V, teacher=Head(inputs[2].to(kind), inputs[3].to(kind)),
            mix=Mix(lm_weight=0.3), memory_bytes=SMALL,
        )  # fmt: skip
    found.loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == kind and found.loss.dtype == torch.float32
    for ours, expected in zip((found.loss, hidden.grad, weight.grad), dense, strict=False):
        assert (ours.double() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_head_of_the_distribution_serves_as_well_as_the_logits(temperature):
    hidden, weight, hidden_t, weight_t, labels, weights = _inputs()
    mix = Mix("topk", temperature, 0.7, 0.3, top_k=K)
    known = head_top_k(Head(hidden_t, weight_t), K, temperature, vocab_size=V)
    assert known.tokens.shape == (BATCH, LENGTH, K) and known.log_tail.shape == (BATCH, LENGTH)
    total = known.log_probs.exp().sum(-1) + known.log_tail.exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    student = Head(hidden.requires_grad_(True), weight.requires_grad_(True))
    found = head_losses(student, labels, weights, vocab_size=V, teacher=known, mix=mix, memory_bytes=SMALL)
    found.loss.backward()
    t = found.terms
    ours = found.loss.detach(), hidden.grad, weight.grad, t["kd_loss"], t["lm_loss"], t["top1_agreement"]
    _assert_equal(ours, _dense(_inputs(), mix), 1e-12, mix)


def test_a_second_backward_is_refused():
    hidden, weight, *_, labels, weights = _inputs()
    found = head_losses(Head(hidden.requires_grad_(True), weight), labels, weights, vocab_size=V)
    found.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="again"):
        found.loss.backward()


def test_only_top_k_learns_from_a_known_head():
    hidden, weight, hidden_t, weight_t, labels, weights = _inputs()
    known = head_top_k(Head(hidden_t, weight_t), K, 1.0, vocab_size=V)
    with pytest.raises(MinitronError, match=r"expected distill\.loss=topk, found forward_kl"):
        head_losses(Head(hidden, weight), labels, weights, vocab_size=V, teacher=known, mix=Mix())
