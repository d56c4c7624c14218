"""Reductions against numpy, and that they are additive."""

import numpy as np
import pytest
import torch

from nemo_minitron.errors import MinitronError
from nemo_minitron.importance.depth import _sums_by_token, block_influence, residual_sums
from nemo_minitron.importance.reductions import (
    HOW,
    Aggregation,
    batch_statistic,
    batch_sums,
    sequence_statistic,
    sequence_sums,
    units,
)

X = torch.randn(9, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()  # [s, b, C]


def numpy_sequence(x, how):
    return {"mean": np.abs(x).mean(0), "l2": np.sqrt((x**2).sum(0)), "var": x.var(0)}[how]


@pytest.mark.parametrize("how", HOW)
def test_sequence(how):
    got = sequence_statistic(sequence_sums(X), torch.full((4,), 9), how)
    np.testing.assert_allclose(got, numpy_sequence(X.double().numpy(), how), rtol=1e-6)


@pytest.mark.parametrize("how", HOW)
def test_batch(how):
    y = X[0].double().abs()
    got = batch_statistic(batch_sums(y[:1]) + batch_sums(y[1:]), 4, how)
    expected = {"mean": y.mean(0), "l2": y.norm(dim=0), "var": y.var(0, correction=0)}[how]
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_masked_tokens_do_not_count_whatever_they_hold():
    mask = torch.ones(9, 4, dtype=torch.bool)
    mask[:3, 1] = False
    poisoned = X.clone()
    poisoned[:3, 1] = torch.nan
    got = sequence_statistic(sequence_sums(poisoned, mask), mask.sum(0), "mean")
    np.testing.assert_allclose(got[1], X[3:, 1].double().abs().mean(0), rtol=1e-6)
    np.testing.assert_allclose(got[0], X[:, 0].double().abs().mean(0), rtol=1e-6)


def test_a_split_sequence_adds_up():
    torch.testing.assert_close(sequence_sums(X[:4]) + sequence_sums(X[4:]), sequence_sums(X))


def test_bfloat16_is_accumulated_in_full_precision():
    x = torch.full((5000, 1, 1), 1.0, dtype=torch.bfloat16)
    assert sequence_sums(x)[:, 0, 0].tolist() == [5000.0] * 3


def test_heads_are_group_major_where_model_optimizer_reads_them_crosswise():
    """Two groups of three heads: group 0 owns heads 0-2. Viewed as (heads, groups) it would own 0, 2 and 4."""
    channels = torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    assert units(channels, 2).tolist() == [5.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert units(channels, 6).tolist() == pytest.approx([5.0, 3.0**0.5])


def test_units_by_the_mean_of_their_channels():
    assert units(torch.tensor([3.0, 4.0, 0.0, 1.0]), 2, "mean").tolist() == [3.5, 0.5]


@pytest.mark.parametrize("residual_sums", [residual_sums, _sums_by_token], ids=["CPU", "GPU"])
def test_cosines(residual_sums):
    streams = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    streams[1] = 4 * streams[0]  # the same direction: no influence
    streams[2] = -streams[0]
    total, squares = residual_sums(streams, None)
    torch.testing.assert_close(block_influence(total / 7), torch.tensor([0.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(squares, streams.square().sum(1))
    mask = torch.tensor([True] * 4 + [False] * 3)
    parts = residual_sums(streams[:, :4], None)
    for got, expected in zip(residual_sums(streams, mask), parts, strict=True):
        torch.testing.assert_close(got, expected)
    assert residual_sums(torch.zeros(2, 3, 4), None)[0].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_unknown_aggregation():
    with pytest.raises(MinitronError, match=r"calibration.batch: expected one of .* found 'max'"):
        Aggregation(batch="max")
    with pytest.raises(MinitronError, match=r"calibration.unit: expected one of .* found 'max'"):
        Aggregation(unit="max")
