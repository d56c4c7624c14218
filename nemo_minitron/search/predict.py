"""Predicted loss of a shape, from scores and from a few measured students.

The damage of a shape is the logarithm of its loss over the source's, and is taken to add up over the axes that shrink:

    log(loss / loss_of_source) = sum over axes of  a * scores lost  +  b * size lost  +  c * (size lost)^2

all of them shares. Scores lost are, for FFN neurons, groups and heads (within their group), of the published scores,
mean over layers; for hidden channels of the residual stream's energy outside of the directions kept (its eigenvalues
where the scores hold ``stream_moment``, as compensation rotates the stream; else the squared scores); for layers of
Block Influence, or the loss without them where that was searched. The square is there because damage grows faster than
what is cut: what is kept makes up for the first units cut, and has less to do so with for every further one. Without it
a shape that halves one size looks far too good, and is what a search proposes.

The coefficients are not negative and come from ridge regression on measured students (at best of one shrunk axis
each, at two shares), pulled towards ``DEFAULTS`` times the one factor that fits these measurements best. Without
measurements the defaults serve as they are: those fit what students re-solved by ``minitron prune`` cost on
SmolLM2-135M, on Brown (``benchmarks/results/zero_shot_smollm2_135m.json``) and on Python's reference texts, by least
squares of relative errors, and tell shapes apart but promise no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nemo_minitron.errors import MinitronError
from nemo_minitron.importance.scores import Scores
from nemo_minitron.model.shape import ModelShape

AXES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups", "heads_per_group")
TERMS = ("scores", "size", "size_squared")
DEFAULTS = {
    "num_layers": (1.3, 0.0, 0.4),
    "hidden_size": (4.7, 0.0, 0.27),
    "ffn_hidden_size": (0.11, 0.0, 0.45),
    "num_query_groups": (0.22, 0.0, 0.0),
    "heads_per_group": (0.22, 0.0, 0.0),
}
"""Damage by axis and term. One share of groups and of heads was measured, which tells nothing of a curve."""
LAYERS_BY_LOSS = (1.0, 0.0, 0.0)
"""Coefficients for layers, where the scores lost are themselves the logarithm of measured losses."""
RIDGE = 1e-3
"""Ridge towards the default coefficients, in units of squared damage at the measured shapes' own shares."""


@dataclass(frozen=True)
class Features:
    """Shares lost by size: ``tables[axis]`` is ``[K+1, terms]``, in the order of ``TERMS``, at each size kept.

    ``vectors`` of shapes are ``[n, axes * terms]``, axis by axis in the order of ``AXES``.
    """

    tables: dict[str, np.ndarray]

    @classmethod
    def of(cls, scores: Scores, without_layers: Sequence[float] | None = None) -> Features:
        """Take the features from scores.

        Args:
            without_layers: damage of removing 0, 1, 2, … layers, where it was measured; beyond its end the last
                difference goes on.
        """
        shape = scores.shape
        r = shape.heads_per_group
        worth = scores.published
        within = np.asarray(worth["heads"]).reshape(shape.num_layers, shape.num_query_groups, r)
        if scores.stream_moment is not None:
            moment = scores.stream_moment
            # 4096 channels: single precision halves the seconds, and shares need three digits
            energy = np.linalg.eigvalsh(moment.astype(np.float32 if len(moment) > 1024 else np.float64))
        else:
            energy = np.square(worth["hidden"])
        lost = {
            "num_layers": _tail(scores.block_influence),
            "hidden_size": _tail(energy),
            "ffn_hidden_size": _tail(worth["ffn"]),
            "num_query_groups": _tail(worth["groups"]),
            "heads_per_group": _tail(within),
        }
        if without_layers is not None and len(without_layers) > 1:
            lost["num_layers"] = _measured_layers(shape.num_layers, without_layers)
        tables = {}
        for axis in AXES:
            whole = len(lost[axis]) - 1
            size = 1 - np.arange(whole + 1) / whole
            tables[axis] = np.stack([lost[axis], size, size**2], axis=1)
        return cls(tables)

    def vectors(self, shapes: ModelShape) -> np.ndarray:
        """Make the features of one shape ``[1, …]`` or, given arrays, of many."""
        return np.concatenate([self.tables[axis][np.atleast_1d(getattr(shapes, axis))] for axis in AXES], axis=1)


