"""Which layers to remove, judged by the next-token loss without them.

Block Influence asks how much a layer turns the stream (:mod:`nemo_minitron.importance.depth`), not whether anything
depends on it. Here sets of removed layers are tried: each layer alone, every block of consecutive layers (both in
arXiv 2407.14679), or one layer after the other, greedily (arXiv 2402.09025) or with a beam.

A removed layer may be replaced by a *stand-in*, the ridge-regressed linear map from its normed input to what it adds to
the stream. That is about what compensation recovers by re-solving the layers around, so that sets are compared as they
will be used.

Sets are run together, layer by layer, one layer's weights in memory at a time; sets that agree on the layers so far
share their stream. Weights are whole: under any grid each process takes its share of the samples, and the losses, which
are rounded so that float64 adds them without error, are the same on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import LayerReader, Rotary, read_head, read_layer, rms_norm
from nemo_minitron.model.next_token import label_count, loss_sums, next_labels
from nemo_minitron.moments import ridge_solve, ridge_solve_with_bias, stream_weights, two_pass_moments, with_ones

Removed = frozenset[int]

STREAM_BYTES = 2 << 30
"""Bounds the streams that are alive at once; more sets or longer samples are run in more passes."""
TRIED = 12
"""Layers tried per state in every round after the first: those whose removal cost least in the round before."""
RIDGE = 0.01
"""Ridge of the stand-ins' regression, relative to the mean square of its inputs."""


@dataclass(frozen=True)
class Step:
    """One state of a search: layers removed (0-based) and the loss without them, nats/token."""

    removed: tuple[int, ...]
    loss: float


