"""The forward pass of one decoder layer on canonical tensors, in plain torch: no ranks, no modules, no Megatron.

What streams a model layer by layer (calibration, compensation) runs on these functions, so that one layer's weights
are in memory at a time. Activations are ``[b, s, …]``; the arithmetic is that of transformers' ``LlamaDecoderLayer``
and of Megatron-Core's local layer, which the tests compare. Everything is whole: under any grid each process sees
unsharded weights, and parallelism is over samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_minitron.model import layout
from nemo_minitron.model.family import family_of
from nemo_minitron.model.parameter import Parameter
from nemo_minitron.model.shape import LinearScaling, ModelShape, Scaling


@dataclass(frozen=True)
class Rotary:
    """Cosine and sine of every position, float32 ``[s, d]``, the d/2 frequencies repeated as HF and Megatron do."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, shape: ModelShape, seq_length: int, device: torch.device | str = "cpu") -> Rotary:
        """Tables for ``seq_length`` positions, with the scaling of ``shape`` where it has one."""
        d = shape.kv_channels
        frequencies = 1.0 / shape.rotary_base ** (torch.arange(0, d, 2, device=device).float() / d)
        if shape.rope_scaling is not None:
            frequencies = _scaled(frequencies, shape.rope_scaling)
        angles = torch.outer(torch.arange(seq_length, device=device).float(), frequencies).repeat(1, 2)
        return cls(angles.cos(), angles.sin())

    def turn(self, x: Tensor) -> Tensor:
        """Rotate ``[b, heads, s, d]``; computed in float32, returned in the dtype of ``x``."""
        low, high = x.float().chunk(2, dim=-1)
        return (x.float() * self.cos + torch.cat((-high, low), dim=-1) * self.sin).to(x.dtype)


def _scaled(frequencies: Tensor, scaling: Scaling) -> Tensor:
    """Frequencies as :mod:`nemo_minitron.model.shape` defines them for either kind of scaling."""
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # c/w
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    alpha = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - alpha) * frequencies / scaling.factor + alpha * frequencies


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension; float32 inside, the dtype of ``x`` outside."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + epsilon)
    return (y if weight is None else y * weight).to(x.dtype)


Heads = tuple[Tensor, Tensor, Tensor]
"""Queries ``[b, A, s, d]``, keys and values ``[b, G, s, d]``, before RoPE."""


