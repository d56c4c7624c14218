"""Moments, ridge regression and elimination against dense float64 linear algebra."""

import itertools
import math

import numpy as np
import pytest
import torch

from nemo_minitron.moments import (
    SingularMoments,
    elimination_order,
    loss_shares,
    metric_root,
    quantum,
    ridge_solve,
    second_moment,
    squares,
    stream_weights,
    two_pass_moments,
)


def activations(tokens, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, channels, generator=generator, dtype=torch.float64) @ mixing


def test_second_moment_is_the_weighted_sum_and_additive():
    x, y = activations(9000, 7), activations(9000, 5, seed=1)
    weights = torch.rand(9000, dtype=torch.float64)
    expected = (x * weights[:, None]).T @ y
    shaped = second_moment(x.view(3, 3000, 7).float(), y.view(3, 3000, 5).float(), weights.view(3, 3000))
    torch.testing.assert_close(shaped, expected, rtol=1e-5, atol=1e-4 * float(expected.abs().max()))
    parts = second_moment(x[:4000], y[:4000]) + second_moment(x[4000:], y[4000:])
    torch.testing.assert_close(parts, x.T @ y, rtol=1e-5, atol=1e-4 * float((x.T @ y).abs().max()))
    assert second_moment(x[:0], y[:0]).abs().sum() == 0


def test_rounded_products_add_up_to_the_same_bits_in_any_order():
    x, y = activations(4000, 9) * torch.logspace(-6, 3, 9), activations(4000, 5, seed=1)
    weights = torch.rand(4000)
    step = quantum(squares(x, weights), squares(y, weights))
    sums = []
    for seed in range(5):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        total = torch.zeros(9, 5, dtype=torch.float64)
        for part in order.tolist():
            some = slice(100 * part, 100 * part + 100)
            total += second_moment(x[some], y[some], weights[some], step)
        sums.append(total)
    for other in sums[1:]:
        assert torch.equal(other, sums[0])
    exact = second_moment(x, y, weights)
    assert float((sums[0] - exact).abs().max()) < 1e-6 * float(exact.abs().max())
    assert math.log2(step).is_integer() and quantum(torch.zeros(3), torch.ones(3)) == 0


