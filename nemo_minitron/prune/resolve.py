"""Compensated pruning: the kept weights are re-solved so that the student's stream follows the teacher's.

Cutting rows and columns leaves weights that were made for inputs which are gone. Here every weight that reads changed
inputs is solved anew, in closed form, from calibration tokens, and the student stays a plain Llama. The model is
walked layer by layer, student and teacher side by side on the same tokens, x being the student's residual stream,
x* the teacher's in the student's channels, which are the kept ones, or, where the plan turns the stream first, those of
:mod:`nemo_minitron.prune.rotation`:

1. where hidden channels were pruned, ``linear_qkv`` and ``linear_fc1`` are solved so that, on the student's normed
   stream, they give what the teacher's give on its own: ``min sum_t w_t |W h - W* h*|^2``;
2. ``linear_proj`` and ``linear_fc2``, which write to the stream, are solved so that the student's stream *after* them
   is the teacher's: ``min sum_t w_t |x + W a - x*|^2``, w_t the norm of the loss's gradient at that place of the
   stream. Each layer so corrects what the layers before it got wrong. After a layer that dropped layers follow, x* is
   the stream that leaves the last of these, so that the kept layer stands in for them;
3. where hidden channels were pruned, the final norm is rescaled per channel and an untied output layer solved like 1;
4. the final norm is scaled by one number, under which the calibration tokens are likeliest: what a student has lost
   shows as logits that are surer than they should be.

All are ridge regressions towards the cut weights (:func:`nemo_minitron.moments.ridge_solve`). Layers that nothing
before them has changed are copied. A tied embedding stays tied and is only cut or turned: the student reads it too.

One layer's weights and one second moment are in memory at a time. Weights are whole: under any grid each process takes
its share of the samples, and moments are added over all processes before anything is solved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_minitron import parallel
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import Layer, Rotary, read_layer, rms_norm, tokens_at_once
from nemo_minitron.model.layout import Parameter
from nemo_minitron.moments import quantum, ridge_solve, second_moment, squares
from nemo_minitron.prune.cut import TensorReader, TensorWriter, check_source, kept, refuse_non_finite, rewrite
from nemo_minitron.prune.plan import Compensation, Plan
from nemo_minitron.prune.rotation import Basis, principal_basis, selection

TINY = torch.finfo(torch.float64).tiny
SCALES = tuple(0.75 + step / 32 for step in range(13))
"""Of the final norm that are tried; the best is refined by the parabola through it and its neighbours."""
SCALE_TOKENS = 8192
"""Of the job's calibration tokens that are predicted for it, evenly spread."""
SCALE_PULL = 256.0
"""Towards a scale of 1, in nats per square of the distance: worth some 64 tokens, so that a handful decides nothing."""
ROWS_AT_ONCE = 16384
"""Vocabulary rows of an untied output layer that are solved together."""


@torch.no_grad()
def compensate(
    reader: TensorReader,
    plan: Plan,
    tokens: Tensor,
    sensitivity: Tensor,
    writer: TensorWriter | None,
    *,
    stream_moment: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    group: parallel.Group = None,
    progress: Callable[[int], None] = lambda layers: None,
) -> None:
    """Write the compensated student.

    Args:
        reader: the source, of ``plan.source``; read once, layer by layer.
        plan: with its ``compensation``.
        tokens: ``[n, s]`` int64, unpadded, this process's calibration samples; all work is done on their device.
        sensitivity: ``[2L, n, s]`` of these samples, as ``Scores.sensitivity``.
        writer: opened for ``plan.target``; None on processes that only contribute samples.
        stream_moment: ``[H, H]`` of the scores, which a plan that turns the stream needs.
        dtype: what is stored; the student is carried on in weights rounded to it.
        group: the processes that share the samples.
        progress: told after each source layer, of L.

    Raises:
        MinitronError: a plan for another checkpoint (before anything is written); a NaN or infinity in the source,
            with its tensor.

    Warns:
        SingularMoments: weights that the tokens do not determine are cut and not re-solved.
    """
    check_source(plan, reader)
    if plan.compensation is None:
        raise ValueError("the plan asks for no compensation")
    _Walk(reader, plan, tokens, sensitivity, stream_moment, writer, dtype, plan.compensation, group).run(progress)


