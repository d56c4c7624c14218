"""Rankings that know what compensation will repair: the loss that is left after the best re-solve.

A unit that is large but that others can stand in for is worth little once they are re-solved; activation size cannot
see that. Here a unit's worth is its place in a backward elimination (:func:`nemo_minitron.moments.elimination_order`)
whose error is measured by the loss: the output metric is the Fisher information of the residual stream,
``G = E[g g^T]``, g the gradient of the next-token loss (its Kronecker form as in arXiv 1503.05671).

The model is streamed: one layer's weights in memory at a time, forward through all layers and backward again, with the
stream at every layer's input kept in a temporary file. Weights are read whole; under any grid each process takes its
share of the samples, and moments are added over all of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_minitron import parallel
from nemo_minitron.errors import MinitronError
from nemo_minitron.importance.stream_file import StreamFile
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import Layer, LayerReader, Rotary, read_head, read_layer
from nemo_minitron.model.next_token import loss_gradient
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.moments import TOKENS_AT_ONCE, elimination_order, metric_root, quantum, second_moment, stream_weights

RIDGE = 0.03
"""Of the elimination: small calibration sets make some units look replaceable that are not."""
EMBEDDING_SHARE = 0.3
"""Weight of the embeddings in the stream's moment: what is lost there, no layer before can make good."""


@dataclass(frozen=True)
class _Moments:
    """What the backward pass gathers of one layer, summed over tokens; sizes are those of the canonical layer."""

    ffn: Tensor  # [F, F], inputs of linear_fc2, each token by the inverse mean square of the stream it is added to
    proj: Tensor  # [A*d, A*d], inputs of linear_proj, likewise
    ffn_metric: Tensor  # [H, H], gradients of the stream after the layer
    proj_metric: Tensor  # [H, H], gradients of the stream after the attention

    def reduced(self, group: parallel.Group) -> _Moments:
        return _Moments(*(parallel.all_reduce(value, group).cpu() for value in vars(self).values()))