def test_two_passes_give_the_same_bits_in_any_order_and_those_of_dense_float64():
    x, y = activations(4000, 9) * torch.logspace(-6, 3, 9), activations(4000, 5, seed=1)
    weights = torch.rand(4000)
    sums = []
    for seed in range(3):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()

        def parts(sample, order=order):
            some = slice(100 * order[sample], 100 * order[sample] + 100)
            return x[some], y[some], weights[some]

        sums.append(two_pass_moments(parts, 40, (9, 5), x.device))
    weighted = x * weights.double()[:, None]
    for found, expected in zip(sums[0], (weighted.T @ x, weighted.T @ y), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    for other in sums[1:]:
        assert all(map(torch.equal, other, sums[0]))
    nothing = two_pass_moments(lambda sample: (x, y, None), 0, (9, 5), x.device)
    assert [tuple(moment.shape) for moment in nothing] == [(9, 9), (9, 5)]
    assert not any(moment.any() for moment in nothing)


def test_ridge_solution_is_that_of_the_stacked_least_squares():
    x, y = activations(300, 12), activations(300, 4, seed=1)
    prior = torch.randn(4, 12, dtype=torch.float64)
    lam = 0.3 * x.square().sum(dim=0).mean()
    stacked = torch.cat((x, lam.sqrt() * torch.eye(12, dtype=torch.float64)))
    wanted = torch.cat((y, lam.sqrt() * prior.T))
    expected = torch.linalg.lstsq(stacked, wanted).solution.T
    torch.testing.assert_close(ridge_solve(x.T @ x, x.T @ y, prior, 0.3), expected)


def test_without_information_the_prior_stays_and_a_warning_says_so():
    prior = torch.randn(4, 12)
    nothing = torch.zeros(12, 12, dtype=torch.float64)
    with pytest.warns(SingularMoments, match="do not determine"):
        assert ridge_solve(nothing, torch.zeros(12, 4, dtype=torch.float64), prior, 0.3) is prior


def test_one_token_is_enough_with_a_ridge():
    x, y, prior = activations(1, 12), activations(1, 4, seed=1), torch.randn(4, 12, dtype=torch.float64)
    solved = ridge_solve(x.T @ x, x.T @ y, prior, 1e-6)
    torch.testing.assert_close(solved @ x[0], y[0], rtol=1e-3, atol=1e-3)


def remaining_error(x, weight, kept, lam):
    """Least squared error of ``weight @ x`` from the kept inputs alone, ridge included: dense, per subset."""
    moment = x.T @ x + lam * torch.eye(x.shape[1], dtype=x.dtype)
    cross = moment[:, kept]
    best = torch.linalg.solve(moment[kept][:, kept], cross.T @ weight.T)
    return float((weight @ moment @ weight.T).trace() - (cross.T @ weight.T * best).sum())


@pytest.mark.parametrize("unit", [1, 3])
def test_each_step_removes_the_unit_whose_loss_is_least_after_resolving(unit):
    x, weight = activations(200, 12), activations(5, 12, seed=3)
    ridge = 0.01
    lam = float(ridge * x.square().sum(dim=0).mean())
    worth = elimination_order(x.T @ x, weight, ridge, unit=unit, steps=1000)
    assert sorted(worth.tolist()) == list(range(12 // unit))
    alive = list(range(12 // unit))
    for expected_gone in worth.argsort().tolist()[:-1]:
        errors = {}
        for candidate in alive:
            kept = [u * unit + i for u in alive if u != candidate for i in range(unit)]
            errors[candidate] = remaining_error(x, weight, kept, lam)
        assert min(errors, key=errors.get) == expected_gone
        alive.remove(expected_gone)


def test_a_copy_is_worth_nothing_however_large():
    x = activations(500, 6)
    x = torch.cat((x, 100 * x[:, :1]), dim=1)  # input 6 repeats input 0
    weight = torch.randn(3, 7, dtype=torch.float64)
    weight[:, 6] *= 50
    worth = elimination_order(x.T @ x, weight, 1e-9)
    assert 0 in (worth[0], worth[6])


def test_the_metric_decides_which_output_counts():
    x = torch.randn(1000, 2, dtype=torch.float64)
    weight = torch.diag(torch.tensor([10.0, 1.0], dtype=torch.float64))
    assert elimination_order(x.T @ x, weight, 1e-6)[1] == 0
    metric = torch.diag(torch.tensor([1e-6, 1.0], dtype=torch.float64))
    assert elimination_order(x.T @ x, metric_root(metric) @ weight, 1e-6)[0] == 0
    full = activations(50, 4)
    torch.testing.assert_close(metric_root(full.T @ full) @ metric_root(full.T @ full), full.T @ full)


def test_several_at_once_are_ranked_like_one_by_one_where_they_do_not_interact():
    scale = np.arange(1.0, 33.0)
    moment = torch.diag(torch.from_numpy(scale))
    orders = [elimination_order(moment, torch.ones(1, 32), 1e-9, steps=s) for s in (1, 5, 32)]
    for one, other in itertools.pairwise(orders):
        assert torch.equal(one, other)


def test_stream_weights_undo_the_scale_of_a_token():
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(stream_weights(10 * x), stream_weights(x) / 100, check_dtype=False)


def test_tokens_that_do_not_count_weigh_what_the_loss_depends_on_them():
    norms = torch.tensor([[3.0, 1.0, 2.0, 4.0, 0.0], [0.0] * 5])
    counted = torch.tensor([[False, True, False, True, False], [False] * 5])
    expected = [[1.0, 1.0, 4.0 / 8.5, 1.0, 0.0], [0.0] * 5]  # 8.5 is the mean of 1 and 16, and less than 9
    torch.testing.assert_close(loss_shares(norms, counted), torch.tensor(expected))
    some = torch.tensor([[0.0, 0.0], [1e-12, 2e-12]])
    assert torch.equal(loss_shares(some, torch.tensor([[True, True], [True, True]])), torch.ones(2, 2))
    assert torch.equal(
        loss_shares(torch.zeros(1, 3), torch.tensor([[False, True, False]])), torch.tensor([[0.0, 1, 0]])
    )
