"""The contract of an importance metric: what it observes of a model on calibration tokens, and how it ranks units.

A :class:`Metric` says by ``observes`` what must be gathered, and makes for each measurement an :class:`Observer`, which
is told these facts and asked for its ranking at the end. What there is to observe:

===================  ============================================================  ================================
``observes``         methods that are called                                       on
===================  ============================================================  ================================
``statistics``       :meth:`Observer.statistics`, once                             all calibration samples, forward
``activations``      :meth:`Observer.sample`, :meth:`Observer.layer`               the tokens kept for gradients
``gradients``        the same, with the loss's gradient of the residual stream     the same
``weight_gradients`` the same, and of every weight; :meth:`Observer.outside`       the same
===================  ============================================================  ================================

The loss is the next-token loss, summed over the calibration tokens; of conversations over those that the assistant
says. Statistics are taken where these are predicted. Sharding: an observer never sees a shard.
Statistics are joined over the grid; all else comes from a walk over whole layers, one at a time, in which each process
of the job has its share of the samples (:mod:`nemo_minitron.importance.walk`). What an observer adds up over samples it
must add over ``Job.group`` itself, by :func:`nemo_minitron.parallel.all_reduce`, in the same order on every process;
weights' gradients come so added. Every process asks for the ranking and must get the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.model.decoder import Layer
from nemo_minitron.model.layout import Parameter
from nemo_minitron.model.shape import ModelShape

Observes = Literal["statistics", "activations", "gradients", "weight_gradients"]
OBSERVES: tuple[Observes, ...] = ("statistics", "activations", "gradients", "weight_gradients")


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        shape: of the model. device: on which samples come.
        tokens: calibration tokens, of all processes: of a walk all that pass, of statistics those that they are taken
            at. predicted: those whose loss is counted; where all are, one less of each sample.
        group: the processes that share the samples; None for one alone.
    """

    shape: ModelShape
    device: torch.device
    tokens: int
    predicted: int
    group: parallel.Group = None


@dataclass(frozen=True)
class SamplePass:
    """One sample of this process in one layer. Float32 on ``Job.device``, detached; sizes are of the whole layer.

    Attributes:
        layer, sample: their numbers. weights: of the layer, float32.
        qkv_input, proj_input, fc1_input, fc2_input: inputs of ``linear_qkv`` ``[1, s, H]`` (the normed stream),
            ``linear_proj`` ``[1, s, A*d]``, ``linear_fc1`` ``[1, s, H]``, ``linear_fc2`` ``[1, s, F]``.
        entering, middle, leaving: residual stream ``[1, s, H]`` before the layer, after its attention, after its FFN.
        entering_gradient, middle_gradient, leaving_gradient: of the loss with respect to these; None where only
            activations are observed.
        counted: ``[1, s]`` bool, at which positions the loss is counted of the token that follows
            (:class:`nemo_minitron.data.blocks.Drawn`); None: at all.
        echo: whether the sample says itself twice (:mod:`nemo_minitron.importance.echoes`); ``sample`` then is its
            number among those that do.
    """

    layer: int
    sample: int
    weights: Layer
    entering: Tensor
    qkv_input: Tensor
    proj_input: Tensor
    middle: Tensor
    fc1_input: Tensor
    fc2_input: Tensor
    leaving: Tensor
    entering_gradient: Tensor | None = None
    middle_gradient: Tensor | None = None
    leaving_gradient: Tensor | None = None
    counted: Tensor | None = None
    echo: bool = False


@dataclass(frozen=True)
class LayerPass:
    """One layer, once all samples of the job have passed it.

    Attributes:
        layer: its number. weights: float32.
        gradients: of the loss, summed over the tokens of all processes, by row of the layout table: float64, sized like
            the weights, the same on every process; empty where no metric observes ``weight_gradients``.
    """

    layer: int
    weights: Layer
    gradients: Mapping[Parameter, Tensor]


class Observer:
    """What a metric sees of one measurement; override the methods whose facts the ranking needs.

    Layers come last to first; of each layer this process's samples, then :meth:`layer`.

    Attributes:
        hears_echoes: whether it is told, after the samples of a layer, of those that say themselves twice as well
            (``SamplePass.echo``). They are not among the job's tokens, and no weight's gradient has a part of theirs.
    """

    hears_echoes = False

    def statistics(self, found: Mapping[str, np.ndarray]) -> None:
        """Statistics of forward passes, float64: those of :func:`nemo_minitron.importance.collect.collect` by name."""

    def sample(self, seen: SamplePass) -> None:
        """One sample in one layer; called as often as this process has samples, which may differ between processes."""

    def layer(self, seen: LayerPass) -> None:
        """One layer, after its samples; called by every process, in the same order."""

    def outside(self, parameter: Parameter, weight: Tensor, gradient: Tensor) -> None:
        """Weights outside of the layers: embedding, output layer, final norm; called by every process.

        Args:
            weight: float32, the whole of a norm ``[H]``, or some rows ``[v, H]`` of a table, as many as have room; of a
                tied table, which is both, called for the embedding alone. Padded rows do not come.
            gradient: float64, sized like ``weight``, as in :class:`LayerPass`.
        """

    def ranking(self) -> Mapping[str, np.ndarray | Tensor]:
        """Worth of units by axis, larger is worth more: any of ``ffn [L, F]``, ``heads [L, A]``, ``groups [L, G]``,
        ``hidden [H]``. An axis that is left out cannot be cut by this ranking."""
        raise NotImplementedError


class Metric(Protocol):
    """An entry of :data:`nemo_minitron.registry.METRICS`.

    Attributes:
        name: of the metric, of its ranking in the scores, and of its file. observes: what must be gathered.
    """

    @property
    def name(self) -> str: ...
    @property
    def observes(self) -> Observes: ...
    def start(self, job: Job) -> Observer:
        """A new observer for one measurement."""
        ...