@dataclass(frozen=True)
class Predictor:
    """Predicted losses.

    Attributes:
        coefficients: ``[axes * terms]``. source_loss: nats/token; 1.0 where it is not known, so that predictions are
            multiples of it.
        measured: shapes and losses of the fit. residual: root mean square of their damage that is not explained.
    """

    features: Features
    coefficients: np.ndarray
    source_loss: float = 1.0
    measured: int = 0
    residual: float = 0.0
    scale: float = field(default=1.0)

    def __call__(self, shapes: ModelShape) -> np.ndarray:
        """Loss of every shape, ``[n]``."""
        damage = np.zeros(1)
        for axis, terms in zip(AXES, self.coefficients.reshape(len(AXES), -1), strict=True):
            damage = damage + (self.features.tables[axis] @ terms)[np.atleast_1d(getattr(shapes, axis))]
        return self.source_loss * np.exp(damage)

    def table(self) -> dict[str, dict[str, float]]:
        """Coefficients by axis, for people."""
        rows = self.coefficients.reshape(len(AXES), -1)
        return {
            axis: {term: round(float(value), 4) for term, value in zip(TERMS, row, strict=True)}
            for axis, row in zip(AXES, rows, strict=True)
        }


def defaults(features: Features, source_loss: float = 1.0, layers_measured: bool = False) -> Predictor:
    """The predictor without measurements."""
    return Predictor(features, _prior(layers_measured), source_loss)


def fit(
    features: Features,
    shapes: Sequence[ModelShape],
    losses: Sequence[float],
    source_loss: float,
    layers_measured: bool = False,
) -> Predictor:
    """The predictor after measuring ``losses`` of ``shapes``, nats/token.

    Raises:
        MinitronError: a loss that is not positive.
    """
    if not shapes:
        return defaults(features, source_loss, layers_measured)
    from scipy.optimize import nnls

    if source_loss <= 0 or min(losses) <= 0:
        raise MinitronError(f"search: losses must be positive, found {min(*losses, source_loss)}")
    rows = np.concatenate([features.vectors(shape) for shape in shapes])
    damage = np.log(np.asarray(losses) / source_loss)
    prior = _prior(layers_measured)
    guess = rows @ prior
    scale = max(float(guess @ damage) / float(guess @ guess), 0.1) if guess @ guess > 0 else 1.0
    weight = np.square(rows).mean(axis=0)
    # an axis that nothing measured keeps its default; the pull's strength is then of no consequence
    pull = RIDGE * np.where(weight > 0, weight * len(rows), 1.0)
    pulled = np.diag(np.sqrt(pull))
    coefficients, _ = nnls(np.concatenate((rows, pulled)), np.concatenate((damage, pulled @ prior * scale)))
    residual = float(np.sqrt(np.square(rows @ coefficients - damage).mean()))
    return Predictor(features, coefficients, source_loss, len(shapes), residual, scale)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's, equal values sharing their mean rank; None where it is not defined."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (one, other)]
    deviations = [rank - rank.mean() for rank in ranks]
    norm = np.sqrt(np.prod([deviation @ deviation for deviation in deviations]))
    return float(deviations[0] @ deviations[1] / norm) if len(one) > 1 and norm > 0 else None


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _prior(layers_measured: bool) -> np.ndarray:
    values = DEFAULTS | ({"num_layers": LAYERS_BY_LOSS} if layers_measured else {})
    return np.concatenate([values[axis] for axis in AXES])


def _tail(worth: np.ndarray) -> np.ndarray:
    """Share of ``worth [..., K]`` that is lost when the best 0, 1, … K are kept, mean over the rest: ``[K+1]``."""
    ranked = -np.sort(-np.maximum(np.asarray(worth, dtype=np.float64), 0.0), axis=-1)
    kept = np.concatenate((np.zeros((*ranked.shape[:-1], 1)), np.cumsum(ranked, axis=-1)), axis=-1)
    whole = np.where(kept[..., -1:] > 0, kept[..., -1:], 1.0)
    return np.maximum(1 - kept / whole, 0.0).reshape(-1, kept.shape[-1]).mean(axis=0)


def _measured_layers(layers: int, without: Sequence[float]) -> np.ndarray:
    damage = np.maximum.accumulate(np.asarray(without, dtype=np.float64))
    slope = damage[-1] - damage[-2]
    beyond = damage[-1] + slope * np.arange(1, layers + 2 - len(damage))
    return np.concatenate((damage, beyond))[: layers + 1][::-1].copy()
