"""Collect importance statistics on a Megatron-Core GPTModel by forward hooks, at any TP x PP x SP x DP grid.

Where each statistic comes from, and how it lies on the grid (t = TP size):

=============  =======================================  =====================  ================================
statistic      activation                               on one rank            joined by
=============  =======================================  =====================  ================================
ffn            input of ``mlp.linear_fc2``              ``[s, b, F/t]``        gather over TP, rank-contiguous
heads, groups  input of ``self_attention.linear_proj``  ``[s, b, A*d/t]``      gather over TP (whole groups)
hidden         outputs of the norms                     ``[s, b, H]``, or      nothing, or per-sample sums over
                                                        ``[s/t, b, H]`` (SP)   TP before they are squared
residual       layer inputs, last layer's output        as hidden              sum over TP (SP); joined over PP
=============  =======================================  =====================  ================================

Where only some tokens count in a loss, an activation counts where the token that it helps to predict does: at position
t, where token t + 1 counts. All means are over such positions alone, those of cosines and second moments too, and a
sample without any is none. Of a prompt is seen what attention brings to these positions.

Hooks only reduce; collectives run after each forward pass, in the same order on every rank, so that they cannot
cross Megatron's pipeline messages. Rows of layers on other stages are added over PP, samples over DP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nemo_minitron import parallel
from nemo_minitron.errors import MinitronError
from nemo_minitron.importance.depth import TOKENS_AT_ONCE, block_influence, residual_sums
from nemo_minitron.importance.reductions import (
    Aggregation,
    batch_statistic,
    batch_sums,
    sequence_statistic,
    sequence_sums,
    units,
)
from nemo_minitron.model.shape import ModelShape


@dataclass(frozen=True)
class Groups:
    """Process groups of the grid; None where there is one process."""

    tensor: parallel.Group = None
    pipeline: parallel.Group = None
    data: parallel.Group = None


Action = Callable[[Tensor], None]


class _Done(Exception):
    """Ends a forward pass once the decoder is through: the head's logits are not needed."""


