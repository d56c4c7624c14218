"""A walk through a checkpoint, one layer's weights in memory at a time: forward through all, backward again.

The residual stream at every layer's input is kept (:mod:`nemo_minitron.importance.streams`); on the way back each layer
is run again, sample by sample, and its observers are told what passes (:mod:`nemo_minitron.importance.metric`). Weights
are read whole; under any grid each process takes its share of the samples.

Memory: the streams and a gradient of one's size, one layer's weights in float32, one sample's activations, and logits
as :mod:`nemo_minitron.model.next_token` bounds them. Weights' gradients take 12 bytes more for each weight of a layer
(a sample's in float32, their sum in float64; 2.6 GB for a layer of Llama-3.1-8B), and ``TABLE_BYTES`` for the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.errors import MinitronError
from nemo_minitron.importance.metric import Job, LayerPass, Observer, Observes, SamplePass
from nemo_minitron.importance.streams import Streams
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import Layer, LayerReader, Rotary, read_head, read_layer, rms_norm
from nemo_minitron.model.layout import Parameter
from nemo_minitron.model.next_token import HEAD_BYTES, IGNORED, label_count, loss_gradient, next_labels
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.moments import tensor_cores

TABLE_BYTES = 256 << 20
"""Bounds the float64 gradient of embedding and output layer, which come some rows at a time."""


def job_of(reader: LayerReader, tokens: Tensor, group: parallel.Group = None, counted: Tensor | None = None) -> Job:
    """The measurement of ``tokens [n, s]`` of each process, and the positions ``counted [n, s]`` whose loss counts."""
    mine = [tokens.numel(), label_count(tokens, counted)]
    counts = parallel.all_reduce(torch.tensor(mine, device=tokens.device), group)
    return Job(reader.shape, tokens.device, int(counts[0]), int(counts[1]), group)


@torch.no_grad()
def walk(
    reader: LayerReader,
    tokens: Tensor,
    job: Job,
    observers: Mapping[Observer, Observes],
    progress: Callable[[int], None] = lambda layers: None,
    counted: Tensor | None = None,
    echoes: Tensor | None = None,
) -> None:
    """Tell observers what passes through each layer.

    Args:
        reader: the checkpoint; its layers are read twice.
        tokens: ``[n, s]`` int64, unpadded, this process's samples; forward and backward run on their device.
        job: as :func:`job_of` made it of the same tokens.
        observers: with what each observes; ``statistics`` are not for here.
        progress: told after each layer, of 2L.
        counted: ``[n, s]`` bool, the positions whose loss counts; None: all.
        echoes: ``[k, s]`` int64, this process's samples beside them for the observers that hear such; the loss of all
            their positions counts.

    Raises:
        MinitronError: a loss whose gradient is not finite.
    """
    shape, wanted, own = reader.shape, set(observers.values()), len(tokens)
    if echoes is not None:
        if counted is not None:
            counted = torch.cat([counted, torch.ones_like(echoes, dtype=torch.bool)])
        tokens = torch.cat([tokens, echoes])
    rotary = Rotary.of(shape, tokens.shape[1], tokens.device)
    labels = next_labels(tokens, counted)
    of_weights = "weight_gradients" in wanted
    beside = workspace(shape, tokens, of_weights)
    with (
        tensor_cores(tokens.device),
        Streams(
            shape.num_layers, (*tokens.shape, shape.hidden_size), tokens.device, beside, final=of_weights
        ) as streams,
    ):
        forward = _Forward(reader, tokens, rotary, streams)
        forward.run(progress)
        gradient = None if wanted <= {"activations"} else _head_gradient(reader, streams[shape.num_layers], labels)
        if not of_weights:
            streams.drop(shape.num_layers)
        for number in reversed(range(shape.num_layers)):
            forward.again(number)
            layer = _LayerWalk(number, read_layer(reader, number, tokens.device), rotary, of_weights, own)
            layer.run(streams[number], gradient, list(observers), counted)
            streams.drop(number)
            seen = LayerPass(number, layer.weights, layer.summed(job.group))
            for observer in observers:
                observer.layer(seen)
            del layer, seen  # before the next layer is read
            streams.release()
            progress(1)
        outside = [observer for observer, what in observers.items() if what == "weight_gradients"]
        if outside and gradient is not None:
            final = streams[shape.num_layers][:own]
            _Tables(reader, tokens[:own], labels[:own], final, gradient[:own], job.group).tell(outside)


def workspace(shape: ModelShape, tokens: Tensor, weight_gradients: bool = False) -> int:
    """Bytes that a walk of ``tokens [n, s]`` needs beside its streams, roughly and rather too many: the gradient of a
    stream; the weights of a layer, of the next one, and their gradients; four second moments of FFN inputs in float64;
    a sample's activations, forward and backward; the output layer and its logits."""
    length, hidden, ffn = tokens.shape[1], shape.hidden_size, shape.ffn_hidden_size
    weights = shape.parameters_per_layer() * (8 + (16 if weight_gradients else 0))
    activations = 4 * length * (24 * hidden + 12 * ffn + 8 * shape.proj_columns)
    moments = 32 * ffn * ffn + 24 * shape.proj_columns**2 + 48 * hidden * hidden
    tables = 4 * shape.vocab_size * hidden + 4 * HEAD_BYTES + (8 * TABLE_BYTES if weight_gradients else 0)
    return 4 * tokens.numel() * hidden + weights + activations + max(moments, tables)