def rank_by_reconstruction(
    reader: LayerReader,
    tokens: Tensor,
    *,
    group: parallel.Group = None,
    progress: Callable[[int], None] = lambda layers: None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Worth of every unit by what is lost without it after re-solving the rest.

    Args:
        reader: the checkpoint; its layers are read twice.
        tokens: ``[n, s]`` int64, unpadded, this process's samples; forward and backward run on their device.
        group: the processes that share the samples; all get the same arrays.
        progress: told after each layer, of 2L.

    Returns:
        float64 arrays as :class:`nemo_minitron.importance.scores.Scores` names and sizes them: ``ffn_rank [L, F]``,
        ``heads_rank [L, A]``, ``groups_rank [L, G]`` (places in the elimination of that layer, larger is worth more),
        ``stream_moment [H, H]`` (second moment of the residual stream relative to the token's mean square, summed over
        tokens and all depths, the embeddings counting as ``EMBEDDING_SHARE`` of the others together; the same bits on
        every grid) and its diagonal ``hidden_rank [H]`` (better than norm outputs, and than Fisher-weighted energy, in
        our measurements);
        and ``sensitivity [2L, n, s]`` float32 of these samples: the norm of the gradient of the residual stream after
        the attention and after the FFN of each layer, which is how much an error there matters to the loss.

    Raises:
        MinitronError: a loss that is not finite.
    """
    shape = reader.shape
    device = tokens.device
    rotary = Rotary.of(shape, tokens.shape[1], device)
    arrays = {
        "ffn_rank": np.zeros((shape.num_layers, shape.ffn_hidden_size)),
        "heads_rank": np.zeros((shape.num_layers, shape.num_attention_heads)),
        "groups_rank": np.zeros((shape.num_layers, shape.num_query_groups)),
    }
    sensitivity = np.zeros((2 * shape.num_layers, *tokens.shape), dtype=np.float32)
    job = int(parallel.all_reduce(torch.tensor(tokens.numel(), device=device), group))
    moment = _StreamMoment(shape, job, device)
    with tempfile.TemporaryDirectory(prefix="minitron-streams-") as folder:
        file = StreamFile(Path(folder) / "streams", (shape.num_layers + 1, *tokens.shape, shape.hidden_size))
        streams = file.tensor
        _forward(reader, tokens, rotary, file, progress)
        gradient = _head_gradient(reader, streams[-1], tokens)
        for layer in reversed(range(shape.num_layers)):
            weights = read_layer(reader, layer, device)
            slopes = sensitivity[2 * layer : 2 * layer + 2]
            gradient, moments = _backward(weights, streams[layer], gradient, rotary, slopes, moment)
            written = {row: weights[row].cpu().double() for row in (layout.FC2_WEIGHT, layout.PROJ_WEIGHT)}
            del weights
            for name, rank in _layer_ranks(shape, written, moments.reduced(group)).items():
                arrays[name][layer] = rank
            del moments, written  # before the next layer's: those of an 8B's FFN are 1.6 GB
            file.release()
            progress(1)
        for sample in range(len(tokens)):
            moment.add(streams[0, sample].to(device), 2 * shape.num_layers * EMBEDDING_SHARE)
    arrays["stream_moment"] = parallel.all_reduce(moment.sum, group).cpu().numpy()
    arrays["hidden_rank"] = arrays["stream_moment"].diagonal().copy()
    return arrays, sensitivity


def _layer_ranks(shape: ModelShape, written: dict[layout.Parameter, Tensor], moments: _Moments) -> dict[str, Tensor]:
    """Places of one layer's units; ``written``: the weights that write to the stream. ``moments.ffn`` is consumed."""
    head, r = shape.kv_channels, shape.heads_per_group
    fc2 = metric_root(moments.ffn_metric) @ written[layout.FC2_WEIGHT]
    proj = metric_root(moments.proj_metric) @ written[layout.PROJ_WEIGHT]
    return {
        "ffn_rank": elimination_order(moments.ffn, fc2, RIDGE, overwrite=True),
        "heads_rank": elimination_order(moments.proj, proj, RIDGE, unit=head),
        "groups_rank": elimination_order(moments.proj, proj, RIDGE, unit=r * head),
    }


def clipped(sensitivity: np.ndarray) -> np.ndarray:
    """``sensitivity [2L, n, s]`` of all samples with the largest thousandth of each row cut to what bounds it.

    Gradients have a long tail; one token of a hundred times the mean would decide a regression.
    """
    flat = sensitivity.reshape(len(sensitivity), -1)
    bound = np.quantile(flat, 0.999, axis=1).astype(sensitivity.dtype)
    return np.minimum(flat, bound[:, None]).reshape(sensitivity.shape)


def _forward(
    reader: LayerReader, tokens: Tensor, rotary: Rotary, file: StreamFile, progress: Callable[[int], None]
) -> None:
    """The residual stream entering every layer and leaving the last, ``[L+1, n, s, H]`` float32, into a file."""
    streams = file.tensor
    table = reader.tensor(layout.EMBEDDING)
    for sample, row in enumerate(tokens):
        streams[0, sample] = table[row.cpu()].float()
    del table
    for layer in range(reader.shape.num_layers):
        weights = read_layer(reader, layer, tokens.device)
        for sample in range(len(tokens)):
            one = slice(sample, sample + 1)
            streams[layer + 1, one] = weights.forward(streams[layer, one].to(tokens.device), rotary).cpu()
        file.release()
        progress(1)


def _head_gradient(reader: LayerReader, final: Tensor, tokens: Tensor) -> Tensor:
    """Gradient of the summed next-token loss with respect to the stream after the last layer, ``[n, s, H]``."""
    shape = reader.shape
    device = tokens.device
    norm, head = read_head(reader, device)
    gradient = torch.zeros_like(final)
    for sample, labels in enumerate(tokens[:, 1:]):
        x = final[sample, :-1].to(device)
        gradient[sample, :-1] = loss_gradient(x, labels, norm, head, shape.layernorm_epsilon).cpu()
    if not torch.isfinite(gradient).all():
        raise MinitronError("importance: the gradient of the loss on the calibration tokens is not finite")
    return gradient


def _backward(
    weights: Layer, x: Tensor, gradient: Tensor, rotary: Rotary, slopes: np.ndarray, moment: _StreamMoment
) -> tuple[Tensor, _Moments]:
    """Through one layer, sample by sample: gradient at its input, and its moments.

    ``x [n, s, H]`` enters the layer; ``gradient [n, s, H]`` belongs to the stream that leaves it. ``slopes [2, n, s]``
    receives the gradient's norms after the attention and after the FFN; both streams are added to ``moment``.
    """
    shape, device = weights.shape, rotary.cos.device
    sizes = (shape.ffn_hidden_size, shape.proj_columns, shape.hidden_size, shape.hidden_size)
    ffn, proj, ffn_metric, proj_metric = (_Gathered(size, device) for size in sizes)
    before = torch.empty_like(gradient)
    for sample in range(len(x)):
        one = slice(sample, sample + 1)
        with torch.enable_grad():
            entering = x[one].to(device, copy=True).requires_grad_(True)
            inner = weights.attention(weights.attention_input(entering), rotary)
            middle = entering + F.linear(inner, weights[layout.PROJ_WEIGHT])
            neurons = weights.ffn(weights.ffn_input(middle))
            leaving = middle + F.linear(neurons, weights[layout.FC2_WEIGHT])
            at_leaving = gradient[one].to(device)
            at_entering, at_middle = torch.autograd.grad(leaving, (entering, middle), at_leaving)
        before[one] = at_entering.cpu()
        ffn.add(neurons.detach() * stream_weights(leaving.detach()).sqrt()[..., None])
        proj.add(inner.detach() * stream_weights(middle.detach()).sqrt()[..., None])
        for row, slope in enumerate((at_middle, at_leaving)):
            slopes[row, sample] = slope[0].norm(dim=-1).cpu().numpy()
        ffn_metric.add(at_leaving)
        proj_metric.add(at_middle)
        for stream in (middle.detach(), leaving.detach()):
            moment.add(stream[0])
    return before, _Moments(ffn.total(), proj.total(), ffn_metric.total(), proj_metric.total())


class _StreamMoment:
    """``sum x x^T / mean(x^2)`` over tokens of residual streams; the same bits whatever process saw which sample."""

    def __init__(self, shape: ModelShape, tokens: int, device: torch.device) -> None:
        """``tokens``: of the whole job."""
        self.sum = torch.zeros(shape.hidden_size, shape.hidden_size, dtype=torch.float64, device=device)
        # relative to its token's mean square, no square exceeds the number of channels
        bound = torch.tensor(2.0 * shape.num_layers * (1 + EMBEDDING_SHARE) * tokens * shape.hidden_size)
        self._quantum = quantum(bound, bound)

    def add(self, stream: Tensor, weight: float = 1.0) -> None:
        """``[s, H]`` of one sample."""
        second_moment(stream, stream, weight * stream_weights(stream), self._quantum, out=self.sum)


class _Gathered:
    """Second moment of activations that come a sample at a time; adding a large float64 matrix for each is slow."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._waiting: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """``[1, s, C]``, kept until there are enough."""
        self._waiting.append(x[0])
        if sum(map(len, self._waiting)) >= TOKENS_AT_ONCE:
            self.total()

    def total(self) -> Tensor:
        """``[C, C]`` of all that was added."""
        if self._waiting:
            x = torch.cat(self._waiting)
            second_moment(x, x, out=self._sum)
            self._waiting.clear()
        return self._sum