class Pass:
    """What the hooks saw in one forward pass. Rows are global: layer l, norm 2l (input) and 2l+1 (pre-MLP)."""

    def __init__(self) -> None:
        self.unpadded = False  # every token counts
        self.mask: Tensor | None = None  # [s, b], of the whole sequence
        self.part: Tensor | None = None  # the same for this rank's part of it under sequence parallelism
        self.sums: dict[str, dict[int, Tensor]] = {"ffn": {}, "proj": {}, "norm": {}}
        self.streams: dict[int, Tensor] = {}

    def reducer(self, name: str, row: int) -> Action:
        """Reduces an activation ``[s, b, C]`` over the sequence into ``sums[name][row]``."""

        def reduce(x: Tensor) -> None:
            mask = self.part if name == "norm" else self.mask
            self.sums[name][row] = sequence_sums(x, None if self.unpadded else mask)

        return reduce

    def stream(self, row: int) -> Action:
        """Keeps a residual stream ``[s, b, H]`` until the pass is over."""

        def keep(x: Tensor) -> None:
            self.streams[row] = x.detach()

        return keep


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    shape: ModelShape,
    *,
    groups: Groups | None = None,
    sequence_parallel: bool = False,
    aggregation: Aggregation | None = None,
    forward: Callable[[Tensor], Any] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Run the calibration batches forward and reduce what the hooks see.

    Args:
        model: Megatron-Core ``GPTModel`` (this rank's shard and stage), or a module tree of the same names.
        batches: token ids ``[b, s]`` int64 on the model's device, or pairs with a mask ``[b, s]``, True for positions
            that count. Ranks of one TP x PP group see the same batches, data-parallel ranks their own share.
        shape: of the whole model.
        sequence_parallel: norms and residual stream hold this rank's slice of the sequence.
        forward: runs one batch through the model (under pipelining: through Megatron's schedule as one micro-batch,
            on every stage); ``model(input_ids, position_ids, attention_mask=None)`` by default.

    Returns:
        The arrays of :class:`nemo_minitron.importance.scores.Scores` by name, float64, full-size, the same on every
        rank; and counts: ``samples`` and ``tokens`` of all data-parallel ranks, those that count.

    Raises:
        MinitronError: no tokens, or a model without the modules named above.
    """
    groups, aggregation = groups or Groups(), aggregation or Aggregation()
    forward = forward or (lambda tokens: _forward(model, tokens))
    pipelined = parallel.size(groups.pipeline) > 1
    totals: dict[str, Tensor] = {}
    seen = Pass()
    was_training = model.training
    model.eval()
    try:
        with _hooks(model, shape, seen, stop_after_decoder=not pipelined):
            for batch in batches:
                tokens, mask = batch if isinstance(batch, tuple) else (batch, torch.ones_like(batch, dtype=torch.bool))
                seen.mask = seen.part = mask.t()
                seen.unpadded = not isinstance(batch, tuple)
                if sequence_parallel and groups.tensor is not None:
                    part = torch.distributed.get_rank(groups.tensor)
                    seen.part = seen.mask.chunk(parallel.size(groups.tensor))[part]
                with suppress(_Done):
                    forward(tokens)
                add(totals, reduce(seen, shape, groups, sequence_parallel, aggregation))
                for rows in (*seen.sums.values(), seen.streams):
                    rows.clear()
    finally:
        model.train(was_training)
    return finish(totals, shape, groups, sequence_parallel, aggregation)


def _forward(model: nn.Module, tokens: Tensor) -> Any:
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(input_ids=tokens, position_ids=positions, attention_mask=None)


@contextmanager
def _hooks(model: Any, shape: ModelShape, seen: Pass, stop_after_decoder: bool) -> Iterator[None]:
    """Watch the modules of this stage; every hook is removed again, whatever happens."""
    handles: list[Any] = []
    try:
        try:
            for layer in model.decoder.layers:
                index = layer.layer_number - 1
                attention, mlp = layer.self_attention, layer.mlp
                handles.append(_watch_input(layer, seen.stream(index)))
                handles.append(_watch_norm(layer.input_layernorm, attention.linear_qkv, 2 * index, seen, shape))
                handles.append(_watch_input(attention.linear_proj, seen.reducer("proj", index)))
                handles.append(_watch_norm(layer.pre_mlp_layernorm, mlp.linear_fc1, 2 * index + 1, seen, shape))
                handles.append(_watch_input(mlp.linear_fc2, seen.reducer("ffn", index)))
                if index == shape.num_layers - 1:
                    handles.append(_watch_output(layer, seen.stream(index + 1)))
                    handles.append(_watch_output(model.decoder.final_layernorm, seen.reducer("norm", 2 * index + 2)))
            if stop_after_decoder:
                handles.append(_watch_output(model.decoder, _stop))
        except AttributeError as error:
            raise MinitronError(f"importance: not a Llama-type Megatron-Core GPTModel: {error}") from None
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_input(module: nn.Module, action: Action) -> Any:
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        action(args[0] if args else kwargs["hidden_states"])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _watch_output(module: nn.Module, action: Action) -> Any:
    def hook(_: nn.Module, args: tuple, output: Any) -> None:
        action(output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(hook)


def _watch_norm(norm: Any, linear: Any, row: int, seen: Pass, shape: ModelShape) -> Any:
    """A norm's output; where Transformer Engine fused it into the next linear, computed from that one's input."""
    reduce = seen.reducer("norm", row)
    if getattr(norm, "weight", None) is not None:
        return _watch_output(norm, reduce)
    if getattr(linear, "layer_norm_weight", None) is not None:
        return _watch_input(linear, lambda x: reduce(_rms_norm(x, linear, shape.layernorm_epsilon)))
    raise MinitronError(
        f"importance: found neither a norm nor a fused one for '{type(linear).__name__}' (norm {row}); "
        "a Llama-type Megatron-Core layer has one of them"
    )


def _stop(_: Tensor) -> None:
    raise _Done


def _rms_norm(x: Tensor, linear: Any, default_eps: float) -> Tensor:
    """RMSNorm as Transformer Engine's ``LayerNormLinear`` applies it inside; float32."""
    weight = linear.layer_norm_weight.float()
    if getattr(linear, "zero_centered_gamma", False):
        weight = weight + 1
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + getattr(linear, "eps", default_eps)) * weight