class _Walk:
    """Teacher's and student's streams, ``[n, s, H]`` and ``[n, s, H']`` float32, on their way through the layers."""

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
    ) -> None:
        self.reader, self.plan, self.writer = reader, plan, writer
        self.dtype, self.ridge, self.group = dtype, ridge, group
        self.device, self.tokens = tokens.device, tokens
        self.sensitivity = sensitivity
        self.narrower = plan.target.hidden_size < plan.source.hidden_size
        self.basis, self.turned = self._basis(stream_moment)
        self.changed = self.narrower
        """Whether the student's stream differs from the teacher's so far."""
        self.rotary = Rotary.of(plan.source, tokens.shape[1], self.device)
        self.samples = range(len(tokens))
        table = self._read(layout.EMBEDDING)
        self.teacher = torch.empty(*tokens.shape, plan.source.hidden_size, device=self.device)
        for sample, row in enumerate(tokens):
            self.teacher[sample] = table[row].float()
        table = self._cut(layout.EMBEDDING, None, table).to(dtype)
        self._write(layout.EMBEDDING, None, table)
        self.student = torch.empty(*tokens.shape, plan.target.hidden_size, device=self.device)
        for sample, row in enumerate(tokens):
            self.student[sample] = table[row].float()

    def _basis(self, moment: Tensor | None) -> tuple[Basis, bool]:
        """Of the student's stream, and whether it is turned."""
        source, size = self.plan.source, self.plan.target.hidden_size
        if self.narrower and self.ridge.rotate:
            if moment is None:
                raise ValueError("the plan turns the stream: stream_moment is needed")
            tied = source.share_embeddings_and_output_weights
            gain = self._read(layout.FINAL_NORM) if tied else None
            found = principal_basis(moment.to(self.device), size, gain)
            if found is not None:
                return found, True
        return selection(torch.tensor(self.plan.hidden, device=self.device), source.hidden_size), False

    def _cut(self, row: Parameter, number: int | None, tensor: Tensor) -> Tensor:
        """The student's part of one canonical tensor before anything is solved; a turned norm's weights are ones."""
        if not self.turned:
            return rewrite(self.plan, row, number, tensor)
        for dim, axis in enumerate(row.axes):
            rows = None if axis == layout.HIDDEN else kept(self.plan, axis, number)
            tensor = tensor if rows is None else tensor.index_select(dim, rows.to(tensor.device))
        if row.axes == (layout.HIDDEN,):
            return torch.ones(self.plan.target.hidden_size, device=self.device)
        if row is layout.EMBEDDING:
            return torch.cat([self.basis.project(part.float()).to(self.dtype) for part in tensor.split(ROWS_AT_ONCE)])
        if row.axes[0] == layout.HIDDEN:
            return self.basis.down @ tensor.float()
        return tensor.float() @ self.basis.up if row.axes[-1] == layout.HIDDEN else tensor

    def run(self, progress: Callable[[int], None]) -> None:
        """From the embedding to the output layer."""
        source, kept_layers = self.plan.source, self.plan.layers
        for number in range(kept_layers[0]):
            self._pass_dropped(number)
            progress(1)
        for at, number in enumerate(kept_layers):
            following = kept_layers[at + 1] if at + 1 < len(kept_layers) else source.num_layers
            self._layer(number, range(number + 1, following))
            progress(following - number)
        self._head()

    def _pass_dropped(self, number: int) -> None:
        """The teacher goes through a layer that the student has not."""
        layer = self._teacher_layer(number)
        for sample in self.samples:
            one = slice(sample, sample + 1)
            self.teacher[one] = layer.forward(self.teacher[one], self.rotary)
        self.changed = True

    def _layer(self, number: int, dropped: range) -> None:
        teacher = self._teacher_layer(number)
        student = {key: self._cut(row, number, teacher[row]) for key, row in self._rows()}
        layer = Layer(self.plan.target, student)

        if self.narrower:
            read = self._solve_reader(number, layout.QKV_WEIGHT, teacher, layer, self.teacher, 2 * number - 1)
            student[layout.QKV_WEIGHT.key] = read
        middle = torch.empty_like(self.teacher)
        for sample in self.samples:
            one = slice(sample, sample + 1)
            inner = teacher.attention(teacher.attention_input(self.teacher[one]), self.rotary)
            middle[one] = self.teacher[one] + F.linear(inner, teacher[layout.PROJ_WEIGHT])
        self.changed |= self.plan.target.num_attention_heads < self.plan.source.num_attention_heads
        inputs = self.student.new_empty(*self.student.shape[:2], layer.shape.proj_columns)
        for sample in self.samples:
            one = slice(sample, sample + 1)
            inputs[one] = layer.attention(layer.attention_input(self.student[one]), self.rotary)
        self._solve_writer(layout.PROJ_WEIGHT, student, inputs, middle, 2 * number, self.ridge.attention)
        self.student += F.linear(inputs, student[layout.PROJ_WEIGHT.key])
        del inputs

        if self.narrower:
            read = self._solve_reader(number, layout.FC1_WEIGHT, teacher, layer, middle, 2 * number)
            student[layout.FC1_WEIGHT.key] = read
        for sample in self.samples:
            one = slice(sample, sample + 1)
            inner = teacher.ffn(teacher.ffn_input(middle[one]))
            self.teacher[one] = middle[one] + F.linear(inner, teacher[layout.FC2_WEIGHT])
        del middle, teacher
        for between in dropped:
            self._pass_dropped(between)
        self.changed |= self.plan.target.ffn_hidden_size < self.plan.source.ffn_hidden_size
        inputs = self.student.new_empty(*self.student.shape[:2], layer.shape.ffn_hidden_size)
        for sample in self.samples:
            inputs[sample] = layer.ffn(layer.ffn_input(self.student[sample]))
        self._solve_writer(layout.FC2_WEIGHT, student, inputs, self.teacher, 2 * dropped.stop - 1, self.ridge.ffn)
        self.student += F.linear(inputs, student[layout.FC2_WEIGHT.key])

        at = self.plan.position(number)
        for key, row in self._rows():
            self._write(row, at, student[key])

    def _solve_reader(
        self, number: int, row: Parameter, teacher: Layer, student: Layer, stream: Tensor, place: int
    ) -> Tensor:
        """``linear_qkv`` or ``linear_fc1`` for the student's narrower normed stream.

        Solved as if the norm had no weights, which leaves inputs of one scale, and divided by them afterwards. The norm
        of a turned stream has none to keep, and gets those that leave every column of the solved weights with the root
        mean square of the teacher's: weights as small as ``weight * norm`` would train at many times the rate that
        AdamW's steps of one size mean for the teacher's, the more where the stream is largest.
        ``place``: row of the sensitivity that belongs to ``stream``; the embeddings have none.
        """
        norm = layout.QKV_NORM if row is layout.QKV_WEIGHT else layout.FC1_NORM
        moment, cross = self._normed_moments(stream, place if place >= 0 else None)
        rows = kept(self.plan, row.axes[0], number)
        weight = teacher[row] if rows is None else teacher[row][rows.to(self.device)]
        solved = self._solve_read(moment, cross, weight * teacher[norm])
        gain = self._rounded(_divisible(_gain_of_turned(solved, weight) if self.turned else student[norm]))
        student.tensors[norm.key].copy_(gain)  # type: ignore[index]
        return self._rounded(solved / gain)

    def _solve_read(self, moment: Tensor, cross: Tensor, folded: Tensor) -> Tensor:
        """``[rows, k]`` on the student's normed stream for ``folded [rows, H]`` on the teacher's."""
        shrunk = (cross * self.basis.down).sum() / moment.trace().clamp_min(TINY)  # of the two norms
        prior = folded @ self.basis.up * shrunk.float()
        return ridge_solve(moment, cross @ folded.T.double(), prior, self.ridge.read)

    def _solve_writer(
        self, row: Parameter, student: dict[str, Tensor], inputs: Tensor, target: Tensor, place: int, ridge: float
    ) -> None:
        """``linear_proj`` or ``linear_fc2``: the student's stream after it follows the teacher's.

        ``place``: row of the sensitivity that belongs to ``target``.
        """
        if not self.changed:
            return

        def parts(sample: int) -> tuple[Tensor, Tensor, Tensor]:
            wanted = self._wanted(target[sample])
            return inputs[sample], wanted - self.student[sample], self.sensitivity[place, sample]

        moment, cross = self._moments(parts, inputs.shape[-1], self.student.shape[-1])
        student[row.key] = self._rounded(ridge_solve(moment, cross, student[row.key], ridge))

    def _head(self) -> None:
        """Final norm and output layer."""
        gain, output = self._solved_head()
        if self.ridge.rescale and self.changed:
            gain = gain * self._scale(gain, output)
        self._write(layout.FINAL_NORM, None, gain)
        if output is not None:
            self._write(layout.OUTPUT, None, output)

    def _solved_head(self) -> tuple[Tensor, Tensor | None]:
        """Weights of the final norm ``[k]``, and of the output layer ``[Vp, k]`` where that is untied."""
        source = self.plan.source
        gain = self._read(layout.FINAL_NORM).float()
        tied = source.share_embeddings_and_output_weights
        output = None if tied else self._read(layout.OUTPUT)
        if not self.narrower:
            return gain, output
        moment, cross = self._normed_moments(self.teacher, 2 * source.num_layers - 1)
        cut = self._cut(layout.FINAL_NORM, None, gain)
        if output is None:
            own = (cross * gain @ self.basis.up.double()).diagonal()
            scale = (own / moment.diagonal().clamp_min(TINY)).float()
            return torch.where(scale == 0, cut, scale), None  # its sign may be either
        safe = self._rounded(_divisible(cut * gain.square().mean().sqrt() if self.turned else cut))
        parts = []
        for start in range(0, len(output), ROWS_AT_ONCE):
            solved = self._solve_read(moment, cross, output[start : start + ROWS_AT_ONCE].float() * gain)
            parts.append((solved / safe).to(self.dtype))
        return safe, torch.cat(parts)

    def _scale(self, gain: Tensor, output: Tensor | None) -> float:
        """Of the final norm ``gain [k]``: the least cross entropy of the calibration tokens, each from those before.

        Sums of samples are whole multiples of 2^-20 nats, so that the scale has the same bits on every grid.
        """
        source = self.plan.source
        table = self._cut(layout.EMBEDDING, None, self._read(layout.EMBEDDING)) if output is None else output
        table, gain = self._rounded(table[: source.vocab_size]), self._rounded(gain)
        scales = torch.tensor(SCALES, dtype=torch.float64, device=self.device)
        whole = parallel.all_reduce(torch.tensor(self.tokens[:, 1:].numel(), device=self.device)[None], self.group)
        every, step = max(1, int(whole) // SCALE_TOKENS), tokens_at_once(source.vocab_size)
        losses = torch.zeros_like(scales)
        for sample in self.samples:
            x = rms_norm(self.student[sample, :-1:every], gain, source.layernorm_epsilon)
            for some, labels in zip(x.split(step), self.tokens[sample, 1::every].split(step), strict=True):
                logits = some @ table.T
                sums = [F.cross_entropy(scale * logits, labels, reduction="sum") for scale in SCALES]
                losses += (torch.stack(sums).double() * 2**20).round()
        losses = parallel.all_reduce(losses, self.group) / 2**20 + SCALE_PULL * (scales - 1).square()
        return _lowest(SCALES, losses.tolist())

    def _wanted(self, stream: Tensor) -> Tensor:
        """The teacher's stream of one sample in the student's channels."""
        return self.basis.project(stream) if self.turned else stream[..., list(self.plan.hidden)]

    def _rows(self) -> list[tuple[str, Parameter]]:
        return [(row.key, row) for row in layout.layer_parameters(self.plan.source)]

    def _teacher_layer(self, number: int) -> Layer:
        layer = read_layer(self.reader, number, self.device)
        for row in layout.layer_parameters(self.plan.source):
            refuse_non_finite(row, number, layer[row])
        return layer

    def _read(self, row: Parameter) -> Tensor:
        tensor = self.reader.tensor(row)
        refuse_non_finite(row, None, tensor)
        return tensor.to(self.device)

    def _write(self, row: Parameter, at: int | None, tensor: Tensor) -> None:
        if self.writer is not None:
            self.writer.write(row, tensor.to(self.dtype), at)

    def _rounded(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype).float()

    def _normed_moments(self, stream: Tensor, place: int | None) -> tuple[Tensor, Tensor]:
        """Moments of the student's normed stream, ``[k, k]``, and of it with the teacher's, ``[k, H]``."""
        epsilon = self.plan.source.layernorm_epsilon

        def parts(sample: int) -> tuple[Tensor, Tensor, Tensor | None]:
            own, other = (rms_norm(x[sample], None, epsilon) for x in (self.student, stream))
            return own, other, None if place is None else self.sensitivity[place, sample]

        return self._moments(parts, self.student.shape[-1], stream.shape[-1])

    def _moments(
        self, parts: Callable[[int], tuple[Tensor, Tensor, Tensor | None]], inputs: int, outputs: int
    ) -> tuple[Tensor, Tensor]:
        """``sum w x x^T`` and ``sum w x y^T`` over the job's samples, ``parts`` giving x, y and w of one of ours.

        The same bits on every grid: two passes over the samples, the first for the quantum of the second's products.
        """
        x_squares, y_squares = (torch.zeros(n, dtype=torch.float64, device=self.device) for n in (inputs, outputs))
        for sample in self.samples:
            x, y, weights = parts(sample)
            x_squares += squares(x, weights)
            y_squares += squares(y, weights)
        x_squares, y_squares = (parallel.all_reduce(value, self.group) for value in (x_squares, y_squares))
        own, other = quantum(x_squares, x_squares), quantum(x_squares, y_squares)
        moment = torch.zeros(inputs, inputs, dtype=torch.float64, device=self.device)
        cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=self.device)
        for sample in self.samples:
            x, y, weights = parts(sample)
            second_moment(x, x, weights, own, out=moment)
            second_moment(x, y, weights, other, out=cross)
        return parallel.all_reduce(moment, self.group), parallel.all_reduce(cross, self.group)


def _lowest(at: Sequence[float], values: Sequence[float]) -> float:
    """Where the parabola through the least of ``values`` and its neighbours is lowest; points are evenly spaced."""
    best = min(range(len(values)), key=values.__getitem__)
    if best in (0, len(values) - 1):
        return at[best]
    before, least, after = values[best - 1 : best + 2]
    bend = before - 2 * least + after
    return at[best] + (at[1] - at[0]) * (before - after) / (2 * bend) if bend > 0 else at[best]


def _gain_of_turned(solved: Tensor, weight: Tensor) -> Tensor:
    """``[k]``, by which the columns of ``solved [rows, k]`` are divided to have the root mean square of ``weight``."""
    columns, whole = solved.square().mean(dim=0).sqrt(), weight.square().mean().sqrt()
    return columns / whole if bool(columns.any()) else torch.ones_like(columns)


def _divisible(gain: Tensor) -> Tensor:
    """A norm's weights, those near zero moved away from it: solved weights are divided by them."""
    gain = gain.float()
    least = 0.05 * gain.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(gain.abs() < least, torch.where(gain < 0, -least, least), gain)