class _Forward:
    """The way forward: the stream entering every layer and leaving the last."""

    def __init__(self, reader: LayerReader, tokens: Tensor, rotary: Rotary, streams: Streams) -> None:
        self._reader, self._tokens, self._rotary, self._streams = reader, tokens, rotary, streams

    def run(self, progress: Callable[[int], None]) -> None:
        """Fill the streams from the embedding on; those that are made again on the way back are dropped."""
        table = self._reader.tensor(layout.EMBEDDING)
        for sample, sample_tokens in enumerate(self._tokens):
            self._streams[0][sample] = table[sample_tokens.cpu()].to(self._tokens.device).float()
        del table
        for number in range(self._reader.shape.num_layers):
            self._layer(number)
            if not self._streams.kept(number):
                self._streams.drop(number)
            progress(1)

    def again(self, depth: int) -> None:
        """Make the streams up to ``depth`` again from the last one that was kept."""
        start = depth
        while start not in self._streams:
            start -= 1
        for number in range(start, depth):
            self._layer(number)

    def _layer(self, number: int) -> None:
        device = self._tokens.device
        weights = read_layer(self._reader, number, device)
        entering, leaving = self._streams[number], self._streams[number + 1]
        for sample in range(len(self._tokens)):
            sample_slice = slice(sample, sample + 1)
            leaving[sample_slice] = weights.forward(entering[sample_slice].to(device), self._rotary)
        self._streams.release()


