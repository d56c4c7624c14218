"""Predicted losses: shares from scores, a fit that finds what made its data, and ranks against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from nemo_minitron.errors import MinitronError
from nemo_minitron.importance.scores import Scores
from nemo_minitron.search import predict
from nemo_minitron.search.space import Space
from tests.importance.made import made
from tests.llamas import GQA


def make_scores(ranks: bool = False, seed: int = 0) -> Scores:
    generator = np.random.default_rng(seed)
    moment = {}
    if ranks:
        basis = np.linalg.qr(generator.normal(size=(64, 64)))[0]
        moment["stream_moment"] = basis * 2.0 ** -np.arange(64) @ basis.T
    return made(GQA, lambda size: generator.lognormal(size=size), reconstruction=ranks, **moment)


def test_shares_lost_are_those_of_the_units_cut():
    scores = make_scores()
    tables = predict.Features.of(scores).tables
    for kept in (0, 1, 40, 95, 96):
        lost = [np.sort(row)[: 96 - kept].sum() / row.sum() for row in scores.published["ffn"]]
        assert tables["ffn_hidden_size"][kept] == pytest.approx([np.mean(lost), 1 - kept / 96, (1 - kept / 96) ** 2])
    ordered = np.sort(scores.block_influence)
    assert tables["num_layers"][2, 0] == pytest.approx(ordered[0] / ordered.sum())
    halves = scores.published["heads"].reshape(3, 4, 2)
    assert tables["heads_per_group"][1, 0] == pytest.approx((halves.min(axis=2) / halves.sum(axis=2)).mean())
    assert all(np.abs(table[-1]).max() < 1e-12 for table in tables.values()), "nothing is lost where all is kept"


def test_hidden_channels_count_by_the_energy_of_the_turned_stream():
    table = predict.Features.of(make_scores(ranks=True)).tables["hidden_size"]
    assert table[[1, 2, 3, 10], 0] == pytest.approx([0.5, 0.25, 0.125, 2.0**-10], rel=1e-6)


def test_layers_follow_their_measured_loss_where_there_is_one():
    table = predict.Features.of(make_scores(), [0.0, 0.3, 0.2]).tables["num_layers"]
    assert table[:, 0] == pytest.approx([0.3, 0.3, 0.3, 0.0]), "damage never falls; its last slope goes on"


def shapes_and_rows(features: predict.Features):
    space = Space.of(GQA, min_fraction=0.3)
    shapes = [block.shape(at) for block in space.blocks() for at in range(0, len(block.sizes), 11)]
    return shapes, np.concatenate([features.vectors(shape) for shape in shapes])


def test_a_fit_on_enough_shapes_finds_the_coefficients_and_predicts_others():
    features = predict.Features.of(make_scores())
    shapes, rows = shapes_and_rows(features)
    truth = np.array([0.5, 0.1, 0.2, 1.0, 0.0, 0.0, 0.2, 0.3, 0.4, 0.0, 0.2, 0.0, 0.1, 0.0, 0.1])
    losses = 3.0 * np.exp(rows @ truth)
    predictor = predict.fit(features, shapes[::2], losses[::2], 3.0)
    others = [float(predictor(shape)[0]) for shape in shapes[1::2]]
    assert others == pytest.approx(losses[1::2], rel=0.01)
    assert predict.rank_correlation(others, losses[1::2]) > 0.99


def test_the_fit_is_non_negative_least_squares():
    features = predict.Features.of(make_scores())
    shapes, rows = shapes_and_rows(features)
    damage = rows @ np.linspace(-0.5, 1.0, 15) + 0.05 * np.random.default_rng(1).normal(size=len(rows))
    predictor = predict.fit(features, shapes, 2.0 * np.exp(damage), 2.0)
    expected, _ = optimize.nnls(rows, damage)
    ours = np.square(rows @ predictor.coefficients - damage).sum()
    theirs = np.square(rows @ expected - damage).sum()
    assert (predictor.coefficients >= 0).all() and theirs <= ours <= 1.02 * theirs + 1e-6


def test_one_measurement_scales_the_axes_that_were_not_measured():
    features = predict.Features.of(make_scores())
    before = predict.defaults(features, 3.0)
    shape = GQA.replace(ffn_hidden_size=48)
    doubled = 3.0 * (float(before(shape)[0]) / 3.0) ** 2
    after = predict.fit(features, [shape], [doubled], 3.0)
    assert float(after(shape)[0]) == pytest.approx(doubled, rel=1e-6)
    assert after.scale == pytest.approx(2.0)
    assert predict.fit(features, [], [], 3.0).table() == before.table()


def test_many_at_once_are_predicted_as_one_by_one():
    features = predict.Features.of(make_scores(ranks=True))
    predictor = predict.defaults(features, 2.5)
    for block in Space.of(GQA, min_fraction=0.5).blocks():
        many = predictor(block)
        assert [float(predictor(block.shape(at))[0]) for at in range(0, len(many), 13)] == pytest.approx(many[::13])
        rows = features.vectors(block)
        assert many == pytest.approx(2.5 * np.exp(rows @ predictor.coefficients))


def test_smaller_is_never_predicted_better():
    predictor = predict.defaults(predict.Features.of(make_scores(seed=4)))
    for name in ("hidden_size", "ffn_hidden_size", "num_layers"):
        whole = getattr(GQA, name)
        losses = [float(predictor(GQA.replace(**{name: size}))[0]) for size in range(1, whole + 1)]
        assert (np.diff(losses) <= 1e-12).all()


def test_damage_that_grows_faster_than_the_size_cut_is_followed_beyond_what_was_measured():
    """Two probes of one size, as a search makes them, and a third size that is cut more: a line would fall short."""
    features = predict.Features.of(make_scores())
    cut = np.array([1 - kept / 96 for kept in (80, 64, 40)])
    damage = 0.09 * cut + 0.3 * cut**2  # what ffn_hidden_size costs SmolLM2-135M
    shapes = [GQA.replace(ffn_hidden_size=kept) for kept in (80, 64, 40)]
    predictor = predict.fit(features, shapes[:2], 2.7 * np.exp(damage[:2]), 2.7)
    found = float(np.log(predictor(shapes[2])[0] / 2.7))
    assert found == pytest.approx(damage[2], rel=0.1)
    assert damage[1] / cut[1] * cut[2] < 0.8 * found, "the line through the second probe"


def test_loss_must_be_positive():
    with pytest.raises(MinitronError, match="losses must be positive"):
        predict.fit(predict.Features.of(make_scores()), [GQA.replace(num_layers=2)], [0.0], 3.0)


def test_rank_correlation_is_scipy_s():
    generator = np.random.default_rng(0)
    one = generator.integers(0, 6, size=30).astype(float)
    other = one + generator.integers(0, 6, size=30)
    assert predict.rank_correlation(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)
    assert predict.rank_correlation([1.0, 2.0], [3.0, 3.0]) is None and predict.rank_correlation([1.0], [2.0]) is None
