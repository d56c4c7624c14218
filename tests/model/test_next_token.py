"""Next-token losses and their gradient against a dense float64 computation, whole and a few tokens at a time."""

import pytest
import torch

from nemo_minitron.model import next_token
from nemo_minitron.model.next_token import IGNORED, loss_gradient, loss_sums, norm_gradients

EPSILON = 1e-5
SCALES = (0.5, 1.0, 1.25)


@pytest.fixture
def sample():
    """Stream ``[t, H]``, labels ``[t]`` with some that do not count, final norm ``[H]`` and output layer ``[V, H]``."""
    generator = torch.Generator().manual_seed(0)
    x, norm, head = (torch.randn(*size, generator=generator) for size in ((37, 16), (16,), (23, 16)))
    labels = torch.randint(0, 23, (37,), generator=generator)
    labels[[0, 9, 36]] = IGNORED
    return x, labels, norm, head


def dense(x, labels, norm, head, scale=1.0):
    """Summed loss by its definition, in float64."""
    normed = x / (x.square().mean(dim=-1, keepdim=True) + EPSILON).sqrt() * norm.double() * scale
    log_probs = normed @ head.double().T
    log_probs = log_probs - log_probs.exp().sum(dim=-1, keepdim=True).log()
    counted = labels >= 0
    return -log_probs[counted, labels[counted]].sum()


@pytest.mark.parametrize("budget", [next_token.HEAD_BYTES, 4 * 23 * 5, 1], ids=["whole", "five tokens", "one token"])
def test_sums_are_those_of_dense_float64(sample, budget, monkeypatch):
    monkeypatch.setattr(next_token, "HEAD_BYTES", budget)
    x, labels, norm, head = sample
    found = loss_sums(x, labels, norm, head, EPSILON, SCALES)
    expected = torch.stack([dense(x.double(), labels, norm, head, scale) for scale in SCALES])
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert torch.equal(found * 2**20, (found * 2**20).round())


@pytest.mark.parametrize("budget", [next_token.HEAD_BYTES, 4 * 23 * 5, 1], ids=["whole", "five tokens", "one token"])
def test_gradient_is_that_of_dense_float64(sample, budget, monkeypatch):
    monkeypatch.setattr(next_token, "HEAD_BYTES", budget)
    x, labels, norm, head = sample
    wide = x.double().requires_grad_(True)
    (expected,) = torch.autograd.grad(dense(wide, labels, norm, head), wide)
    found = loss_gradient(x, labels, norm, head, EPSILON)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert not found[[0, 9, 36]].any()


def test_no_token_costs_nothing(sample):
    x, labels, norm, head = sample
    assert loss_sums(x[:0], labels[:0], norm, head, EPSILON).tolist() == [0.0]
    assert loss_gradient(x[:0], labels[:0], norm, head, EPSILON).shape == (0, 16)


@pytest.mark.parametrize("budget", [next_token.HEAD_BYTES, 4 * 23 * 5, 1], ids=["whole", "five tokens", "one token"])
def test_gradients_of_the_norm_are_those_of_dense_float64(sample, budget, monkeypatch):
    """Of each token alone, with respect to relative changes."""
    monkeypatch.setattr(next_token, "HEAD_BYTES", budget)
    x, labels, norm, head = sample
    found = norm_gradients(x, labels, norm, head, EPSILON)
    for token in range(len(x)):
        change = torch.zeros(16, dtype=torch.float64, requires_grad=True)
        loss = dense(x[token : token + 1].double(), labels[token : token + 1], norm * (1 + change), head)
        (expected,) = torch.autograd.grad(loss, change)
        torch.testing.assert_close(found[token].double(), expected, rtol=1e-5, atol=1e-5)
    assert not found[[0, 9, 36]].any()
