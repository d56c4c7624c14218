"""The published scores with one layer's weights in memory at a time: no grid, no GPU, no whole model.

:mod:`nemo_minitron.importance.collect` watches a model that is in memory; here a checkpoint is read layer by layer and
all calibration samples are carried through each layer before the next is read. Reductions, sums and their order of
magnitude are the same ones, so that scores agree to accumulation noise. The residual streams of all depths, which the
cosines between layers need, are kept on the GPU, in memory or in a file (:mod:`nemo_minitron.importance.streams`).

Weights are whole: under any grid each process takes its share of the samples, and sums are added over all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.importance.collect import Groups, Pass, add, finish, reduce
from nemo_minitron.importance.reductions import Aggregation, sequence_sums
from nemo_minitron.importance.streams import Streams, room
from nemo_minitron.importance.walk import workspace
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import Layer, LayerReader, Rotary, read_layer, rms_norm
from nemo_minitron.moments import tensor_cores

FILE_BYTES = 16 << 30
"""Bounds the streams outside of a GPU; more samples are run in more passes, and the checkpoint is read for each."""


@torch.no_grad()
def stream_collect(
    reader: LayerReader,
    tokens: Tensor,
    *,
    counted: Tensor | None = None,
    aggregation: Aggregation | None = None,
    group: parallel.Group = None,
    progress: Callable[[int], None] = lambda layers: None,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Scores of a checkpoint, as :func:`nemo_minitron.importance.collect.collect` gives them.

    Args:
        reader: the checkpoint; its layers are read once for every ``FILE_BYTES`` of streams.
        tokens: ``[n, s]`` int64, unpadded, this process's samples; all work is done on their device, in float32.
        counted: ``[n, s]`` bool, the positions that count (:class:`nemo_minitron.data.blocks.Drawn`); None: all.
        group: the processes that share the samples; all get the same arrays.
        progress: told after each sample has passed a layer, of n * L.

    Raises:
        MinitronError: no tokens.
    """
    shape, aggregation = reader.shape, aggregation or Aggregation()
    rotary = Rotary.of(shape, tokens.shape[1], tokens.device)
    length, device = tokens.shape[1], tokens.device
    beside = workspace(shape, tokens[:1])
    bound = room(device, beside) if device.type == "cuda" else FILE_BYTES
    at_once = max(1, bound // (4 * (shape.num_layers + 1) * length * shape.hidden_size))
    totals: dict[str, Tensor] = {}
    with tensor_cores(device):
        for number, some in enumerate(tokens.split(at_once)):
            with Streams(shape.num_layers, (length, len(some), shape.hidden_size), device, beside) as streams:
                seen = Pass()
                seen.unpadded = counted is None
                every = torch.ones_like(some, dtype=torch.bool) if counted is None else counted.split(at_once)[number]
                seen.mask = seen.part = every.t()
                _carry(reader, some, rotary, streams, seen, progress)
                add(totals, reduce(seen, shape, Groups(), False, aggregation))
    return finish(totals, shape, Groups(data=group), False, aggregation)


def _carry(
    reader: LayerReader,
    tokens: Tensor,
    rotary: Rotary,
    streams: Streams,
    seen: Pass,
    progress: Callable[[int], None],
) -> None:
    """Carry samples ``[b, s]`` through all layers; ``streams`` ``[s, b, H]`` and ``seen`` receive what they pass."""
    shape = reader.shape
    table = reader.tensor(layout.EMBEDDING)
    for sample, sample_tokens in enumerate(tokens):
        streams[0][:, sample] = table[sample_tokens.cpu()].to(tokens.device).float()
    del table
    final = reader.tensor(layout.FINAL_NORM).to(tokens.device).float()
    for number in range(shape.num_layers):
        weights = read_layer(reader, number, tokens.device)
        entering, leaving = streams[number], streams[number + 1]
        seen.streams[number] = entering
        for sample in range(len(tokens)):
            x = entering[:, sample].to(tokens.device)[None]
            leaving[:, sample] = _pass(weights, x, rotary, seen, number, sample, len(tokens))
            progress(1)
        streams.release()
    seen.streams[shape.num_layers] = streams[shape.num_layers]
    for sample in range(len(tokens)):
        x = streams[shape.num_layers][:, sample].to(tokens.device)[None]
        h = rms_norm(x, final, shape.layernorm_epsilon)
        _keep(seen, "norm", 2 * shape.num_layers, h, sample, len(tokens))


def _pass(weights: Layer, x: Tensor, rotary: Rotary, seen: Pass, number: int, sample: int, samples: int) -> Tensor:
    """One sample ``[1, s, H]`` through one layer → ``[s, H]``."""
    h = weights.attention_input(x)
    _keep(seen, "norm", 2 * number, h, sample, samples)
    inner = weights.attention(h, rotary)
    _keep(seen, "proj", number, inner, sample, samples)
    x = x + weights.attention_output(inner)
    h = weights.ffn_input(x)
    _keep(seen, "norm", 2 * number + 1, h, sample, samples)
    neurons = weights.ffn(h)
    _keep(seen, "ffn", number, neurons, sample, samples)
    return (x + weights.ffn_output(neurons))[0]


def _keep(seen: Pass, name: str, row: int, x: Tensor, sample: int, samples: int) -> None:
    """Reduce ``[1, s, C]`` over the sequence into its sample of ``seen``."""
    if row not in seen.sums[name]:
        seen.sums[name][row] = torch.zeros(3, samples, x.shape[-1], dtype=torch.float64, device=x.device)
    mask = None if seen.unpadded or seen.mask is None else seen.mask[:, sample : sample + 1]
    seen.sums[name][row][:, sample] = sequence_sums(x.transpose(0, 1), mask)[:, 0]
