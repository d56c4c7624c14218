"""One row of the table of parameters, and the axes along which tensors are cut and split."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import ModelShape

VOCAB, HIDDEN, QKV, PROJ, GATE_UP, FFN, HEAD = "vocab", "hidden", "qkv", "proj", "gate_up", "ffn", "head"
"""Axes: padded vocabulary Vp; hidden H; fused QKV rows (A+2G)d; projection columns A*d; gate and up 2F; neurons F; the
channels d of one head, which are never cut."""


@dataclass(frozen=True)
class Parameter:
    """One row of the table.

    Attributes:
        key: canonical name without layer index, as on disk in a ``.nemo`` after the ``model.`` prefix.
        hf: HF names that make it up, in fusing order; ``{l}`` stands for the layer.
        fuse: ``"copy"`` (one HF tensor), ``"qkv"`` (group-major interleave) or ``"cat"`` (concatenate on dim 0).
        axes: the axis of each dimension of the canonical (unsharded, one-layer) tensor.
        tp_dim: dimension split over the tensor-parallel group, or None where every rank holds all of it.
        per_layer: stacked as ``[L, ...]`` on disk under one key.
        local: in-memory name of the local (non-Transformer-Engine) layer spec, where it differs from ``key``.
    """

    key: str
    hf: tuple[str, ...]
    axes: tuple[str, ...]
    fuse: str = "copy"
    tp_dim: int | None = None
    per_layer: bool = True
    local: str | None = None

    def size(self, shape: ModelShape) -> tuple[int, ...]:
        """Size of the canonical tensor of one layer for ``shape``."""
        return tuple(axis_size(axis, shape) for axis in self.axes)

    def memory_name(self, layer: int | None = None, local: bool = True) -> str:
        """Megatron-Core's name in memory (``decoder.layers.3.…``); ``local`` picks the local spec's norm names."""
        name = self.local if local and self.local else self.key
        if not self.per_layer:
            return name
        return name.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)


def axis_size(axis: str, shape: ModelShape) -> int:
    """Length of an axis for ``shape``."""
    try:
        return {
            VOCAB: shape.padded_vocab_size,
            HIDDEN: shape.hidden_size,
            QKV: shape.qkv_rows,
            PROJ: shape.proj_columns,
            GATE_UP: 2 * shape.ffn_hidden_size,
            FFN: shape.ffn_hidden_size,
            HEAD: shape.kv_channels,
        }[axis]
    except KeyError:
        raise MinitronError(f"unknown axis '{axis}'") from None
