"""The published metric: how large activations are (arXiv 2407.14679, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nemo_minitron.importance.metric import Job, Observer, Observes

_AXES = ("ffn", "heads", "groups", "hidden")


@dataclass(frozen=True)
class Minitron:
    """Mean over the tokens and l2 norm over the samples of activations' sizes: of the inputs of ``linear_fc2`` for
    neurons, of those of ``linear_proj`` for heads and groups, and of all norms' outputs for channels."""

    name: str = "minitron"
    observes: Observes = "statistics"

    def start(self, job: Job) -> Observer:
        return _Activations()


class _Activations(Observer):
    def statistics(self, found: Mapping[str, np.ndarray]) -> None:
        self._worth = {axis: found[axis] for axis in _AXES}

    def ranking(self) -> dict[str, np.ndarray]:
        return self._worth


METRIC = Minitron()
