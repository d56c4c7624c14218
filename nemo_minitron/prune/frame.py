"""What re-solving layers and head have in common: the student's channels, its tensors, and regressions over its tokens.

The student's stream has the channels of a :class:`Basis`: those of the teacher's that the plan keeps, or, where the
plan turns the stream first, the directions of :mod:`nemo_minitron.prune.rotation`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import rms_norm
from nemo_minitron.model.layout import Parameter
from nemo_minitron.model.next_token import label_count
from nemo_minitron.moments import ridge_solve, ridge_solve_with_bias, two_pass_moments, with_ones
from nemo_minitron.prune.cut import TensorReader, TensorWriter, kept, refuse_non_finite, rewrite
from nemo_minitron.prune.plan import Compensation, Plan
from nemo_minitron.prune.rotation import Basis, principal_basis, selection

TINY = torch.finfo(torch.float64).tiny
ROWS_AT_ONCE = 16384
"""Vocabulary rows of a table that are turned or solved together."""

Parts = Callable[[int], tuple[Tensor, Tensor, Tensor | None]]
"""Inputs x, outputs y and weights w of one sample of this process, by its number."""


class Frame:
    """A plan's source and student, and this process's calibration samples.

    Args:
        reader, plan, tokens, sensitivity, stream_moment, writer, dtype, group, counted: as
            :func:`nemo_minitron.prune.resolve.compensate` takes them.
        ridge: the plan's compensation.
        held_out: how many of the last samples nothing is solved on.

    Attributes:
        samples: numbers of this process's samples; solved: of those that weights are solved on, the first.
        narrower: whether hidden channels are cut.
        basis: of the student's stream; turned: whether it is more than a choice of channels.
    """

    def __init__(
        self,
        reader: TensorReader,
        plan: Plan,
        tokens: Tensor,
        sensitivity: Tensor,
        stream_moment: Tensor | None,
        writer: TensorWriter | None,
        dtype: torch.dtype,
        ridge: Compensation,
        group: parallel.Group,
        held_out: int = 0,
        counted: Tensor | None = None,
    ) -> None:
        self.reader, self.plan, self.writer = reader, plan, writer
        self.tokens, self.sensitivity = tokens, sensitivity.pow(ridge.weighting)
        self.counted = counted
        self.dtype, self.ridge, self.group = dtype, ridge, group
        self.device, self.samples = tokens.device, range(len(tokens))
        self.solved = range(len(tokens) - held_out)
        self.narrower = plan.target.hidden_size < plan.source.hidden_size
        self.basis, self.turned = self._basis(stream_moment)

    @cached_property
    def token_count(self) -> int:
        """Number of the job's tokens that are solved on; every process must ask at the same place."""
        count = self.tokens[: len(self.solved)].numel()
        return int(parallel.all_reduce(torch.tensor([count], device=self.device), self.group))

    def _basis(self, moment: Tensor | None) -> tuple[Basis, bool]:
        """Choose the basis of the student's stream, and say whether it is turned."""
        source, size = self.plan.source, self.plan.target.hidden_size
        if self.narrower and self.ridge.rotate:
            if moment is None:
                raise ValueError("the plan turns the stream: stream_moment is needed")
            tied = source.share_embeddings_and_output_weights
            gain = self.read(layout.FINAL_NORM) if tied else None
            found = principal_basis(moment.to(self.device), size, gain)
            if found is not None:
                return found, True
        return selection(torch.tensor(self.plan.hidden, device=self.device), source.hidden_size), False

    def read(self, parameter: Parameter) -> Tensor:
        """One of the source's tensors that belong to no layer, on the device.

        Raises:
            MinitronError: it holds a NaN or infinity.
        """
        tensor = self.reader.tensor(parameter)
        refuse_non_finite(parameter, None, tensor)
        return tensor.to(self.device)

    def write(self, parameter: Parameter, layer: int | None, tensor: Tensor) -> None:
        """One of the student's tensors, by the student's number of its layer."""
        if self.writer is not None:
            self.writer.write(parameter, tensor.to(self.dtype), layer)

    def rounded(self, weight: Tensor) -> Tensor:
        """What is left of ``weight`` once it is stored, float32."""
        return weight.to(self.dtype).float()

    def cut(self, parameter: Parameter, layer: int | None, tensor: Tensor) -> Tensor:
        """The student's part of a canonical tensor before anything is solved.

        Of a turned stream, norms' weights are ones, and what writes to it, a bias too, is turned with it.
        """
        if not self.turned:
            return rewrite(self.plan, parameter, layer, tensor)
        for dim, axis in enumerate(parameter.axes):
            rows = None if axis == layout.HIDDEN else kept(self.plan, axis, layer)
            tensor = tensor if rows is None else tensor.index_select(dim, rows.to(tensor.device))
        if layout.is_norm(parameter):
            return torch.ones(self.plan.target.hidden_size, device=self.device)
        if parameter is layout.EMBEDDING:
            return torch.cat([self.basis.project(part.float()).to(self.dtype) for part in tensor.split(ROWS_AT_ONCE)])
        if parameter.axes[0] == layout.HIDDEN:
            return self.basis.down @ tensor.float()
        return tensor.float() @ self.basis.up if parameter.axes[-1] == layout.HIDDEN else tensor

    def projected(self, stream: Tensor) -> Tensor:
        """The teacher's stream ``[…, H]`` in the student's channels ``[…, k]``."""
        return self.basis.project(stream) if self.turned else stream[..., list(self.plan.hidden)]

    def next_tokens(self, student: Tensor, most: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Choose positions whose next tokens are predicted, evenly spread over those of the job's solved samples that
        count.

        Args:
            student: ``[n, s, k]``, a stream of this process's samples.
            most: about how many positions in all; every process must ask at the same place.

        Returns:
            By a sample's number: its stream there, ``[t, k]``, and the tokens that follow, ``[t]`` int64.
        """
        counted, solved = self.counted, len(self.solved)
        count = label_count(self.tokens[:solved], None if counted is None else counted[:solved])
        positions = parallel.all_reduce(torch.tensor([count], device=self.device), self.group)
        every = max(1, int(positions) // most)
        if counted is None:
            return lambda sample: (student[sample, :-1:every], self.tokens[sample, 1::every])
        places = [row.nonzero()[::every, 0] for row in counted[:solved, :-1]]
        return lambda sample: (student[sample, places[sample]], self.tokens[sample, places[sample] + 1])

    def moments(self, parts: Parts, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        """``sum w x x^T [inputs, inputs]`` and ``sum w x y^T [inputs, outputs]`` over the job's solved samples."""
        return two_pass_moments(parts, len(self.solved), (inputs, outputs), self.device, self.group)

    def normed_moments(
        self, student: Tensor, teacher: Tensor, place: int | None, biased: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Moments of the student's normed stream, ``[k, k]``, and of it with the teacher's, ``[k, H]``.

        Args:
            student: ``[n, s, k]``. teacher: ``[n, s, H]``.
            place: row of the sensitivity by which tokens are weighted; None: all alike.
            biased: with a constant beside the student's channels, ``[k+1, k+1]`` and ``[k+1, H]``.
        """
        epsilon = self.plan.source.layernorm_epsilon

        def parts(sample: int) -> tuple[Tensor, Tensor, Tensor | None]:
            own, other = (rms_norm(x[sample], None, epsilon) for x in (student, teacher))
            weights = None if place is None else self.sensitivity[place, sample]
            return with_ones(own) if biased else own, other, weights

        return self.moments(parts, student.shape[-1] + biased, teacher.shape[-1])

    def solve_reader(self, moment: Tensor, cross: Tensor, folded: Tensor) -> Tensor:
        """``[rows, k]`` on the student's normed stream for ``folded [rows, H]`` on the teacher's."""
        prior = self._reader_prior(moment, cross, folded)
        return ridge_solve(moment, cross @ folded.T.double(), prior, self.ridge.read)

    def solve_biased_reader(self, moment: Tensor, cross: Tensor, folded: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`solve_reader` with the map's bias ``[rows]``, of moments with a constant."""
        prior = self._reader_prior(moment[:-1, :-1], cross[:-1], folded)
        outputs = cross @ folded.T.double() + torch.outer(moment[:, -1], bias.double())
        return ridge_solve_with_bias(moment, outputs, prior, bias, self.ridge.read, self.token_count)

    def _reader_prior(self, moment: Tensor, cross: Tensor, folded: Tensor) -> Tensor:
        shrunk = (cross * self.basis.down).sum() / moment.trace().clamp_min(TINY)  # of the two norms
        return folded @ self.basis.up * shrunk.float()


def divisible(gain: Tensor) -> Tensor:
    """A norm's weights, those near zero moved away from it: solved weights are divided by them."""
    gain = gain.float()
    least = 0.05 * gain.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(gain.abs() < least, torch.where(gain < 0, -least, least), gain)
