"""Apply a plan to canonical tensors: keep the planned indices along every axis that the layout table names.

Tensors are unsharded, of one layer, any float dtype; values are copied, never computed, so an identity plan is
bit-identical and the result does not depend on any grid. Plain Minitron rescales no norm (arXiv 2407.14679): a model
with fewer hidden channels sees another mean square in each RMSNorm.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from nemo_minitron.errors import MinitronError
from nemo_minitron.model import layout
from nemo_minitron.model.parameter import HEAD, VOCAB, Parameter
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.plan import Plan


class TensorReader(Protocol):
    """What pruning asks of a checkpoint that it reads (``nemo_minitron.checkpoint.NemoReader``)."""

    @property
    def shape(self) -> ModelShape: ...
    def tensor(self, parameter: Parameter, layer: int | None = None) -> Tensor: ...
    def fingerprint(self) -> str: ...


class TensorWriter(Protocol):
    """What pruning asks of a checkpoint that it writes (``nemo_minitron.checkpoint.NemoWriter``)."""

    def write(self, parameter: Parameter, tensor: Tensor, layer: int | None = None) -> None: ...


def kept(plan: Plan, axis: str, layer: int | None = None) -> Tensor | None:
    """Kept indices of an axis, int64, ascending; None where the whole axis stays.

    Args:
        axis: one of :mod:`nemo_minitron.model.layout`'s. QKV rows keep, for each kept group in order, its kept query
            heads, its key and its value; GATE_UP rows keep the gates of the kept neurons, then their ups.
        layer: layer of the source, for the axes that differ between layers.
    """
    source = plan.source
    if axis in (VOCAB, HEAD):
        return None
    if axis == layout.HIDDEN:
        return torch.tensor(plan.hidden)
    if layer is None:
        raise MinitronError(f"axis '{axis}' differs between layers: name the layer")
    position = plan.position(layer)
    if axis == layout.FFN:
        return torch.tensor(plan.ffn[position])
    if axis == layout.GATE_UP:
        neurons = torch.tensor(plan.ffn[position])
        return torch.cat((neurons, neurons + source.ffn_hidden_size))
    if axis == layout.PROJ:
        return _cells(torch.tensor(plan.heads[position]), source.kv_channels)
    if axis == layout.QKV:
        r = source.heads_per_group
        heads = torch.tensor(plan.heads[position]).view(len(plan.groups[position]), -1)  # (G', r')
        first = torch.tensor(plan.groups[position])[:, None] * (r + 2)  # first cell of each kept group
        cells = torch.cat((first + heads % r, first + r, first + r + 1), dim=1)  # (G', r'+2): queries, key, value
        return _cells(cells.flatten(), source.kv_channels)
    raise MinitronError(f"unknown axis '{axis}'")


def rewrite(plan: Plan, parameter: Parameter, layer: int | None, tensor: Tensor) -> Tensor:
    """The kept part of one canonical tensor.

    Args:
        layer: layer of the source that it belongs to (None outside the decoder layers).
        tensor: ``parameter.size(plan.source)``; returned as ``parameter.size(plan.target)``, same dtype and device.

    Raises:
        MinitronError: where the tensor has another size, or the plan drops the layer.
    """
    if tuple(tensor.shape) != parameter.size(plan.source):
        raise MinitronError(
            f"{_named(parameter, layer)}: expected size {list(parameter.size(plan.source))}, found {list(tensor.shape)}"
        )
    for dim, axis in enumerate(parameter.axes):
        indices = kept(plan, axis, layer)
        if indices is not None and len(indices) < tensor.shape[dim]:
            tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor


def check_source(plan: Plan, reader: TensorReader) -> None:
    """Refuse a plan made for another checkpoint.

    Raises:
        MinitronError: naming the two shapes or fingerprints.
    """
    if plan.source != reader.shape:
        raise MinitronError(f"prune.plan: made for {plan.source}, but the checkpoint is {reader.shape}")
    fingerprint = reader.fingerprint()
    if plan.source_fingerprint != fingerprint:
        raise MinitronError(
            f"prune.plan: made for weights {plan.source_fingerprint[:16]}, but this checkpoint's are {fingerprint[:16]}"
        )


def prune_checkpoint(reader: TensorReader, plan: Plan, writer: TensorWriter) -> None:
    """Stream the checkpoint through the plan, one tensor of one layer in memory at a time.

    Args:
        reader: the source, of ``plan.source``. writer: opened for ``plan.target``; the caller closes both.

    Raises:
        MinitronError: a plan for another checkpoint (before anything is written); a NaN or infinity, with its tensor.
    """
    check_source(plan, reader)
    for parameter in layout.parameters(plan.source):
        for layer in plan.layers if parameter.per_layer else (None,):
            tensor = reader.tensor(parameter, layer)
            refuse_non_finite(parameter, layer, tensor)
            position = None if layer is None else plan.position(layer)
            writer.write(parameter, rewrite(plan, parameter, layer, tensor), position)


def refuse_non_finite(parameter: Parameter, layer: int | None, tensor: Tensor) -> None:
    """Raise :class:`MinitronError` with the tensor's name if it holds a NaN or an infinity."""
    if tensor.numel() and not all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor)):  # needs no mask
        raise MinitronError(f"{_named(parameter, layer)}: holds NaN or infinite values")


def _cells(cells: Tensor, width: int) -> Tensor:
    """Rows of consecutive cells of ``width``: cell c is rows ``c*width .. (c+1)*width - 1``."""
    return (cells[:, None] * width + torch.arange(width)).flatten()


def _named(parameter: Parameter, layer: int | None) -> str:
    return parameter.key if layer is None else parameter.memory_name(layer, local=False)
