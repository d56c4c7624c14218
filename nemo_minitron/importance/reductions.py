"""Pure, additive reductions of activations to one number per channel.

Each activation is reduced over the sequence, per sample, then over the batch (arXiv 2407.14679, section 2.2: agg_S,
then agg_B). Everything that is kept between micro-batches is a plain float64 sum: micro-batches may come in any order
and any split, and ranks are combined by adding. Padding tokens and samples without any token do not count.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.errors import check_choice
from nemo_minitron.model import layout
from nemo_minitron.model.layout import Parameter
from nemo_minitron.model.shape import ModelShape

HOW = ("mean", "l2", "var")
UNITS = ("l2", "mean")
TOKENS_AT_ONCE = 512
"""Bounds the float64 copy of an activation."""


@dataclass(frozen=True)
class Aggregation:
    """How activations x become a score.

    Attributes:
        sequence: y of one sample: ``mean`` of \\|x\\|, ``l2`` norm of x, or population ``var`` of x, over its tokens.
        batch: score of a channel: ``mean`` of y, ``l2`` norm of y, or population ``var`` of y, over the samples.
        unit: score of a head or query group: ``l2`` norm or ``mean`` of its channels' scores.

    The defaults are what the paper settles on (mean, then l2) and what NVIDIA Model-Optimizer computes; some read the
    paper with the mean over a group's channels, which ranks groups otherwise.
    """

    sequence: str = "mean"
    batch: str = "l2"
    unit: str = "l2"

    def __post_init__(self) -> None:
        for name, known in (("sequence", HOW), ("batch", HOW), ("unit", UNITS)):
            check_choice(f"calibration.{name}", getattr(self, name), known)


def sequence_sums(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sums over tokens of \\|x\\|, x and x² per sample.

    Args:
        x: ``[s, b, C]``, any float dtype. mask: ``[s, b]``, True for tokens that count (None: all).

    Returns:
        ``[3, b, C]`` float64; parts of a split sequence may be added. On a GPU the sums of some tokens are float32.
    """
    if x.is_cuda and mask is None and x.stride(-1) == 1 and importlib.util.find_spec("triton") is not None:
        from nemo_minitron.importance import kernels

        return kernels.sequence_sums(x.detach())
    sums = torch.zeros(3, *x.shape[1:], dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[0], TOKENS_AT_ONCE):
        some = slice(start, start + TOKENS_AT_ONCE)
        part = x.detach()[some].double()  # converted first: a mixed-precision sum is ten times slower on CPU
        if mask is not None:
            part = part.masked_fill(~mask[some][..., None], 0.0)
        for total, value in zip(sums, (part.abs(), part, part.square()), strict=True):
            total += value.sum(dim=0)
    return sums


def sequence_statistic(sums: Tensor, tokens: Tensor, how: str) -> Tensor:
    """y per sample and channel, from :func:`sequence_sums` ``[..., 3, b, C]`` and ``tokens [b]`` → ``[..., b, C]``."""
    absolute, plain, square = sums.unbind(-3)
    count = tokens.to(sums).clamp_min(1)[:, None]
    if how == "mean":
        return absolute / count
    if how == "l2":
        return square.sqrt()
    return (square / count - (plain / count).square()).clamp_min(0.0)


def batch_sums(y: Tensor) -> Tensor:
    """Sums over samples of y and y²: ``[..., b, C]`` → ``[..., 2, C]``, additive over micro-batches and ranks."""
    return torch.stack((y.sum(dim=-2), y.square().sum(dim=-2)), dim=-2)


def batch_statistic(sums: Tensor, samples: int, how: str) -> Tensor:
    """Score per channel from added :func:`batch_sums` ``[..., 2, C]`` over ``samples`` → ``[..., C]``."""
    plain, square = sums.unbind(-2)
    if how == "mean":
        return plain / samples
    if how == "l2":
        return square.sqrt()
    return (square / samples - (plain / samples).square()).clamp_min(0.0)


def units(channels: Tensor, width: int, how: str = "l2") -> Tensor:
    """L2 norm (or ``mean``) over each run of ``width`` channels: ``[..., U*width]`` → ``[..., U]``.

    A head's score is this over its d channels of ``linear_proj``'s input, a query group's over its r·d, both
    group-major, as in Model-Optimizer (whose group ranking reads the axis in the other order, see the tests).
    """
    runs = channels.unflatten(-1, (-1, width))
    return runs.mean(dim=-1) if how == "mean" else runs.square().sum(dim=-1).sqrt()


def unit_sums(shape: ModelShape, parameter: Parameter, values: Tensor) -> dict[str, Tensor]:
    """Sums of a weight's ``values`` over each unit that it belongs to.

    A neuron has its rows of gate and up and its column of ``linear_fc2``; a head its query rows and its columns of
    ``linear_proj``; a query group those of its heads, and its key and value rows; a hidden channel a row or column of
    all that reads or writes the residual stream, norms and tables among them. Biases count as their rows.

    Args:
        values: one per weight, ``parameter.size(shape)``; of a table, any of its rows.

    Returns:
        ``ffn [F]``, ``heads [A]``, ``groups [G]``, ``hidden [H]``: those that the parameter has, in its own dtype.
    """
    sums: dict[str, Tensor] = {}
    for dimension, axis in enumerate(parameter.axes):
        flat = values.movedim(dimension, 0).flatten(1).sum(dim=1) if values.dim() > 1 else values
        if axis == layout.HIDDEN:
            sums["hidden"] = flat
        elif axis in (layout.FFN, layout.GATE_UP):
            sums["ffn"] = flat.view(-1, shape.ffn_hidden_size).sum(dim=0)
        elif axis == layout.PROJ:
            sums["heads"] = flat.view(-1, shape.kv_channels).sum(dim=1)
            sums["groups"] = sums["heads"].view(-1, shape.heads_per_group).sum(dim=1)
        elif axis == layout.QKV:
            cells = flat.view(shape.num_query_groups, shape.heads_per_group + 2, shape.kv_channels).sum(dim=2)
            sums["heads"] = cells[:, : shape.heads_per_group].flatten()
            sums["groups"] = cells.sum(dim=1)
    return sums
