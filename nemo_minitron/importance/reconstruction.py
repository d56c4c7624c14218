"""Rankings that know what compensation will repair: the loss that is left after the best re-solve.

A unit that is large but that others can stand in for is worth little once they are re-solved; activation size cannot
see that. Here a unit's worth is its place in a backward elimination (:func:`nemo_minitron.moments.elimination_order`)
whose error is measured by the loss: the output metric is the Fisher information of the residual stream,
``G = E[g g^T]``, g the gradient of the next-token loss (its Kronecker form as in arXiv 1503.05671).

Where only some tokens count in the loss, g is that loss's gradient, which weighs the outputs, and inputs are weighted
by :func:`nemo_minitron.moments.loss_shares`: units that a prompt alone needs are worth what the answers need of it.

All of it is observed on one walk through the layers, forward and backward (:mod:`nemo_minitron.importance.walk`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.importance.metric import Job, LayerPass, Metric, Observer, SamplePass
from nemo_minitron.importance.scores_format import Ranking
from nemo_minitron.importance.walk import job_of, walk
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import LayerReader
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.moments import (
    TOKENS_AT_ONCE,
    around_mean,
    elimination_order,
    loss_shares,
    metric_root,
    quantum,
    second_moment,
    stream_weights,
    with_ones,
)

RECONSTRUCTION = "reconstruction"
FFN_RIDGE = 0.03
"""Ridge of the elimination: small calibration sets make some units look replaceable that are not."""
ATTENTION_RIDGE = 0.4
"""Ridge of the elimination of heads and groups, which is compensation's own of ``linear_proj``: what is replaceable is
what that can replace. With 0.03, SmolLM2-135M lost the largest group of its first layer, for which the others stood in
on the calibration's kind of text alone."""
EMBEDDING_SHARE = 0.3
"""Weight of the embeddings in the stream's moment: what is lost there, no layer before can make good."""


@dataclass(frozen=True)
class Compensation:
    """What compensation works with, of the tokens of a measurement.

    Attributes:
        stream_moment: ``[H, H]`` float64, see :class:`StreamMoment`; the same on every process.
        sensitivity: ``[2L, n, s]`` float32 of this process's samples: the norm of the gradient of the residual stream
            after the attention and after the FFN of each layer, which is how much an error there matters to the loss.
    """

    stream_moment: np.ndarray
    sensitivity: np.ndarray


def measure(
    reader: LayerReader,
    tokens: Tensor,
    metrics: Mapping[str, Metric],
    *,
    counted: Tensor | None = None,
    echoes: Tensor | None = None,
    group: parallel.Group = None,
    progress: Callable[[int], None] = lambda layers: None,
) -> tuple[dict[str, Ranking], Compensation | None]:
    """Rankings by those metrics that observe a walk, all on the same one.

    Args:
        reader: the checkpoint; its layers are read twice.
        tokens: ``[n, s]`` int64, unpadded, this process's samples; forward and backward run on their device.
        metrics: by name; where :data:`RECONSTRUCTION` is one, what compensation needs is measured as well.
        counted: ``[n, s]`` bool, the positions whose loss counts (:class:`nemo_minitron.data.blocks.Drawn`); None: all.
        echoes: ``[k, s]`` int64, samples of this process that say themselves twice, by which heads and query groups are
            ranked beside ``tokens`` (:class:`Elimination`).
        group: the processes that share the samples; all get the same arrays, but for ``sensitivity``.
        progress: told after each layer, of 2L.

    Raises:
        MinitronError: a loss whose gradient is not finite.
    """
    job = job_of(reader, tokens, group, counted)
    observers = {name: metric.start(job) for name, metric in metrics.items() if metric.observes != "statistics"}
    found = observers.get(RECONSTRUCTION)
    slopes = Sensitivity(job.shape, tokens) if found is not None else None
    observed = {observer: metrics[name].observes for name, observer in observers.items()}
    told = observed | ({} if slopes is None else {slopes: "gradients"})
    walk(reader, tokens, job, told, progress, counted, echoes if found is not None else None)
    rankings: dict[str, Ranking] = {name: as_arrays(observer) for name, observer in observers.items()}
    if not isinstance(found, Elimination) or slopes is None:
        return rankings, None
    return rankings, Compensation(found.moment.total(), slopes.norms)


