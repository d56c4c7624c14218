"""Which query groups to remove, judged by the next-token loss without them.

A model has few query groups in a layer, and each is much: what their removal does to the loss is far from the small
errors for which Fisher information speaks (:mod:`nemo_minitron.importance.reconstruction`). Here each is removed in
turn, the rest of its layer's ``linear_proj`` is re-solved as compensation does it, and the model is run to its end.
Tokens to measure losses on should ask for copying (:mod:`nemo_minitron.importance.echoes`).

Candidates of some layers at a time run together, one layer's weights in memory at a time. Weights are whole: under any
grid each process takes its share of the samples; moments and losses are rounded so that float64 adds them without
error, and the choice is the same on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_minitron import parallel
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import Layer, LayerReader, Rotary, read_head, read_layer
from nemo_minitron.model.next_token import label_count, loss_sums, next_labels
from nemo_minitron.moments import ridge_solve, ridge_solve_with_bias, two_pass_moments, with_ones

STREAM_BYTES = 2 << 30
"""Bounds the streams of candidates that are alive at once; the candidates of one layer are in any case."""

Groups = frozenset[int]
Candidate = tuple[int, int]
"""A layer and a group of it, 0-based."""


class GroupLoss:
    """Losses of one model on fixed tokens with one more query group removed from one of its layers.

    Args:
        reader: the checkpoint; its layers are read once for every call, or more often where memory asks for it.
        tokens: ``[n, s]`` int64, unpadded, this process's samples; all work is done on their device.
        fitted: ``[m, s]``, this process's samples to re-solve ``linear_proj`` on. weights: ``[L, m, s]``, of their
            tokens in each layer's regression.
        ridge: pull of the regression towards the cut weights (:func:`nemo_minitron.moments.ridge_solve`).
        counted: ``[n, s]`` bool, the positions of ``tokens`` whose loss is counted; None: all.
        half: matrix products in bfloat16, where the hardware is faster at them; streams stay float32.
        group: the processes that share the samples.
        progress: told of each sample that has passed a layer, of candidates and of the fit; the output layer counts
            as :meth:`ModelShape.layers_of_head`.
    """

    def __init__(
        self,
        reader: LayerReader,
        tokens: Tensor,
        fitted: Tensor,
        weights: Tensor,
        *,
        ridge: float,
        counted: Tensor | None = None,
        half: bool = False,
        group: parallel.Group = None,
        progress: Callable[[int], None] = lambda layers: None,
    ) -> None:
        self.reader, self.shape, self.ridge = reader, reader.shape, ridge
        self.tokens, self.fitted, self.weights = tokens, fitted, weights
        self.group, self.progress = group, progress
        self._autocast = torch.autocast(tokens.device.type, torch.bfloat16, enabled=half)
        self._rotary = Rotary.of(self.shape, fitted.shape[1], fitted.device)
        self._labels = next_labels(tokens, counted)
        device = tokens.device
        count = torch.tensor([label_count(tokens, counted), fitted.numel()], device=device)
        self._label_count, self._fitted_count = parallel.all_reduce(count, group).tolist()

    @torch.no_grad()
    def __call__(self, gone: Mapping[int, Groups]) -> dict[Candidate, float]:
        """Mean loss without each candidate, nats/token; the same on every process.

        Args:
            gone: by layer, 0-based, the groups that are removed from it already, while the candidates of another layer
                are tried as before; layers that are not named have no candidates.
        """
        losses: dict[Candidate, float] = {}
        ours, theirs = self._embed(self.tokens), self._embed(self.fitted)
        for layers in self._together():
            branches: dict[Candidate, Tensor] = {}
            for number in layers:
                layer = read_layer(self.reader, number, ours.device)
                self._advance(branches.values(), layer)
                with self._autocast:
                    inner = self._attention(layer, theirs)
                    for name, candidate in self._candidates(number, layer, inner, gone.get(number)):
                        branches[number, name] = self._through(candidate, ours.clone())
                    for sample in range(len(theirs)):
                        one = slice(sample, sample + 1)
                        theirs[one] = layer.after_attention(theirs[one], inner[one])
                    self._through(layer, ours)
                del inner
                self.progress(len(theirs))
            if branches:
                for number in range(layers.stop, self.shape.num_layers):
                    self._advance(branches.values(), read_layer(self.reader, number, ours.device))
                losses |= self._losses(branches)
        return losses

    def _together(self) -> Iterator[range]:
        """Layers whose candidates run to the model's end together."""
        bytes_of_layer = 4 * self.tokens.numel() * self.shape.hidden_size * self.shape.num_query_groups
        mine = torch.tensor(max(1, STREAM_BYTES // max(1, bytes_of_layer)), device=self.tokens.device)
        step = int(parallel.all_reduce(mine, self.group, "min"))  # all agree, whatever their share of the samples
        total = self.shape.num_layers
        return (range(first, min(first + step, total)) for first in range(0, total, step))

    def _embed(self, tokens: Tensor) -> Tensor:
        table = self.reader.tensor(layout.EMBEDDING)
        return table[tokens.cpu()].to(tokens.device, torch.float32)

    def _through(self, layer: Layer, stream: Tensor) -> Tensor:
        """``[n, s, H]`` after a layer, in place, a sample at a time: the same bits whatever others there are."""
        for sample in range(len(stream)):
            one = slice(sample, sample + 1)
            stream[one] = layer.forward(stream[one], self._rotary)
        return stream

    def _advance(self, streams: Iterable[Tensor], layer: Layer) -> None:
        with self._autocast:
            for stream in streams:
                self._through(layer, stream)
                self.progress(len(stream))

    def _attention(self, layer: Layer, stream: Tensor) -> Tensor:
        """Inputs of ``linear_proj``, ``[m, s, A*d]`` float32."""
        inner = stream.new_empty(*stream.shape[:2], self.shape.proj_columns)
        for sample in range(len(stream)):
            one = slice(sample, sample + 1)
            inner[one] = layer.attention(layer.attention_input(stream[one]), self._rotary)
        return inner

    def _candidates(self, number: int, layer: Layer, inner: Tensor, gone: Groups | None) -> Iterator[tuple[int, Layer]]:
        """The layer without one more group, by the group's number, ``linear_proj`` solved on the columns of the rest.

        Columns of removed groups are zero: what reads the model is as without them.
        """
        left = [] if gone is None else [name for name in range(self.shape.num_query_groups) if name not in gone]
        if len(left) < 2:
            return
        shape, biased = self.shape, self.shape.proj_bias
        weight, bias = layer[layout.PROJ_WEIGHT].float(), layer[layout.PROJ_BIAS].float() if biased else None

        def parts(sample: int) -> tuple[Tensor, Tensor, Tensor]:
            x = inner[sample]
            target = F.linear(x, weight, bias)
            return with_ones(x) if biased else x, target, self.weights[number, sample]

        sizes = (shape.proj_columns + biased, shape.hidden_size)
        with torch.autocast(inner.device.type, enabled=False):
            moment, cross = two_pass_moments(parts, len(inner), sizes, inner.device, self.group)
        width = shape.heads_per_group * shape.kv_channels
        for name in left:
            columns = [range(other * width, (other + 1) * width) for other in left if other != name]
            kept = torch.tensor([column for some in columns for column in some], device=inner.device)
            with torch.autocast(inner.device.type, enabled=False):  # not around the yield: it would hold for the caller
                candidate = self._without(layer, kept, moment, cross, weight, bias)
            yield name, candidate

    def _without(
        self, layer: Layer, kept: Tensor, moment: Tensor, cross: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Layer:
        """A layer whose ``linear_proj`` reads the columns ``kept`` alone."""
        tensors, solved = dict(layer.tensors), torch.zeros_like(weight)
        if bias is None:
            solved[:, kept] = ridge_solve(moment[kept][:, kept], cross[kept], weight[:, kept], self.ridge)
        else:
            rows = torch.cat((kept, kept.new_tensor([len(moment) - 1])))
            solved[:, kept], tensors[layout.PROJ_BIAS.key] = ridge_solve_with_bias(
                moment[rows][:, rows], cross[rows], weight[:, kept], bias, self.ridge, self._fitted_count
            )
        tensors[layout.PROJ_WEIGHT.key] = solved
        return Layer(layer.shape, tensors)

    def _losses(self, branches: Mapping[Candidate, Tensor]) -> dict[Candidate, float]:
        """Mean losses of streams ``[n, s, H]`` that have left the last layer."""
        norm, head = read_head(self.reader, self.tokens.device)
        sums = torch.zeros(len(branches), dtype=torch.float64, device=self.tokens.device)
        with self._autocast:
            for place, stream in enumerate(branches.values()):
                for x, labels in zip(stream, self._labels, strict=True):
                    sums[place] += loss_sums(x[:-1], labels, norm, head, self.shape.layernorm_epsilon)[0]
                self.progress(len(stream) * self.shape.layers_of_head())
        means = parallel.all_reduce(sums, self.group) / self._label_count
        return dict(zip(branches, means.tolist(), strict=True))


def eliminate(losses: GroupLoss, layers: Sequence[int], count: int) -> np.ndarray:
    """Remove ``count`` groups from each of ``layers``, one after the other, each time the one that costs least.

    Returns:
        ``[L, G]`` float64, larger is worth more: the place of a group that goes, ``count`` for those that stay; zeros
        for other layers. Of two that cost the same the later one goes.
    """
    shape = losses.shape
    worth = np.zeros((shape.num_layers, shape.num_query_groups))
    gone = {layer: Groups() for layer in layers}
    for place in range(count):
        found = losses(gone)
        for layer in layers:
            tried = [name for (of, name) in found if of == layer]
            cheapest = min(tried, key=lambda name: (found[layer, name], -name))
            gone[layer] |= {cheapest}
            worth[layer, cheapest] = place
    for layer in layers:
        worth[layer, [name for name in range(shape.num_query_groups) if name not in gone[layer]]] = count
    return worth


def passes(losses: GroupLoss, layers: Sequence[int], count: int) -> int:
    """Samples times layers that :func:`eliminate` runs, the output layer as so many layers as take its time: the work
    that ``progress`` is told of."""
    total, groups = losses.shape.num_layers, losses.shape.num_query_groups
    head = losses.shape.layers_of_head()
    behind = sum(total - 1 - layer + head for layer in layers) * len(losses.tokens)
    return sum(total * len(losses.fitted) + (groups - place) * behind for place in range(count))
