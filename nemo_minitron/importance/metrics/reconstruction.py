"""Loss that is left after the best re-solve of the others (:mod:`nemo_minitron.importance.reconstruction`)."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.importance.metric import Job, Observes
from nemo_minitron.importance.reconstruction import RECONSTRUCTION, Elimination


@dataclass(frozen=True)
class Reconstruction:
    """Places in a backward elimination; of hidden channels, the energy of the residual stream."""

    name: str = RECONSTRUCTION
    observes: Observes = "gradients"

    def start(self, job: Job) -> Elimination:
        return Elimination(job)


METRIC = Reconstruction()