def attend(heads: Heads, rotary: Rotary) -> Tensor:
    """Causal attention, scaled by ``1/sqrt(d)``: the input of ``linear_proj [b, s, A*d]``."""
    query, key, value = heads
    b, count, s, _ = query.shape
    key, value = (x.repeat_interleave(count // key.shape[1], dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(rotary.turn(query), rotary.turn(key), value, is_causal=True)
    return out.transpose(1, 2).reshape(b, s, -1)


def attend_next(heads: Heads, keys: Tensor, values: Tensor, at: int, rotary: Rotary) -> Tensor:
    """:func:`attend` for the one position ``at``: ``[b, 1, A*d]`` from heads with s = 1.

    ``keys`` and ``values`` ``[b, G, s, d]`` hold those of the positions before it, and get its own.
    """
    query, key, value = heads
    here = Rotary(rotary.cos[at : at + 1], rotary.sin[at : at + 1])
    keys[:, :, at], values[:, :, at] = here.turn(key)[:, :, 0], value[:, :, 0]
    query = here.turn(query).view(len(query), keys.shape[1], -1, keys.shape[3])  # heads as positions
    # two products: torch's fused attention takes twice as long on a CPU for so few queries
    weights = torch.softmax(query @ keys[:, :, : at + 1].mT / math.sqrt(query.shape[-1]), dim=-1)
    return (weights @ values[:, :, : at + 1]).reshape(len(query), 1, -1)


def split_heads(qkv: Tensor, shape: ModelShape) -> Heads:
    """Heads of the fused, group-major QKV ``[b, s, (A+2G)d]`` that :mod:`nemo_minitron.model.layout` draws."""
    b, s, _ = qkv.shape
    groups, r, d = shape.num_query_groups, shape.heads_per_group, shape.kv_channels
    cells = qkv.view(b, s, groups, r + 2, d)
    query = cells[:, :, :, :r].reshape(b, s, groups * r, d).transpose(1, 2)
    return query, cells[:, :, :, r].transpose(1, 2), cells[:, :, :, r + 1].transpose(1, 2)


def gate(fc1: Tensor) -> Tensor:
    """SwiGLU from ``[gate; up]`` ``[…, 2F]`` to the input of ``linear_fc2 […, F]``."""
    left, right = fc1.chunk(2, dim=-1)
    return F.silu(left) * right


@dataclass(frozen=True)
class Layer:
    """Canonical tensors of one layer by their rows of the layout table; any float dtype, computed in that of ``x``."""

    shape: ModelShape
    tensors: Mapping[str, Tensor]

    def __getitem__(self, parameter: Parameter) -> Tensor:
        return self.tensors[parameter.key]

    def attention_input(self, x: Tensor) -> Tensor:
        """Output of the input norm, ``[b, s, H]``."""
        return rms_norm(x, self[layout.QKV_NORM], self.shape.layernorm_epsilon)

    def attention(self, h: Tensor, rotary: Rotary) -> Tensor:
        """Input of ``linear_proj`` ``[b, s, A*d]`` from :meth:`attention_input`."""
        return attend(self._heads(h), rotary)

    def _heads(self, h: Tensor) -> Heads:
        qkv = F.linear(h, self[layout.QKV_WEIGHT], self._bias(layout.QKV_BIAS, self.shape.qkv_bias))
        query, key, value = split_heads(qkv, self.shape)
        change = family_of(self.shape).queries_and_keys
        if change is not None:
            query, key = change(self, query, key)
        return query, key, value

    def ffn_input(self, x: Tensor) -> Tensor:
        """Output of the pre-MLP norm, ``[b, s, H]``."""
        return rms_norm(x, self[layout.FC1_NORM], self.shape.layernorm_epsilon)

    def ffn(self, h: Tensor) -> Tensor:
        """Input of ``linear_fc2`` ``[b, s, F]`` from :meth:`ffn_input`."""
        return gate(F.linear(h, self[layout.FC1_WEIGHT], self._bias(layout.FC1_BIAS, self.shape.mlp_bias)))

    def attention_output(self, inner: Tensor) -> Tensor:
        """What ``linear_proj`` adds to the stream, ``[b, s, H]``, from :meth:`attention`."""
        return F.linear(inner, self[layout.PROJ_WEIGHT], self._bias(layout.PROJ_BIAS, self.shape.proj_bias))

    def ffn_output(self, neurons: Tensor) -> Tensor:
        """What ``linear_fc2`` adds to the stream, ``[b, s, H]``, from :meth:`ffn`."""
        return F.linear(neurons, self[layout.FC2_WEIGHT], self._bias(layout.FC2_BIAS, self.shape.mlp_bias))

    def _bias(self, parameter: Parameter, there: bool) -> Tensor | None:
        return self[parameter] if there else None

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """The residual stream ``[b, s, H]`` after this layer."""
        return self.after_attention(x, self.attention(self.attention_input(x), rotary))

    def forward_next(self, x: Tensor, keys: Tensor, values: Tensor, at: int, rotary: Rotary) -> Tensor:
        """:meth:`forward` for the one position ``at``, ``x [b, 1, H]``; keys and values as for :func:`attend_next`."""
        inner = attend_next(self._heads(self.attention_input(x)), keys, values, at, rotary)
        return self.after_attention(x, inner)

    def after_attention(self, x: Tensor, inner: Tensor) -> Tensor:
        """The stream ``[b, s, H]`` after the rest of the layer, from its own before and :meth:`attention`'s output."""
        x = x + self.attention_output(inner)
        return x + self.ffn_output(self.ffn(self.ffn_input(x)))


class LayerReader(Protocol):
    """What streaming asks of a checkpoint (``nemo_minitron.checkpoint.NemoReader``, ``HfReader``)."""

    @property
    def shape(self) -> ModelShape: ...
    def tensor(self, parameter: Parameter, layer: int | None = None) -> Tensor: ...


def read_layer(
    reader: LayerReader, layer: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Layer:
    """One layer's canonical tensors in ``dtype``."""
    parameters = layout.layer_parameters(reader.shape)
    # moved first: a GPU widens faster than a CPU, and half as many bytes go there
    tensors = {parameter.key: reader.tensor(parameter, layer).to(device).to(dtype) for parameter in parameters}
    return Layer(reader.shape, tensors)


def read_head(
    reader: LayerReader, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Final norm ``[H]``, float32, and output layer ``[V, H]`` (the embedding where tied) without padded rows."""
    shape = reader.shape
    parameter = layout.EMBEDDING if shape.share_embeddings_and_output_weights else layout.OUTPUT
    norm = reader.tensor(layout.FINAL_NORM).to(device).float()
    return norm, reader.tensor(parameter)[: shape.vocab_size].to(device).to(dtype)