def as_arrays(observer: Observer) -> Ranking:
    """An observer's ranking, float64 on the CPU."""
    return {axis: torch.as_tensor(worth).double().cpu().numpy() for axis, worth in observer.ranking().items()}


class Elimination(Observer):
    """Places of units in a backward elimination of their layer, larger is worth more; hidden channels by the diagonal
    of the stream's moment (better than norm outputs, and than Fisher-weighted energy, in our measurements).

    Heads and groups are ranked by echoes as well: on short passages those that copy look replaceable."""

    hears_echoes = True

    def __init__(self, job: Job) -> None:
        shape = job.shape
        self._job, self.moment = job, StreamMoment(job)
        self._ranks = {
            "ffn": np.zeros((shape.num_layers, shape.ffn_hidden_size)),
            "heads": np.zeros((shape.num_layers, shape.num_attention_heads)),
            "groups": np.zeros((shape.num_layers, shape.num_query_groups)),
        }
        self._gathered: _Moments | None = None

    def sample(self, seen: SamplePass) -> None:
        assert seen.middle_gradient is not None and seen.leaving_gradient is not None  # gradients are observed
        if self._gathered is None:
            self._gathered = _Moments(self._job)
        gathered = self._gathered
        shape = self._job.shape
        proj_input = with_ones(seen.proj_input) if shape.proj_bias else seen.proj_input
        gathered.proj.add(proj_input * _weights(seen.middle, seen.middle_gradient, seen.counted).sqrt()[..., None])
        gathered.proj_metric.add(seen.middle_gradient)
        if seen.echo:
            return
        fc2_input = with_ones(seen.fc2_input) if shape.mlp_bias else seen.fc2_input
        gathered.ffn.add(fc2_input * _weights(seen.leaving, seen.leaving_gradient, seen.counted).sqrt()[..., None])
        gathered.ffn_metric.add(seen.leaving_gradient)
        self.moment.sample(seen)

    def layer(self, seen: LayerPass) -> None:
        gathered, self._gathered = self._gathered or _Moments(self._job), None
        head, r = self._job.shape.kv_channels, self._job.shape.heads_per_group
        ffn, proj, ffn_metric, proj_metric = gathered.totals()
        ffn = around_mean(ffn) if self._job.shape.mlp_bias else ffn
        proj = around_mean(proj) if self._job.shape.proj_bias else proj
        fc2 = metric_root(ffn_metric) @ seen.weights[layout.FC2_WEIGHT].double()
        proj_weight = metric_root(proj_metric) @ seen.weights[layout.PROJ_WEIGHT].double()
        self._ranks["ffn"][seen.layer] = elimination_order(ffn, fc2, FFN_RIDGE, overwrite=True).cpu()
        self._ranks["heads"][seen.layer] = elimination_order(proj, proj_weight, ATTENTION_RIDGE, unit=head).cpu()
        self._ranks["groups"][seen.layer] = elimination_order(proj, proj_weight, ATTENTION_RIDGE, unit=r * head).cpu()

    def ranking(self) -> dict[str, np.ndarray]:
        return self._ranks | {"hidden": self.moment.total().diagonal().copy()}


def _weights(stream: Tensor, gradient: Tensor | None, counted: Tensor | None) -> Tensor:
    """Weights ``[1, s]`` of the tokens of a stream ``[1, s, H]``, by its size and by the loss's share in it."""
    if counted is None or gradient is None:
        return stream_weights(stream)
    return stream_weights(stream) * loss_shares(gradient.norm(dim=-1), counted)


