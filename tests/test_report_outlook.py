"""What the report says of more training: what a line through a curve says, or that it cannot be told."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_minitron.report.curves import Curve, Training
from nemo_minitron.report.outlook import outlook, slope_of


def _curve(change: float, noise: float, count: int = 60, last: float = 61440.0) -> Curve:
    """A loss of 2.0 at the end that changes by ``change`` with every doubling, and other things at the start."""
    at = np.linspace(last / count, last, count)
    values = 2.0 + change * np.log2(at / last) + noise * np.random.default_rng(0).standard_normal(count)
    values[at < last / 4] += 5.0
    return Curve(at, values)


def test_a_slope_is_that_of_the_last_two_doublings():
    found = slope_of(_curve(-0.25, 0.0))
    assert found is not None and found.change == pytest.approx(-0.25) and found.error == pytest.approx(0.0, abs=1e-12)
    assert found.level == pytest.approx(2.0) and found.first == 15360 and found.last == 61440 and found.number == 46


def test_its_error_is_that_of_the_noise():
    """By another way: the covariance that numpy's fit has."""
    curve = _curve(-0.25, 0.1)
    late = curve.at >= curve.at[-1] / 4
    line, covariance = np.polyfit(np.log2(curve.at[late]), curve.values[late], 1, cov=True)
    found = slope_of(curve)
    assert found is not None and found.change == pytest.approx(line[0])
    assert found.error == pytest.approx(2 * covariance[0, 0] ** 0.5)


def _training(**curves: Curve) -> Training:
    return Training("distill", curves, True, 61440, 60)


def test_a_curve_that_falls_is_extended_with_its_uncertainty():
    (said,) = outlook(_training(train_kd_loss=_curve(-0.25, 0.0)))
    assert said.startswith("Between 15,360 and 61,440 tokens the training's distance to the teacher (KD loss) fell by ")
    assert "0.250 ± 0.000 with every doubling of the tokens, to 2.000." in said
    assert "to between 1.750 and 1.750. Curves flatten" in said


def test_noise_is_not_taken_for_progress():
    for curve in (_curve(-0.01, 0.2), _curve(0.1, 0.01)):
        (said,) = outlook(_training(train_kd_loss=curve))
        assert "cannot be told from this run" in said


def test_validation_comes_first_and_little_says_nothing():
    many, few = _curve(-0.25, 0.0), Curve(np.array([100.0, 200.0]), np.array([1.0, 0.5]))
    assert "the validation's distance" in outlook(_training(val_kd_loss=many, train_kd_loss=many))[0]
    assert "the training's distance" in outlook(_training(val_kd_loss=few, train_kd_loss=many))[0]
    assert outlook(_training(val_kd_loss=few, train_kd_loss=few)) == []
    assert outlook(_training(train_lm_loss=many)) == []
    assert outlook(Training("distill", {"train_kd_loss": many}, by_tokens=False)) == []
