"""Distances of hidden states and the closed-form projection, against plain float64 formulas."""

from __future__ import annotations

import pytest
import torch

from nemo_minitron.config.sections import Distill
from nemo_minitron.distill.hidden import HiddenTerm, Projection, distance, outputs_of
from nemo_minitron.errors import MinitronError


def _states():
    g = torch.Generator().manual_seed(0)
    student = torch.randn(7, 3, 4, generator=g, dtype=torch.float64)
    return student, torch.randn(7, 3, 6, generator=g, dtype=torch.float64), torch.rand(7, 3, generator=g).double()


def test_projection_is_the_weighted_least_squares_solution():
    student, teacher, weights = _states()
    fit = Projection(ridge=0.0)
    for part in ([0], [1, 2]):  # over micro-batches
        fit.add(student[:, part], teacher[:, part], weights[:, part])
    root = weights.flatten().sqrt().unsqueeze(-1)
    expected = torch.linalg.lstsq(student.flatten(0, 1) * root, teacher.flatten(0, 1) * root).solution
    torch.testing.assert_close(fit.solve().double(), expected, rtol=1e-5, atol=1e-6)


def test_a_ridge_makes_few_tokens_enough():
    fit = Projection()
    fit.add(torch.ones(1, 1, 4), torch.ones(1, 1, 6), torch.ones(1, 1))
    assert torch.isfinite(fit.solve()).all()


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_distance_and_its_gradient(kind):
    student, teacher, _ = _states()
    projection = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda x: distance(x, teacher, projection, kind), student.requires_grad_(True))
    x = student.detach() @ projection
    if kind == "mse":
        expected = ((x - teacher) ** 2).sum(-1) / 6
    else:
        expected = 1 - (x * teacher).sum(-1) / (x.norm(dim=-1) * teacher.norm(dim=-1))
    torch.testing.assert_close(distance(student.detach(), teacher, projection, kind), expected)
    assert distance(teacher, teacher, None, kind).abs().max() < 1e-12


def test_hooks_go_with_their_context():
    layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(3))
    x = torch.ones(1, 3)
    with outputs_of(layers, [2]) as found:
        expected = layers[1](x)
        layers[0](x)
    assert list(found) == [2] and torch.equal(found[2], expected)
    layers[1](2 * x)
    assert torch.equal(found[2], expected)


@pytest.mark.parametrize("pairs", [[1], [[1, 2, 3]], [["a", 1]]])
def test_pairs_that_are_none_are_refused(pairs):
    with pytest.raises(MinitronError, match=r"distill\.hidden_pairs"):
        HiddenTerm.of(Distill(hidden_pairs=pairs))


def test_layers_that_do_not_exist_are_refused():
    with pytest.raises(MinitronError, match=r"names teacher layer 6; there are 1 to 5"):
        HiddenTerm.of(Distill(hidden_pairs=[[2, 5], [1, 6]])).check(2, 5)
    with pytest.raises(MinitronError, match=r"distill\.hidden_loss"):
        HiddenTerm(kind="l1")