class StreamMoment(Observer):
    """``sum w x x^T / mean(x^2)`` over tokens of the residual streams after attention and FFN of every layer, and of
    the embeddings, which count as ``EMBEDDING_SHARE`` of the others together; the same bits on every grid. w is 1, or
    where only some tokens count :func:`nemo_minitron.moments.loss_shares`."""

    def __init__(self, job: Job) -> None:
        shape = job.shape
        self._job = job
        self._sum = torch.zeros(shape.hidden_size, shape.hidden_size, dtype=torch.float64, device=job.device)
        # relative to its token's mean square, no square exceeds the number of channels
        bound = torch.tensor(2.0 * shape.num_layers * (1 + EMBEDDING_SHARE) * job.tokens * shape.hidden_size)
        self._quantum = quantum(bound, bound)

    def sample(self, seen: SamplePass) -> None:
        self._add(seen.middle, seen.middle_gradient, seen.counted)
        self._add(seen.leaving, seen.leaving_gradient, seen.counted)
        if seen.layer == 0:
            share = 2 * self._job.shape.num_layers * EMBEDDING_SHARE
            self._add(seen.entering, seen.entering_gradient, seen.counted, share)

    def _add(self, stream: Tensor, gradient: Tensor | None, counted: Tensor | None, weight: float = 1.0) -> None:
        """``[1, s, H]`` of one sample."""
        weights = weight * _weights(stream, gradient, counted)
        second_moment(stream, stream, weights, self._quantum, out=self._sum)

    def total(self) -> np.ndarray:
        """``[H, H]`` float64, of all processes."""
        return parallel.all_reduce(self._sum, self._job.group).cpu().numpy()


class Sensitivity(Observer):
    """Norms of the stream's gradient after the attention and after the FFN of each layer, ``[2L, n, s]`` float32."""

    def __init__(self, shape: ModelShape, tokens: Tensor) -> None:
        self._norms = torch.zeros(2 * shape.num_layers, *tokens.shape, device=tokens.device)

    @property
    def norms(self) -> np.ndarray:
        return self._norms.cpu().numpy()

    def sample(self, seen: SamplePass) -> None:
        for half, gradient in enumerate((seen.middle_gradient, seen.leaving_gradient)):
            assert gradient is not None  # gradients are observed
            self._norms[2 * seen.layer + half, seen.sample] = gradient[0].norm(dim=-1)


def clipped(sensitivity: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """``sensitivity [2L, n, s]`` of all samples with the largest thousandth of each row cut to what bounds it.

    Gradients have a long tail; one token of a hundred times the mean would decide a regression. Where only the
    positions ``counted [n, s]`` count in the loss, the bound is that of their thousandth: beside many tokens on which
    it hardly depends, all of them would be the largest.
    """
    flat = sensitivity.reshape(len(sensitivity), -1)
    known = flat if counted is None else flat[:, counted.reshape(-1)]
    bound = np.quantile(known, 0.999, axis=1).astype(sensitivity.dtype)
    return np.minimum(flat, bound[:, None]).reshape(sensitivity.shape)


class _Moments:
    """What the backward pass gathers of one layer, summed over tokens; sizes are those of the canonical layer.

    Attributes:
        ffn ``[F, F]``, proj ``[A*d, A*d]``: inputs of ``linear_fc2`` and of ``linear_proj``, each token by the inverse
            mean square of the stream it is added to; where these have a bias, with a constant, and so one more each.
            ffn_metric, proj_metric ``[H, H]``: gradients of that stream.
    """

    def __init__(self, job: Job) -> None:
        shape, self._group = job.shape, job.group
        sizes = (shape.ffn_hidden_size + shape.mlp_bias, shape.proj_columns + shape.proj_bias)
        self.ffn, self.proj = (_Gathered(size, job.device) for size in sizes)
        self.ffn_metric, self.proj_metric = (_Gathered(shape.hidden_size, job.device) for _ in range(2))

    def totals(self) -> list[Tensor]:
        """The four, of all processes."""
        parts = (self.ffn, self.proj, self.ffn_metric, self.proj_metric)
        return [parallel.all_reduce(part.total(), self._group) for part in parts]


class _Gathered:
    """Second moment of activations that come a sample at a time; adding a large float64 matrix for each is slow."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._waiting: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """``[1, s, C]``, kept until there are enough."""
        self._waiting.append(x[0])
        if sum(map(len, self._waiting)) >= TOKENS_AT_ONCE:
            self.total()

    def total(self) -> Tensor:
        """``[C, C]`` of all that was added."""
        if self._waiting:
            x = torch.cat(self._waiting)
            second_moment(x, x, out=self._sum)
            self._waiting.clear()
        return self._sum
