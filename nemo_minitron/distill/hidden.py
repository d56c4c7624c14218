"""Distances between hidden states of chosen layers, through a closed-form projection where sizes differ.

Legend: s tokens of a sequence (this rank's slice under sequence parallelism), b sequences, H_s and H_t hidden sizes of
student and teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_minitron import parallel
from nemo_minitron.config.sections import HIDDEN_LOSSES, Distill
from nemo_minitron.errors import MinitronError, check_choice


@dataclass(frozen=True)
class HiddenTerm:
    """``weight`` · Σ over ``pairs`` of the distance between the output of a student's and of a teacher's layer.

    ``pairs``: (student layer, teacher layer), 1-indexed as NeMo's ``drop_layers``.

    Raises:
        MinitronError: an unknown kind, or a layer that does not exist (:meth:`check`).
    """

    pairs: tuple[tuple[int, int], ...] = ()
    kind: str = Distill.hidden_loss
    weight: float = Distill.hidden_weight

    def __post_init__(self) -> None:
        check_choice("distill.hidden_loss", self.kind, HIDDEN_LOSSES)

    @classmethod
    def of(cls, distill: Distill) -> HiddenTerm:
        """Read the term from the config's ``distill`` section."""
        pairs = [tuple(pair) if isinstance(pair, Sequence) else (pair,) for pair in distill.hidden_pairs]
        if any(len(pair) != 2 or not all(isinstance(n, int) for n in pair) for pair in pairs):
            raise MinitronError(
                f"distill.hidden_pairs must be a list of [student layer, teacher layer], found {list(pairs)}"
            )
        return cls(tuple(pairs), distill.hidden_loss, distill.hidden_weight)

    def check(self, student_layers: int, teacher_layers: int) -> None:
        """Refuse layers that one of the models does not have."""
        for pair in self.pairs:
            for role, layer, layers in zip(("student", "teacher"), pair, (student_layers, teacher_layers), strict=True):
                if not 1 <= layer <= layers:
                    raise MinitronError(
                        f"distill.hidden_pairs: {list(pair)} names {role} layer {layer}; there are 1 to {layers}"
                    )


def distance(student: Tensor, teacher: Tensor, projection: Tensor | None, kind: str) -> Tensor:
    """Per token ``[s, b]``, float32, differentiable in ``student``.

    Args:
        student: ``[s, b, H_s]``; ``teacher``: ``[s, b, H_t]``, no gradient.
        projection: ``[H_s, H_t]``, applied to the student; None where sizes are equal.
        kind: ``cosine``: 1 − cos; ``mse``: mean square over channels.
    """
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    x, t = student.to(wide), teacher.detach().to(wide)
    if projection is not None:
        x = x @ projection.to(wide)
    if kind == "cosine":
        return 1.0 - F.cosine_similarity(x, t, dim=-1)
    return (x - t).square().mean(-1)


class Projection:
    """The linear map from student to teacher that fits best in least squares, over tokens of weight.

    ``P = (SᵀS + ridge · mean diagonal)⁻¹ SᵀT`` from moments in float64, summed over any number of micro-batches and
    over ``group``. It is fitted once and then stands: a map fitted anew at every step would hide from the gradient
    what the layer still lacks.
    """

    def __init__(self, ridge: float = 1e-3) -> None:
        self.ridge = ridge
        self._ss: Tensor | None = None
        self._st: Tensor | None = None

    @torch.no_grad()
    def add(self, student: Tensor, teacher: Tensor, weights: Tensor) -> None:
        """``[s, b, H_s]``, ``[s, b, H_t]``, ``[s, b]``."""
        s, t = student.flatten(0, 1).double(), teacher.flatten(0, 1).double()
        left = (s * weights.flatten().double().unsqueeze(-1)).t()
        self._ss = left @ s + (0.0 if self._ss is None else self._ss)
        self._st = left @ t + (0.0 if self._st is None else self._st)

    def solve(self, *groups: parallel.Group) -> Tensor:
        """``P [H_s, H_t]`` in float32; the same on every rank of ``groups``."""
        assert self._ss is not None and self._st is not None
        ss, st = self._ss, self._st
        for group in groups:
            ss, st = parallel.all_reduce(ss, group), parallel.all_reduce(st, group)
        floor = self.ridge * ss.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        return torch.linalg.solve(ss + floor * torch.eye(len(ss), dtype=ss.dtype, device=ss.device), st).float()


@contextmanager
def outputs_of(layers: Sequence[torch.nn.Module], numbers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Outputs ``[s, b, H]`` of some layers (1-indexed) while the context lasts; its hooks go with it."""
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            found[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [layers[number - 1].register_forward_hook(keep(number)) for number in sorted(set(numbers))]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
