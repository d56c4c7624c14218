"""First-order Taylor importance: what the loss would change by, were a unit's weights gone one by one.

``sum |w dL/dw|`` over the weights of a unit, L the mean next-token loss: element-wise first order as in LLM-Pruner
(arXiv 2305.11627, eq. 5 without the Hessian's term), added up over a unit, after Molchanov et al. (arXiv 1906.10771).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.importance.metric import Job, LayerPass, Observer, Observes
from nemo_minitron.importance.reductions import unit_sums
from nemo_minitron.importance.scores_format import axis_sizes
from nemo_minitron.model.layout import Parameter


@dataclass(frozen=True)
class Taylor:
    """Nats per token that the loss changes by, to first order, summed in size over the weights of a unit."""

    name: str = "taylor"
    observes: Observes = "weight_gradients"

    def start(self, job: Job) -> Observer:
        return _Sums(job)


class _Sums(Observer):
    def __init__(self, job: Job) -> None:
        self._job = job
        self._worth = {axis: torch.zeros(size, dtype=torch.float64) for axis, size in axis_sizes(job.shape).items()}

    def layer(self, seen: LayerPass) -> None:
        for parameter, gradient in seen.gradients.items():
            self._add(parameter, seen.weights[parameter], gradient, seen.layer)

    def outside(self, parameter: Parameter, weight: Tensor, gradient: Tensor) -> None:
        self._add(parameter, weight, gradient)

    def _add(self, parameter: Parameter, weight: Tensor, gradient: Tensor, layer: int | None = None) -> None:
        sizes = (weight.double() * gradient).abs() / self._job.predicted
        for axis, sums in unit_sums(self._job.shape, parameter, sizes).items():
            worth = self._worth[axis]
            (worth if axis == "hidden" else worth[layer]).add_(sums.cpu())

    def ranking(self) -> dict[str, Tensor]:
        return self._worth


METRIC = Taylor()
