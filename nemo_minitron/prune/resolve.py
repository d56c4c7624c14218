"""Compensated pruning: the kept weights are re-solved so that the student's stream follows the teacher's.

Cutting rows and columns leaves weights that were made for inputs which are gone. Here every weight that reads changed
inputs is solved anew, in closed form, from calibration tokens, and the student stays a plain Llama. The model is
walked layer by layer, student and teacher side by side on the same tokens, x being the student's residual stream,
x* the teacher's in the student's channels (:mod:`nemo_minitron.prune.frame`):

1. where hidden channels were pruned, ``linear_qkv`` and ``linear_fc1`` are solved so that, on the student's normed
   stream, they give what the teacher's give on its own: ``min sum_t w_t |W h - W* h*|^2``;
2. ``linear_proj`` and ``linear_fc2``, which write to the stream, are solved so that the student's stream *after* them
   is the teacher's: ``min sum_t w_t |x + W a - x*|^2``, w_t the norm of the loss's gradient at that place of the
   stream. Each layer so corrects what the layers before it got wrong. After a layer that dropped layers follow, x* is
   the stream that leaves the last of these, so that the kept layer stands in for them;
3. at last final norm and output layer (:mod:`nemo_minitron.prune.head`).

All are ridge regressions towards the cut weights (:func:`nemo_minitron.moments.ridge_solve`). Where a linear layer has
a bias b, it is solved with the weights, ``W a + b`` in the place of ``W a``; but the bias of QKV of a model that has no
other, a Qwen2, stays as it is. Layers that nothing
before them has changed are copied. A tied embedding stays tied and is only cut or turned: the student reads it too.

One layer's weights and one second moment are in memory at a time. Weights are whole: under any grid each process takes
its share of the samples, and moments are added over all processes before anything is solved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import Layer, Rotary, read_layer
from nemo_minitron.model.layout import Parameter
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.moments import ridge_solve, ridge_solve_with_bias, tensor_cores, with_ones
from nemo_minitron.prune.cut import TensorReader, TensorWriter, check_source, kept, refuse_non_finite
from nemo_minitron.prune.frame import Frame, divisible
from nemo_minitron.prune.guard import Guard
from nemo_minitron.prune.head import write_head
from nemo_minitron.prune.measured import Measured
from nemo_minitron.prune.plan import Plan


@torch.no_grad()
def compensate(
    reader: TensorReader,
    plan: Plan,
    tokens: Tensor,
    sensitivity: Tensor,
    writer: TensorWriter | None,
    *,
    counted: Tensor | None = None,
    stream_moment: Tensor | None = None,
    held_out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    group: parallel.Group = None,
    progress: Callable[[int], None] = lambda layers: None,
) -> dict[str, Measured]:
    """Write the compensated student.

    Args:
        reader: the source, of ``plan.source``; read once, layer by layer.
        plan: with its ``compensation``.
        tokens: ``[n, s]`` int64, unpadded, this process's calibration samples; all work is done on their device.
        sensitivity: ``[2L, n, s]`` of these samples, as ``Scores.sensitivity``.
        writer: opened for ``plan.target``; None on processes that only contribute samples.
        counted: ``[n, s]`` bool of these samples, as ``Scores.counted``; None, on all processes alike: all count.
        stream_moment: ``[H, H]`` of the scores, which a plan that turns the stream needs.
        held_out: ``[m]`` bool: nothing is solved on the last m samples, 0 or more, on which the student is compared
            with a cut one, and which of them the model wrote itself; None, on all processes alike: solve on all.
        dtype: what is stored; the student is carried on in weights rounded to it.
        group: the processes that share the samples.
        progress: told after each source layer, of L.

    Returns:
        What teacher, cut and re-solved student lose on the held-out samples of all processes; empty without any.

    Raises:
        MinitronError: a plan for another checkpoint (before anything is written); a NaN or infinity in the source,
            with its tensor.

    Warns:
        SingularMoments: weights that the tokens do not determine are cut and not re-solved.
    """
    check_source(plan, reader)
    if plan.compensation is None:
        raise ValueError("the plan asks for no compensation")
    with tensor_cores(tokens.device):
        count = 0 if held_out is None else len(held_out)
        ridge = plan.compensation
        frame = Frame(reader, plan, tokens, sensitivity, stream_moment, writer, dtype, ridge, group, count, counted)
        return _Walk(frame, held_out).run(progress)


class _Walk:
    """Teacher's and student's streams, ``[n, s, H]`` and ``[n, s, k]`` float32, on their way through the layers."""

    def __init__(self, frame: Frame, held_out: Tensor | None) -> None:
        self.frame, self.plan, self.samples = frame, frame.plan, frame.samples
        self.changed = frame.narrower
        """Whether the student's stream differs from the teacher's so far."""
        self._biases = _solved_biases(self.plan.source)
        self.rotary = Rotary.of(self.plan.source, frame.tokens.shape[1], frame.device)
        table = frame.read(layout.EMBEDDING)
        self.teacher = self._embedded(table)
        self.guard = None if held_out is None else Guard(frame, table, held_out)
        table = frame.cut(layout.EMBEDDING, None, table).to(frame.dtype)
        frame.write(layout.EMBEDDING, None, table)
        self.student = self._embedded(table)

    def _embedded(self, table: Tensor) -> Tensor:
        """Rows of ``table [Vp, C]`` for the tokens, ``[n, s, C]`` float32."""
        stream = torch.empty(*self.frame.tokens.shape, table.shape[1], device=self.frame.device)
        for sample, tokens in enumerate(self.frame.tokens):
            stream[sample] = table[tokens].float()
        return stream

    def run(self, progress: Callable[[int], None]) -> dict[str, Measured]:
        """Re-solve and write everything, from the embedding to the output layer."""
        source, kept_layers = self.plan.source, self.plan.layers
        for number in range(kept_layers[0]):
            self._pass_dropped(number)
            progress(1)
        for position, number in enumerate(kept_layers):
            following = kept_layers[position + 1] if position + 1 < len(kept_layers) else source.num_layers
            self._layer(number, range(number + 1, following))
            progress(following - number)
        norm, table = write_head(self.frame, self.student, self.teacher, self.changed)
        if self.guard is None:
            return {}
        return self.guard.measure(self.teacher, self.student, norm, table)

    def _pass_dropped(self, number: int) -> None:
        """The teacher goes through a layer that the student has not."""
        layer = self._teacher_layer(number)
        for sample in self.samples:
            sample_slice = slice(sample, sample + 1)
            self.teacher[sample_slice] = layer.forward(self.teacher[sample_slice], self.rotary)
        self.changed = True

    def _layer(self, number: int, dropped: range) -> None:
        teacher = self._teacher_layer(number)
        student = {key: self.frame.cut(parameter, number, teacher[parameter]) for key, parameter in self._rows()}
        layer = Layer(self.plan.target, student)
        if self.guard is not None:
            self.guard.follow(number, teacher, self.rotary)

        if self.frame.narrower:
            read = self._solve_reader(number, layout.QKV_WEIGHT, teacher, layer, self.teacher, 2 * number - 1)
            student[layout.QKV_WEIGHT.key] = read
        middle = torch.empty_like(self.teacher)
        for sample in self.samples:
            sample_slice = slice(sample, sample + 1)
            inner = teacher.attention(teacher.attention_input(self.teacher[sample_slice]), self.rotary)
            middle[sample_slice] = self.teacher[sample_slice] + teacher.attention_output(inner)
        self.changed |= self.plan.target.num_attention_heads < self.plan.source.num_attention_heads
        inputs = self.student.new_empty(*self.student.shape[:2], layer.shape.proj_columns)
        for sample in self.samples:
            sample_slice = slice(sample, sample + 1)
            inputs[sample_slice] = layer.attention(layer.attention_input(self.student[sample_slice]), self.rotary)
        self._solve_writer(layout.PROJ_WEIGHT, student, inputs, middle, 2 * number, self.frame.ridge.attention)
        self.student += layer.attention_output(inputs)
        del inputs

        if self.frame.narrower:
            read = self._solve_reader(number, layout.FC1_WEIGHT, teacher, layer, middle, 2 * number)
            student[layout.FC1_WEIGHT.key] = read
        for sample in self.samples:
            sample_slice = slice(sample, sample + 1)
            inner = teacher.ffn(teacher.ffn_input(middle[sample_slice]))
            self.teacher[sample_slice] = middle[sample_slice] + teacher.ffn_output(inner)
        del middle, teacher
        for between in dropped:
            self._pass_dropped(between)
        self.changed |= self.plan.target.ffn_hidden_size < self.plan.source.ffn_hidden_size
        inputs = self.student.new_empty(*self.student.shape[:2], layer.shape.ffn_hidden_size)
        for sample in self.samples:
            inputs[sample] = layer.ffn(layer.ffn_input(self.student[sample]))
        self._solve_writer(layout.FC2_WEIGHT, student, inputs, self.teacher, 2 * dropped.stop - 1, self.frame.ridge.ffn)
        self.student += layer.ffn_output(inputs)

        position = self.plan.position(number)
        for key, parameter in self._rows():
            self.frame.write(parameter, position, student[key])

    def _solve_reader(
        self, number: int, parameter: Parameter, teacher: Layer, student: Layer, stream: Tensor, place: int
    ) -> Tensor:
        """``linear_qkv`` or ``linear_fc1`` for the student's narrower normed stream.

        Solved as if the norm had no weights, which leaves inputs of one scale, and divided by them afterwards. The norm
        of a turned stream has none to keep, and gets those that leave every column of the solved weights with the root
        mean square of the teacher's: weights as small as ``weight * norm`` would train at many times the rate that
        AdamW's steps of one size mean for the teacher's, the more where the stream is largest.
        ``place``: row of the sensitivity that belongs to ``stream``; the embeddings have none.
        """
        norm = layout.QKV_NORM if parameter is layout.QKV_WEIGHT else layout.FC1_NORM
        bias = self._biases.get(parameter.key)
        weighted = place if place >= 0 else None
        moment, cross = self.frame.normed_moments(self.student, stream, weighted, bias is not None)
        kept_rows = kept(self.plan, parameter.axes[0], number)
        weight = teacher[parameter] if kept_rows is None else teacher[parameter][kept_rows.to(self.frame.device)]
        if bias is None:
            solved = self.frame.solve_reader(moment, cross, weight * teacher[norm])
        else:
            solved, offset = self.frame.solve_biased_reader(moment, cross, weight * teacher[norm], student[bias])
            student.tensors[bias.key] = self.frame.rounded(offset)  # type: ignore[index]  # it may be the teacher's own
        gain = self.frame.rounded(divisible(_gain_of_turned(solved, weight) if self.frame.turned else student[norm]))
        student.tensors[norm.key].copy_(gain)  # type: ignore[index]
        return self.frame.rounded(solved / gain)

    def _solve_writer(
        self, parameter: Parameter, student: dict[str, Tensor], inputs: Tensor, target: Tensor, place: int, ridge: float
    ) -> None:
        """``linear_proj`` or ``linear_fc2``: the student's stream after it follows the teacher's.

        ``place``: row of the sensitivity that belongs to ``target``.
        """
        if not self.changed:
            return

        bias = self._biases.get(parameter.key)

        def parts(sample: int) -> tuple[Tensor, Tensor, Tensor]:
            wanted = self.frame.projected(target[sample])
            given = inputs[sample] if bias is None else with_ones(inputs[sample])
            return given, wanted - self.student[sample], self.frame.sensitivity[place, sample]

        moment, cross = self.frame.moments(parts, inputs.shape[-1] + (bias is not None), self.student.shape[-1])
        prior = student[parameter.key]
        if bias is None:
            solved = ridge_solve(moment, cross, prior, ridge)
        else:
            before = student[bias.key]
            solved, offset = ridge_solve_with_bias(moment, cross, prior, before, ridge, self.frame.token_count)
            student[bias.key] = self.frame.rounded(offset)
        student[parameter.key] = self.frame.rounded(solved)

    def _rows(self) -> list[tuple[str, Parameter]]:
        return [(parameter.key, parameter) for parameter in layout.layer_parameters(self.plan.source)]

    def _teacher_layer(self, number: int) -> Layer:
        layer = read_layer(self.frame.reader, number, self.frame.device)
        for parameter in layout.layer_parameters(self.plan.source):
            refuse_non_finite(parameter, number, layer[parameter])
        return layer


def _solved_biases(shape: ModelShape) -> dict[str, Parameter]:
    """Biases that are solved anew, by the key of the weights with which they are."""
    rows = {layout.PROJ_WEIGHT.key: layout.PROJ_BIAS} if shape.proj_bias else {}
    if shape.mlp_bias:
        rows |= {layout.FC1_WEIGHT.key: layout.FC1_BIAS, layout.FC2_WEIGHT.key: layout.FC2_BIAS}
    return rows | ({layout.QKV_WEIGHT.key: layout.QKV_BIAS} if rows and shape.qkv_bias else {})


def _gain_of_turned(solved: Tensor, weight: Tensor) -> Tensor:
    """``[k]``, by which the columns of ``solved [rows, k]`` are divided to have the root mean square of ``weight``."""
    columns, whole = solved.square().mean(dim=0).sqrt(), weight.square().mean().sqrt()
    return columns / whole if bool(columns.any()) else torch.ones_like(columns)