def reduce(
    seen: Pass, shape: ModelShape, groups: Groups, sequence_parallel: bool, aggregation: Aggregation
) -> dict[str, Tensor]:
    """One pass as additive sums, on this rank's channels and this stage's rows (others zero)."""
    if seen.mask is None or seen.part is None:
        raise MinitronError("importance: no batch")
    tokens = seen.mask.sum(dim=0)
    device = tokens.device
    out = {"tokens": tokens.sum().double(), "samples": (tokens > 0).sum().double()}
    sizes = {"ffn": shape.num_layers, "proj": shape.num_layers, "norm": 2 * shape.num_layers + 1}
    for name, by_row in seen.sums.items():
        if not by_row:
            raise MinitronError(f"importance: the forward pass ran through no '{name}' activation")
        present = torch.tensor(sorted(by_row), device=device)
        sums = torch.stack([by_row[row] for row in sorted(by_row)])  # [rows, 3, b, C]
        if name == "norm" and sequence_parallel:
            sums = parallel.all_reduce(sums, groups.tensor)
        per_sample = batch_sums(sequence_statistic(sums, tokens, aggregation.sequence))  # [rows, 2, C]
        squares = sums[:, 2].sum(dim=1, keepdim=True)  # [rows, 1, C]
        full = torch.zeros(sizes[name], 3, sums.shape[-1], dtype=torch.float64, device=device)
        out[name] = full.index_copy(0, present, torch.cat((per_sample, squares), dim=1))
    out["cosine"], out["residual"] = _residual(seen, shape, groups)
    return out


def _residual(seen: Pass, shape: ModelShape, groups: Groups) -> tuple[Tensor, Tensor]:
    """Sums over this rank's tokens for all L+1 streams; stages exchange theirs, a few tokens at a time."""
    first = next(iter(seen.streams.values()))
    streams = {row: x.reshape(-1, x.shape[-1]) for row, x in seen.streams.items()}  # [s*b, H], as the mask flattens
    mask = None if seen.unpadded else seen.part.reshape(-1)  # type: ignore[union-attr]
    tokens, pipelined = first.numel() // first.shape[-1], parallel.size(groups.pipeline) > 1
    count, width = shape.num_layers + 1, first.shape[-1]
    cosine = torch.zeros(count, count, dtype=torch.float64, device=first.device)
    squares = torch.zeros(count, width, dtype=torch.float64, device=first.device)
    at_once = TOKENS_AT_ONCE[first.device.type]
    for start in range(0, tokens, at_once):
        some = slice(start, start + at_once)
        make = torch.zeros if pipelined else torch.empty
        stacked = make(count, min(at_once, tokens - start), width, dtype=torch.float32, device=first.device)
        for row, x in streams.items():
            stacked[row] = x[some]
        stacked = parallel.all_reduce(stacked, groups.pipeline)  # each stream is kept by one stage
        for total, part in zip(
            (cosine, squares), residual_sums(stacked, None if mask is None else mask[some]), strict=True
        ):
            total += part
    return cosine, squares


def finish(
    totals: dict[str, Tensor], shape: ModelShape, groups: Groups, sequence_parallel: bool, aggregation: Aggregation
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Join ranks and turn sums into scores."""
    if not totals:
        raise MinitronError("calibration: there is no batch to calibrate on")
    for name in ("ffn", "proj"):
        totals[name] = parallel.all_gather(totals[name], groups.tensor, dim=-1)
    for name in ("ffn", "proj", "norm"):
        totals[name] = parallel.all_reduce(totals[name], groups.pipeline)
    if sequence_parallel:
        for name in ("cosine", "residual"):
            totals[name] = parallel.all_reduce(totals[name], groups.tensor)
    totals = {name: parallel.all_reduce(total, groups.data) for name, total in totals.items()}
    samples, tokens = int(totals["samples"]), int(totals["tokens"])
    if not tokens:
        raise MinitronError("calibration: there is no token to calibrate on")
    score = {name: batch_statistic(totals[name][:, :2], samples, aggregation.batch) for name in ("ffn", "proj", "norm")}
    rms = {name: (totals[name][:, 2] / tokens).sqrt() for name in ("ffn", "proj", "norm")}
    cosine = (totals["cosine"] / tokens).clamp(-1.0, 1.0)
    arrays = {
        "ffn": score["ffn"],
        "heads": units(score["proj"], shape.kv_channels, aggregation.unit),
        "groups": units(score["proj"], shape.heads_per_group * shape.kv_channels, aggregation.unit),
        "hidden": score["norm"].sum(dim=0),
        "block_influence": block_influence(cosine),
        "residual_cosine": cosine,
        "hidden_norms": score["norm"],
        "ffn_rms": rms["ffn"],
        "proj_rms": rms["proj"],
        "norm_rms": rms["norm"],
        "residual_rms": (totals["residual"] / tokens).sqrt(),
    }
    return {name: array.cpu().numpy() for name, array in arrays.items()}, {"samples": samples, "tokens": tokens}


def add(totals: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    for name, value in part.items():
        totals[name] = totals[name] + value if name in totals else value