class LayerLoss:
    """Losses of one model on fixed tokens with any set of layers removed.

    Args:
        reader: the checkpoint; its layers are read once for every call, or more often where memory asks for it.
        tokens: ``[n, s]`` int64, unpadded, this process's samples; all work is done on their device.
        stand_ins: ``[m, s]``, this process's samples to fit linear stand-ins of removed layers on; a map of H x H wants
            many more tokens than a loss does, and those of 2,048 tokens chose layers at 0.54 nats where those of 32,768
            chose at 0.32 (SmolLM2-135M, 6 of 30 layers). None: removed layers are passed by.
        counted: ``[n, s]`` bool, the positions of ``tokens`` whose loss is counted; None: all.
        weights: ``[L, m, s]``, of the tokens of ``stand_ins`` in each layer's fit; None: all alike.
        half: matrix products in bfloat16, where the hardware is faster at them; streams stay float32.
        group: the processes that share the samples.
        progress: told after each layer of each set that is run, the output layer as
            :meth:`ModelShape.layers_of_head`, and of the fit.
    """

    def __init__(
        self,
        reader: LayerReader,
        tokens: Tensor,
        *,
        stand_ins: Tensor | None = None,
        counted: Tensor | None = None,
        weights: Tensor | None = None,
        half: bool = False,
        group: parallel.Group = None,
        progress: Callable[[int], None] = lambda layers: None,
    ) -> None:
        self.reader, self.tokens, self.group, self.progress = reader, tokens, group, progress
        self.shape = reader.shape
        self._autocast = torch.autocast(tokens.device.type, torch.bfloat16, enabled=half)
        self._rotary = Rotary.of(self.shape, tokens.shape[1], tokens.device)
        self._table = reader.tensor(layout.EMBEDDING)
        self._labels = next_labels(tokens, counted)
        count = torch.tensor(label_count(tokens, counted), device=tokens.device)
        self._count = int(parallel.all_reduce(count, group))
        self._known: dict[Removed, float] = {}
        self._stand_ins = None if stand_ins is None else self._fit(stand_ins, weights)

    @torch.no_grad()
    def __call__(self, sets: Iterable[Removed]) -> list[float]:
        """Mean loss of each set, nats/token; the same on every process. What was asked before is remembered."""
        sets = list(sets)
        new = sorted({removed for removed in sets if removed not in self._known}, key=sorted)
        if new:
            sums = torch.zeros(len(new), dtype=torch.float64, device=self.tokens.device)
            sample_bytes = 4 * self.tokens.shape[1] * self.shape.hidden_size
            at_once = max(1, STREAM_BYTES // (sample_bytes * 2 * len(new)))
            with self._autocast:
                for tokens, labels in zip(self.tokens.split(at_once), self._labels.split(at_once), strict=True):
                    sums += self._losses(tokens, labels, new)
            sums = parallel.all_reduce(sums, self.group) / self._count
            self._known |= dict(zip(new, sums.tolist(), strict=True))
        return [self._known[removed] for removed in sets]

    def _losses(self, tokens: Tensor, labels: Tensor, sets: Sequence[Removed]) -> Tensor:
        """Summed losses of each set on some samples' ``labels [n, s-1]``, ``[sets]`` float64."""
        streams = {Removed(): self._embed(tokens)}
        for layer in range(self.shape.num_layers):
            weights = read_layer(self.reader, layer, tokens.device)
            parents = {removed: Removed(earlier for earlier in removed if earlier < layer) for removed in sets}
            following: dict[Removed, Tensor] = {}
            for removed, parent in parents.items():
                key = parent | (removed & {layer})
                if key not in following:
                    x = streams[parent]
                    following[key] = self._without(layer, x) if layer in removed else weights.forward(x, self._rotary)
                self.progress(1)
            streams = following
        norm, head = read_head(self.reader, tokens.device)
        found = []
        for removed in sets:
            found.append(self._head(streams[removed], labels, norm, head))
            self.progress(self.shape.layers_of_head())
        return torch.stack(found)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self._table[tokens.cpu()].to(tokens.device, torch.float32)

    def _without(self, layer: int, x: Tensor) -> Tensor:
        if self._stand_ins is None:
            return x
        weight, bias = self._stand_ins[layer]
        added = rms_norm(x, None, self.shape.layernorm_epsilon) @ weight.T
        return x + added if bias is None else x + added + bias

    def _head(self, x: Tensor, labels: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        """Sum of the next-token losses of ``x [n, s, H]``, float64."""
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for sample, following in zip(x, labels, strict=True):
            total += loss_sums(sample[:-1], following, norm, head, self.shape.layernorm_epsilon)[0]
        return total

    @torch.no_grad()
    def _fit(self, tokens: Tensor, given: Tensor | None = None) -> list[tuple[Tensor, Tensor | None]]:
        """Stand-in of every layer, ``[H, H]`` float32, each token weighted by its stream's inverse mean square, times
        what is ``given [L, m, s]``.

        Where linear layers that write to the stream have a bias, which re-solving uses, it has one too, ``[H]``.
        """
        maps: list[tuple[Tensor, Tensor | None]] = []
        biased = self.shape.proj_bias or self.shape.mlp_bias
        count = int(parallel.all_reduce(torch.tensor([tokens.numel()], device=tokens.device), self.group))
        width, device = self.shape.hidden_size, tokens.device
        rotary = Rotary.of(self.shape, tokens.shape[1], device)
        x = self._embed(tokens)
        for layer in range(self.shape.num_layers):
            weights = read_layer(self.reader, layer, device)
            after = torch.empty_like(x)
            for sample in range(len(x)):
                sample_slice = slice(sample, sample + 1)
                with self._autocast:
                    after[sample_slice] = weights.forward(x[sample_slice], rotary)

            def parts(
                sample: int, x: Tensor = x, after: Tensor = after, layer: int = layer
            ) -> tuple[Tensor, Tensor, Tensor]:
                normed, added, weights = self._parts(x[sample], after[sample])
                weights = weights if given is None else weights * given[layer, sample]
                return with_ones(normed) if biased else normed, added, weights

            moment, cross = two_pass_moments(parts, len(x), (width + biased, width), device, self.group)
            none = torch.zeros_like(cross[:width].T, dtype=torch.float32)
            if biased:
                maps.append(ridge_solve_with_bias(moment, cross, none, none[0], RIDGE, count))
            else:
                maps.append((ridge_solve(moment, cross, none, RIDGE), None))
            x = after
            self.progress(1)
        return maps

    def _parts(self, x: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed input of a layer, what it adds, and the token's weight."""
        return rms_norm(x, None, self.shape.layernorm_epsilon), after - x, stream_weights(after)


def leave_one_out(losses: LayerLoss, count: int) -> list[Step]:
    """Remove at once the ``count`` layers whose removal alone costs least; ties go to the later layer."""
    layers = range(losses.shape.num_layers)
    alone = losses(Removed({layer}) for layer in layers)
    order = sorted(layers, key=lambda layer: (alone[layer], -layer))
    chosen = Removed(order[:count])
    return [Step(tuple(sorted(chosen)), losses([chosen])[0])]


def contiguous(losses: LayerLoss, count: int) -> list[Step]:
    """Remove the block of ``count`` consecutive layers, of all offsets, without which the loss is least."""
    offsets = range(losses.shape.num_layers - count + 1)
    blocks = [Removed(range(first, first + count)) for first in offsets]
    found = losses(blocks)
    best = min(offsets, key=lambda first: found[first])
    return [Step(tuple(sorted(blocks[best])), found[best])]


def search(losses: LayerLoss, count: int, beam: int = 1) -> list[Step]:
    """Remove one layer after the other, keeping the ``beam`` best sets of every size (1: greedily).

    Returns:
        The best set of each size from 1 to ``count``.
    """
    states = [(Removed(), list(range(losses.shape.num_layers)))]  # with all layers that are left, the cheapest first
    steps = []
    for _ in range(count):
        parents: dict[Removed, tuple[Removed, list[int]]] = {}
        for removed, order in states:
            for layer in order[:TRIED] if removed else order:
                parents.setdefault(removed | {layer}, (removed, order))
        loss_of = dict(zip(parents, losses(parents), strict=True))
        ranked = sorted(parents, key=lambda candidate: (loss_of[candidate], sorted(candidate)))
        states = []
        for best in ranked[:beam]:
            removed, order = parents[best]
            tried = [layer for candidate in ranked for layer in candidate - removed if removed < candidate]
            rest = tried + [layer for layer in order if layer not in tried]
            states.append((best, [layer for layer in rest if layer not in best]))
        steps.append(Step(tuple(sorted(ranked[0])), loss_of[ranked[0]]))
    return steps
