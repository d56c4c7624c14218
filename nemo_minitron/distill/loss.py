r"""What is minimised, and the contract of a distillation loss; each one is a file, ours or a user's.

``L = w_kd · τ² · D(teacher, student) + w_lm · CE`` per token (Hinton et al., arXiv 1503.02531; Minitron, arXiv
2408.11796 section 3), with q and p the teacher's and the student's softmax at temperature τ. A :class:`Loss` is D
alone: temperature, weights and cross entropy are added around it, by :mod:`nemo_minitron.distill.block`.

Legend: r tokens, v columns of this rank's shard of the vocabulary (true vocabulary only; 0 on some ranks).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from nemo_minitron.config.sections import Distill
from nemo_minitron.distill.sampled import Sampled
from nemo_minitron.distill.shard import Shard
from nemo_minitron.distill.top_k import TopK
from nemo_minitron.errors import MinitronError, check_choice
from nemo_minitron.registry import LOSSES


class Divergence(NamedTuple):
    """What a loss makes of some tokens.

    ``distance [r]`` is D, float64, the same on every rank; ``total [r]`` is Σ exp(student) over the columns of all
    ranks, float64, which cross entropy at τ = 1 needs too; ``slope`` is called at most once and returns dD/d student
    ``[r, v]``, best in the memory of the student's logits themselves: every copy of a block counts.
    """

    distance: Tensor
    total: Tensor
    slope: Callable[[], Tensor]


@dataclass
class Reduction:
    """Sums over the tensor-parallel group, for one block of tokens.

    ``waiting`` rows ``[r]`` belong to the other terms of L: the first call of :meth:`sums` takes them along in its
    collective, so that they cost none of their own; :meth:`rest` hands them out.
    """

    shard: Shard
    waiting: list[Tensor]
    _carried: list[Tensor] = field(default_factory=list)

    def sums(self, *rows: Tensor) -> list[Tensor]:
        """Each ``[r]`` summed over the columns of all ranks, in float64; one collective, whatever their number."""
        found = self.shard.sums(*rows, *self.waiting)
        if self.waiting:
            self._carried, self.waiting = found[len(rows) :], []
        return found[: len(rows)]

    def rest(self) -> list[Tensor]:
        """The rows that waited, summed."""
        if self.waiting:
            self.sums()
        return self._carried


class Loss(ABC):
    """A divergence D between the teacher's and the student's softmax, from rows of logits.

    A file that holds one binds an instance to ``LOSS``. It has no state: all that a call needs are its arguments.

    Attributes:
        name: by which ``distill.loss`` asks for it; the name of its file, where that is one of ours.
        kl: which Kullback-Leibler divergence it is. Such a loss is also computed in two halves, where columns come in
            pieces (:mod:`nemo_minitron.distill.rows`), and by kernels on a GPU; None for every other one.
        learns_from: which answers :meth:`of_answers` takes, so that a cache (``distill.teacher_cache``) of them can
            stand for the teacher: :class:`TopK` or :class:`Sampled`; None where it needs all logits.
    """

    name: ClassVar[str]
    kl: ClassVar[Literal["forward", "reverse"] | None] = None
    learns_from: ClassVar[type[TopK] | type[Sampled] | None] = None

    @abstractmethod
    def of_logits(self, student: Tensor, teacher: Tensor, mix: Mix, reduction: Reduction) -> Divergence:
        """D of r tokens, and its gradient once it is asked for.

        Both sides come divided by τ and shifted so that each row's maximum over all ranks is 0: exp() never overflows,
        and Σ exp() is at least 1. Rows are sharded: a sum over the vocabulary is ``reduction.sums(rows, …)``, one
        collective per call. Make few calls, and the same ones on every rank, also on one whose v is 0.

        Args:
            student: ``[r, v]`` logits, float32 or float64; may be overwritten.
            teacher: ``[r, v]``, the same dtype and columns; may be overwritten.
            mix: options (``jsd_beta``, ``top_k``); its weights and temperature are applied by the caller.
        """

    def of_answers(self, student: Tensor, teacher: Any, mix: Mix, reduction: Reduction) -> Divergence:
        """D of r tokens as in :meth:`of_logits`, from what is kept of a teacher's distribution: a ``learns_from``."""
        raise NotImplementedError(f"{self.name} needs all of the teacher's logits")


@dataclass(frozen=True)
class Mix:
    """What is minimised: the config's ``distill`` section as far as it concerns logits.

    Raises:
        MinitronError: a value that is out of range or unknown, or nothing to learn from.
    """

    loss: str = Distill.loss
    temperature: float = Distill.temperature
    kd_weight: float = Distill.kd_weight
    lm_weight: float = Distill.lm_weight
    jsd_beta: float = Distill.jsd_beta
    top_k: int = Distill.top_k
    teacher_samples: int = Distill.teacher_samples

    def __post_init__(self) -> None:
        check_choice("distill.loss", self.loss, LOSSES.names())
        if not isinstance(self.divergence, Loss):
            raise MinitronError(f"distill.loss={self.loss}: expected an instance of nemo_minitron.distill.loss.Loss, "
                                f"found {self.divergence!r:.80}")  # fmt: skip
        if self.temperature <= 0.0:
            raise MinitronError(f"distill.temperature must be positive, found {self.temperature}")
        if self.kd_weight == 0.0 and self.lm_weight == 0.0:
            raise MinitronError("distill.kd_weight and distill.lm_weight are both 0: there is nothing to learn from")
        if not 0.0 < self.jsd_beta < 1.0:
            raise MinitronError(
                f"distill.jsd_beta must lie between 0 and 1, found {self.jsd_beta}; its limits are "
                "distill.loss=forward_kl (0) and distill.loss=reverse_kl (1)"
            )
        for name in ("top_k", "teacher_samples"):
            if getattr(self, name) < 1:
                raise MinitronError(f"distill.{name} must be at least 1, found {getattr(self, name)}")

    @property
    def divergence(self) -> Loss:
        """The loss of that name."""
        return LOSSES.get(self.loss)

    def check_learns_from(self, answers: type[TopK] | type[Sampled] | None = None) -> None:
        """Refuse a loss that needs more of the teacher than a cache keeps, or other ``answers`` than those given.

        Raises:
            MinitronError: naming ``distill.loss`` and those that would do.
        """
        ours = self.divergence.learns_from
        if ours is None or answers not in (None, ours):
            able = [loss.name for loss in LOSSES.every() if isinstance(loss, Loss) and loss.learns_from is not None
                    and answers in (None, loss.learns_from)]  # fmt: skip
            raise MinitronError(
                f"distill.teacher_cache keeps some of the teacher's tokens alone: expected "
                f"distill.loss={' or '.join(able)}, found {self.loss}"
            )
