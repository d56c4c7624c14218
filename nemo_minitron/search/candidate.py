"""What is known of a shape, and what a search found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nemo_minitron.config.sections import Serving
from nemo_minitron.model.serving import Reason, reasons
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.search.predict import Predictor
from nemo_minitron.search.scan import Found
from nemo_minitron.search.space import Budget, Space, key_of


@dataclass
class Candidate:
    """A shape and all that is known of it.

    Attributes:
        role: ``searched``, ``validation``, ``probe``, or ``given`` (``search.shapes``).
        predicted: loss before it was measured, nats/token, or times the source's where that is not known.
        distilled: loss after each round of distillation.
        rank: of ``given`` shapes, among the feasible ones by prediction, from 1; None where it is over the budget, or
            would be refused where it is to be served.
    """

    shape: ModelShape
    role: str
    predicted: float
    costs: dict[str, float]
    zero_shot: float | None = None
    distilled: list[float] = field(default_factory=list)
    rank: int | None = None
    plan: Path | None = None

    @property
    def key(self) -> str:
        return key_of(self.shape)


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        steps: of each round of distillation. rank_correlation: Spearman's, of predicted against measured zero-shot
            loss over shapes that the prediction was not fitted to. serving: ``search.serving``.
    """

    space: Space
    budget: Budget
    found: Found
    predictor: Predictor
    candidates: list[Candidate]
    steps: list[int] = field(default_factory=list)
    rank_correlation: float | None = None
    source_loss: float | None = None
    winner: Candidate | None = None
    serving: Serving = field(default_factory=Serving)

    def reasons(self, candidate: Candidate) -> list[Reason]:
        """Why a candidate is refused or run badly where it is to be served; none where nobody said so."""
        return [] if self.serving == Serving() else reasons(candidate.shape, self.serving)