def _head_gradient(reader: LayerReader, final: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the summed loss of ``labels [n, s-1]`` with respect to the stream after the last layer, ``[n, s, H]``
    on their device."""
    shape = reader.shape
    norm, head = read_head(reader, labels.device)
    gradient = torch.zeros(final.shape, device=labels.device)
    for sample, following in enumerate(labels):
        x = final[sample, :-1].to(labels.device)
        gradient[sample, :-1] = loss_gradient(x, following, norm, head, shape.layernorm_epsilon)
    if not torch.isfinite(gradient).all():
        raise MinitronError("importance: the gradient of the loss on the calibration tokens is not finite")
    return gradient


class _LayerWalk:
    """One layer on the way back: its samples, and the sums of its weights' gradients where they are wanted.

    Samples from ``own`` on are echoes, of which weights' gradients have no part.
    """

    def __init__(self, number: int, weights: Layer, rotary: Rotary, weight_gradients: bool, own: int) -> None:
        self.number, self.weights, self._rotary, self._own = number, weights, rotary, own
        self._leaves: dict[str, Tensor] = {}
        if weight_gradients:
            self._leaves = {key: tensor.detach().requires_grad_() for key, tensor in weights.tensors.items()}
        self._run = Layer(weights.shape, self._leaves or weights.tensors)
        self._sums = {key: torch.zeros_like(leaf, dtype=torch.float64) for key, leaf in self._leaves.items()}

    def run(
        self, x: Tensor, gradient: Tensor | None, observers: Sequence[Observer], counted: Tensor | None = None
    ) -> None:
        """Take ``x [n, s, H]`` through the layer, and ``gradient [n, s, H]`` of what leaves it back to what enters, in
        place; observers are told ``counted [n, s]`` too."""
        for sample in range(len(x)):
            sample_slice = slice(sample, sample + 1)
            seen = self._sample(sample, x[sample_slice], None if gradient is None else gradient[sample_slice])
            seen = seen if counted is None else replace(seen, counted=counted[sample_slice])
            if sample >= self._own:
                seen = replace(seen, sample=sample - self._own, echo=True)
            for observer in observers:
                if observer.hears_echoes or not seen.echo:
                    observer.sample(seen)
            if gradient is not None and seen.entering_gradient is not None:
                gradient[sample_slice] = seen.entering_gradient

    def _sample(self, sample: int, x: Tensor, gradient: Tensor | None) -> SamplePass:
        weights, device, echo = self._run, self._rotary.cos.device, sample >= self._own
        with torch.set_grad_enabled(gradient is not None):
            entering = x.to(device, copy=True).requires_grad_(gradient is not None)
            qkv_input = weights.attention_input(entering)
            proj_input = weights.attention(qkv_input, self._rotary)
            middle = entering + weights.attention_output(proj_input)
            fc1_input = weights.ffn_input(middle)
            fc2_input = weights.ffn(fc1_input)
            leaving = middle + weights.ffn_output(fc2_input)
        gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if gradient is not None:
            after = gradient.to(device, copy=True)  # what observers keep of it is not overwritten
            leaves = [] if echo else list(self._leaves.values())
            at_entering, at_middle, *of_weights = torch.autograd.grad(leaving, [entering, middle, *leaves], after)
            gradients = (at_entering, at_middle, after)
            for total, part in zip(self._sums.values(), of_weights, strict=not echo):
                total += part
        return SamplePass(
            self.number,
            sample,
            self.weights,
            entering.detach(),
            qkv_input.detach(),
            proj_input.detach(),
            middle.detach(),
            fc1_input.detach(),
            fc2_input.detach(),
            leaving.detach(),
            *gradients,
        )

    def summed(self, group: parallel.Group) -> dict[Parameter, Tensor]:
        """Gradients of the weights, over all processes; tensors are reduced in the order of the layout table."""
        parameters = layout.layer_parameters(self.weights.shape)
        return {
            parameter: parallel.all_reduce(self._sums[parameter.key], group)
            for parameter in parameters
            if parameter.key in self._sums
        }


@dataclass
class _Tables:
    """Gradients of what lies outside of the layers, some rows of the tables at a time.

    With ``p = softmax(logits) - onehot(label)``, or 0 where the label does not count, the output layer's gradient is
    ``sum p h^T`` over tokens, h being the normed stream ``x / rms(x) * g``; the final norm's is
    ``sum_v W_v * (sum p x / rms(x))_v``, of which each chunk of rows v has a part. The embedding's rows get the
    gradient of the stream where their token stands.

    Attributes:
        labels: ``[n, s-1]``, as :func:`nemo_minitron.model.next_token.next_labels` gives them.
        final: ``[n, s, H]``, stream after the last layer. gradient: ``[n, s, H]``, of the stream before the first.
    """

    reader: LayerReader
    tokens: Tensor
    labels: Tensor
    final: Tensor
    gradient: Tensor
    group: parallel.Group

    def tell(self, observers: Sequence[Observer]) -> None:
        """Tell observers of every row of the tables, and of the final norm."""
        shape, device = self.reader.shape, self.tokens.device
        norm, head = read_head(self.reader, device)
        tied = shape.share_embeddings_and_output_weights
        table = head if tied else self.reader.tensor(layout.EMBEDDING)
        log_sums = [self._log_sums(sample, norm, head) for sample in range(len(self.tokens))]
        of_norm = torch.zeros_like(norm, dtype=torch.float64)
        step = max(1, TABLE_BYTES // (8 * shape.hidden_size))
        for start in range(0, shape.vocab_size, step):
            rows = slice(start, min(start + step, shape.vocab_size))
            unscaled = parallel.all_reduce(self._output_rows(rows, norm, head[rows], log_sums), self.group)
            embedding = parallel.all_reduce(self._embedding_rows(rows), self.group)
            of_norm += (unscaled * head[rows]).sum(dim=0)
            output = unscaled * norm
            weight = table[rows].to(device, torch.float32)
            for observer in observers:
                observer.outside(layout.EMBEDDING, weight, embedding + output if tied else embedding)
                if not tied:
                    observer.outside(layout.OUTPUT, head[rows], output)
        for observer in observers:
            observer.outside(layout.FINAL_NORM, norm, of_norm)

    def _normed(self, sample: int, norm: Tensor | None) -> Tensor:
        """Normed stream of a sample's positions that have a label, ``[s-1, H]``; without ``norm`` not scaled."""
        return rms_norm(self.final[sample, :-1].to(self.tokens.device), norm, self.reader.shape.layernorm_epsilon)

    def _log_sums(self, sample: int, norm: Tensor, head: Tensor) -> Tensor:
        """Logarithms of the softmax's denominators, ``[s-1]``."""
        return torch.cat([(h @ head.T).logsumexp(dim=-1) for h in self._normed(sample, norm).split(_at_once(head))])

    def _output_rows(self, rows: slice, norm: Tensor, head: Tensor, log_sums: Sequence[Tensor]) -> Tensor:
        """``sum p x / rms(x)`` of this process's tokens for some rows, ``[v, H]`` float64; ``head [v, H]``."""
        total = torch.zeros_like(head, dtype=torch.float64)
        for sample, denominators in enumerate(log_sums):
            difference = (self._normed(sample, norm) @ head.T - denominators[:, None]).exp()
            labels = self.labels[sample]
            (here,) = ((labels >= rows.start) & (labels < rows.start + len(head))).nonzero(as_tuple=True)
            difference[here, labels[here] - rows.start] -= 1
            difference[labels == IGNORED] = 0
            total += difference.T @ self._normed(sample, None)
        return total

    def _embedding_rows(self, rows: slice) -> Tensor:
        """Gradient of the stream before the first layer, summed by token for some rows, ``[v, H]`` float64."""
        total = torch.zeros(rows.stop - rows.start, self.gradient.shape[-1], dtype=torch.float64)
        ids = self.tokens.cpu() - rows.start
        for sample_ids, gradient in zip(ids, self.gradient, strict=True):
            here = (sample_ids >= 0) & (sample_ids < len(total))
            total.index_add_(0, sample_ids[here], gradient.cpu()[here].double())  # a GPU adds in no fixed order
        return total.to(self.tokens.device)


def _at_once(head: Tensor) -> int:
    """Positions whose logits have room."""
    return max(1, HEAD_BYTES // (4 * len(head)))
