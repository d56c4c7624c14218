"""The final norm's weights move as a dense float64 natural gradient says, with the loss as their guard."""

import pytest
import torch
from torch.nn import functional as F

from nemo_minitron.model import layout
from nemo_minitron.model.decoder import rms_norm
from nemo_minitron.prune import gain
from tests.importance.reference import answers
from tests.prune.test_resolve import (
    EVEN,
    SHAPE,
    TARGETS,
    TIED,
    TOKENS,
    model_in_float32,
    plan_for,
    stream,
    student_of,
    written_by,
)

NORM = (layout.FINAL_NORM.key, None)
GIVEN = {"ffn": 0.3, "attention": 0.5, "read": 0.03, "rescale": True}


def pair(shape, target, tokens, dtype=torch.float32, counted=None):
    """A student before and after its final norm's channels are weighted anew."""
    model, weights = model_in_float32(shape), torch.ones(6, *tokens.shape)
    plans = (plan_for(shape, TARGETS[target], regain=regain, **GIVEN) for regain in (False, True))
    return tuple(student_of(model, plan, tokens, weights, dtype=dtype, counted=counted) for plan in plans)


def loss_of(student, tokens, norm, counted=None):
    """Of the next tokens, summed, dense in float64, and the normed stream that it is made of."""
    shape = student.shape
    row = layout.EMBEDDING if shape.share_embeddings_and_output_weights else layout.OUTPUT
    h = rms_norm(stream(student, tokens), None, shape.layernorm_epsilon).double()[:, :-1].flatten(0, 1)
    table = student.tensor(row)[: shape.vocab_size].double()
    some = slice(None) if counted is None else counted[:, :-1].flatten()
    return lambda change: F.cross_entropy(h[some] * norm.double() * (1 + change) @ table.T,
                                          tokens[:, 1:].flatten()[some], reduction="none")  # fmt: skip


@pytest.mark.parametrize("counted", [None, answers(48, 33)], ids=["all", "some"])
@pytest.mark.parametrize("target", ["ffn", "hidden", "layers"])
@pytest.mark.parametrize("shape", [SHAPE, TIED], ids=["untied", "tied"])
def test_the_step_is_that_of_dense_float64(shape, target, counted):
    model = model_in_float32(shape)
    tokens = written_by(model)
    plain, found = pair(shape, target, tokens, counted=counted)
    for slot, tensor in plain.tensors.items():
        assert slot == NORM or torch.equal(tensor, found.tensors[slot]), slot
    losses = loss_of(plain, tokens, plain.tensors[NORM], counted)
    zero = torch.zeros(plain.shape.hidden_size, dtype=torch.float64)
    each = torch.autograd.functional.jacobian(losses, zero)  # gradients of every token's loss
    fisher = each.T @ each + gain.GAIN_PULL * torch.eye(len(zero), dtype=torch.float64)
    step = -torch.linalg.solve(fisher, each.sum(0))
    ratio = found.tensors[NORM].double() / plain.tensors[NORM].double() - 1
    torch.testing.assert_close(ratio, step, rtol=1e-3, atol=1e-5)
    assert step.abs().max() > 0.01
    assert losses(ratio).sum() + gain.GAIN_PULL / 2 * ratio.square().sum() < losses(zero).sum()


def test_a_handful_of_tokens_moves_next_to_nothing():
    plain, found = pair(SHAPE, "ffn", TOKENS[:1, :4])
    ratio = found.tensors[NORM] / plain.tensors[NORM]
    assert 0 < (ratio - 1).abs().max() < 0.05


def test_no_token_to_predict_leaves_the_norm():
    plain, found = pair(SHAPE, "ffn", TOKENS[:, :1])
    assert torch.equal(plain.tensors[NORM], found.tensors[NORM])


def test_fewer_tokens_are_evenly_spread(monkeypatch):
    """A bound of an eighth of the tokens looks at every eighth position."""
    seen = []
    real = gain.norm_gradients
    monkeypatch.setattr(gain, "norm_gradients", lambda x, *others: seen.append(len(x)) or real(x, *others))
    monkeypatch.setattr(gain, "GAIN_TOKENS", TOKENS[:, 1:].numel() // 8)
    pair(SHAPE, "ffn", TOKENS)
    assert seen == [4] * len(TOKENS)


def test_fewer_of_those_that_count_are_evenly_spread(monkeypatch):
    """A bound of a third of the labels that count looks at every third of each sample."""
    counted, seen = answers(12, 33), []
    real = gain.norm_gradients
    monkeypatch.setattr(gain, "norm_gradients", lambda x, labels, *o: seen.append(labels) or real(x, labels, *o))
    count = int(counted[:, :-1].sum())
    monkeypatch.setattr(gain, "GAIN_TOKENS", count // 3)
    pair(SHAPE, "ffn", TOKENS, counted=counted)
    for sample, labels in enumerate(seen):
        expected = [int(TOKENS[sample, at + 1]) for at in range(32) if counted[sample, at]][::3]
        assert labels.tolist() == expected, sample


@pytest.mark.parametrize(("worse_until", "part"), [(0, 1.0), (1, 0.5), (2, 0.25), (3, 0.0)])
def test_a_step_too_far_is_shortened_or_left(worse_until, part, monkeypatch):
    plain, whole = pair(SHAPE, "ffn", TOKENS)
    step = whole.tensors[NORM] / plain.tensors[NORM] - 1
    calls = []

    def sums(x, *others):  # the first call of each round is the loss before, the others are those after
        calls.append(1)
        tried = (len(calls) - 1) // len(TOKENS)
        return torch.tensor([10.0 if tried == 0 else (1e4 if tried <= worse_until else 1.0)], dtype=torch.float64)

    monkeypatch.setattr(gain, "loss_sums", sums)
    _, found = pair(SHAPE, "ffn", TOKENS)
    torch.testing.assert_close(found.tensors[NORM] / plain.tensors[NORM] - 1, part * step, rtol=1e-3, atol=1e-6)


def test_the_same_bits_whoever_sees_which_sample():
    model = model_in_float32(SHAPE)
    plan = plan_for(SHAPE, TARGETS["all"], regain=True, **GIVEN)
    order = torch.randperm(len(TOKENS), generator=torch.Generator().manual_seed(6))
    reference, other = student_of(model, plan), student_of(model, plan, TOKENS[order], EVEN[:, order])
    assert torch.equal(reference.tensors[NORM], other.tensors[NORM])


def test_bfloat16_weights_are_judged_as_they_are_stored(monkeypatch):
    judged = []
    real = gain.loss_sums
    monkeypatch.setattr(gain, "loss_sums", lambda *given: judged.extend(given[2:4]) or real(*given))
    plain, found = pair(SHAPE, "ffn", TOKENS, torch.bfloat16)
    assert found.tensors[NORM].dtype == torch.bfloat16 and not torch.equal(plain.tensors[NORM], found.tensors[NORM])
    assert judged and all(torch.equal(weight, weight.bfloat16().float()) for weight in judged)
    assert any(torch.equal(weight, found.tensors[NORM].float()) for weight in judged)
