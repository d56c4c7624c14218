"""What more of the same training would bring, as far as its own curve can tell."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nemo_minitron.report.curves import Curve, Training

FEWEST = 8
"""Values of a curve below which nothing is said."""


class Slope(NamedTuple):
    """Change of a loss with every doubling of the tokens, nats/token, and twice its standard error; ``first`` and
    ``last`` tokens, and the ``number`` of values that it is measured on; ``level`` of the line at ``last``."""

    change: float
    error: float
    first: float
    last: float
    number: int
    level: float


def outlook(training: Training) -> list[str]:
    """A sentence or two on the distance to the teacher; none where a log has too few values or no tokens.

    Validation is taken where it has :data:`FEWEST` values, else the training's own loss, which is of text that the
    student had not yet learnt from as long as no text comes twice.
    """
    if not training.by_tokens:
        return []
    name = next((name for name in ("val_kd_loss", "train_kd_loss") if _enough(training.curves.get(name))), None)
    found = None if name is None else slope_of(training.curves[name])
    if found is None:
        return []
    of = "validation" if name == "val_kd_loss" else "training"
    span = f"Between {found.first:,.0f} and {found.last:,.0f} tokens the {of}'s distance to the teacher (KD loss)"
    if found.change + found.error >= 0:
        return [
            f"{span} changed by {_signed(found.change)} ± {found.error:.3f} with every doubling of the tokens: whether "
            "more of them would bring the student closer cannot be told from this run."
        ]
    low, high = (found.level + found.change + sign * found.error for sign in (-1, 1))
    return [
        f"{span} fell by {-found.change:.3f} ± {found.error:.3f} with every doubling of the tokens, to "
        f"{found.level:.3f}. At that pace twice the tokens would bring it to between {max(low, 0.0):.3f} and "
        f"{high:.3f}. Curves flatten, and the learning rate fell towards the end of this one: take it for the most "
        "that more of the same would bring."
    ]


def slope_of(curve: Curve) -> Slope | None:
    """Least squares of a loss against log₂ of the tokens, over the last two doublings: what came before is another
    phase. The error is twice the standard error, values taken for independent. None with fewer than :data:`FEWEST`."""
    late = (curve.at >= curve.at[-1] / 4) & (curve.at > 0)
    x, y = np.log2(curve.at[late]), curve.values[late]
    if len(x) < FEWEST or np.ptp(x) == 0:
        return None
    centred = x - x.mean()
    change = float(centred @ y / (centred @ centred))
    rest = y - y.mean() - change * centred
    error = math.sqrt(float(rest @ rest) / (len(x) - 2) / float(centred @ centred))
    level = float(y.mean() + change * centred[-1])
    return Slope(change, 2 * error, float(curve.at[late][0]), float(curve.at[-1]), len(x), level)


def _enough(curve: Curve | None) -> bool:
    return curve is not None and len(curve.at) >= FEWEST


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
