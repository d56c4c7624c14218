"""One declarative table of every parameter: names, fusion, pruning axes, tensor-parallel split.

Convert, rewrite, count and check all read this table; nothing else in the package spells a parameter name. A family
(:mod:`nemo_minitron.model.family`) adds rows of its own to it.

The fused QKV of grouped-query attention is group-major. For A=6 heads, G=2 groups (r=3), each cell d rows::

    row block   0    1    2    3    4    5    6    7    8    9
               q0   q1   q2   k0   v0 | q3   q4   q5   k1   v1
               `---- group 0 -------'  `---- group 1 -------'

so viewed as ``(G, r+2, d, H)`` slots 0..r-1 are queries, slot r the key, slot r+1 the value, and no RoPE permutation
separates HF from Megatron. ``linear_fc1`` is ``[gate; up]`` over dimension 0; a tensor-parallel rank holds
``[gate_t; up_t]``, the file holds ``[all gate; all up]``.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.model.family import Family, family_of
from nemo_minitron.model.parameter import FFN, GATE_UP, HIDDEN, PROJ, QKV, VOCAB, Parameter
from nemo_minitron.model.shape import ModelShape

LAYERS = "decoder.layers."
"""Beginning of the keys of what each layer has."""
_A, _M = f"{LAYERS}self_attention.", f"{LAYERS}mlp."
_HA, _HM = "model.layers.{l}.self_attn.", "model.layers.{l}.mlp."

EMBEDDING = Parameter(
    "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (VOCAB, HIDDEN), tp_dim=0, per_layer=False
)
FINAL_NORM = Parameter("decoder.final_layernorm.weight", ("model.norm.weight",), (HIDDEN,), per_layer=False)
OUTPUT = Parameter("output_layer.weight", ("lm_head.weight",), (VOCAB, HIDDEN), tp_dim=0, per_layer=False)
QKV_NORM = Parameter(
    _A + "linear_qkv.layer_norm_weight",
    ("model.layers.{l}.input_layernorm.weight",),
    (HIDDEN,),
    local="decoder.layers.input_layernorm.weight",
)
QKV_WEIGHT = Parameter(
    _A + "linear_qkv.weight",
    (_HA + "q_proj.weight", _HA + "k_proj.weight", _HA + "v_proj.weight"),
    (QKV, HIDDEN),
    fuse="qkv",
    tp_dim=0,
)
QKV_BIAS = Parameter(
    _A + "linear_qkv.bias",
    (_HA + "q_proj.bias", _HA + "k_proj.bias", _HA + "v_proj.bias"),
    (QKV,),
    fuse="qkv",
    tp_dim=0,
)
PROJ_WEIGHT = Parameter(_A + "linear_proj.weight", (_HA + "o_proj.weight",), (HIDDEN, PROJ), tp_dim=1)
PROJ_BIAS = Parameter(_A + "linear_proj.bias", (_HA + "o_proj.bias",), (HIDDEN,))
FC1_NORM = Parameter(
    _M + "linear_fc1.layer_norm_weight",
    ("model.layers.{l}.post_attention_layernorm.weight",),
    (HIDDEN,),
    local="decoder.layers.pre_mlp_layernorm.weight",
)
FC1_WEIGHT = Parameter(
    _M + "linear_fc1.weight",
    (_HM + "gate_proj.weight", _HM + "up_proj.weight"),
    (GATE_UP, HIDDEN),
    fuse="cat",
    tp_dim=0,
)
FC1_BIAS = Parameter(
    _M + "linear_fc1.bias", (_HM + "gate_proj.bias", _HM + "up_proj.bias"), (GATE_UP,), fuse="cat", tp_dim=0
)
FC2_WEIGHT = Parameter(_M + "linear_fc2.weight", (_HM + "down_proj.weight",), (HIDDEN, FFN), tp_dim=1)
FC2_BIAS = Parameter(_M + "linear_fc2.bias", (_HM + "down_proj.bias",), (HIDDEN,))

EXTRA_STATE_MODULES = (_A + "linear_qkv", _A + "linear_proj", _M + "linear_fc1", _M + "linear_fc2")
"""Per-layer modules whose empty ``_extra_state`` objects Megatron-Core saves and asks for again on load."""


def engine_states(shape: ModelShape) -> Iterator[str]:
    """Modules that have an ``_extra_state`` beside :data:`EXTRA_STATE_MODULES` where Transformer Engine computes them:
    the attention proper, norms that are not fused into a linear layer, the final norm."""
    yield f"{_A}core_attention"
    for parameter in family_of(shape).parameters:
        if parameter.key.endswith("layernorm.weight"):
            yield parameter.key.removesuffix(".weight")
    yield FINAL_NORM.key.removesuffix(".weight")


def parameters(shape: ModelShape) -> Iterator[Parameter]:
    """Rows that a model of this shape has, in forward order: tied models have no output layer, most no biases."""
    yield EMBEDDING
    yield from layer_parameters(shape)
    yield FINAL_NORM
    if not shape.share_embeddings_and_output_weights:
        yield OUTPUT


def layer_parameters(shape: ModelShape) -> Iterator[Parameter]:
    """Rows of one decoder layer of this shape, in forward order."""
    return layer_rows(family_of(shape), shape.qkv_bias, shape.proj_bias, shape.mlp_bias)


def layer_rows(family: Family, qkv_bias: bool, proj_bias: bool = False, mlp_bias: bool = False) -> Iterator[Parameter]:
    """Rows of one decoder layer of a family, in forward order; its own come after QKV."""
    yield from (QKV_NORM, QKV_WEIGHT)
    if qkv_bias:
        yield QKV_BIAS
    yield from family.parameters
    yield PROJ_WEIGHT
    if proj_bias:
        yield PROJ_BIAS
    yield from (FC1_NORM, FC1_WEIGHT)
    if mlp_bias:
        yield FC1_BIAS
    yield FC2_WEIGHT
    if mlp_bias:
        yield FC2_BIAS


def is_norm(parameter: Parameter) -> bool:
    """Whether a row holds the weights of a norm over hidden channels, which scale; a bias ``[H]`` is added."""
    return parameter.axes == (HIDDEN,) and not parameter.key.endswith("bias")


def slots(shape: ModelShape) -> Iterator[tuple[Parameter, int | None]]:
    """Every tensor of a model as (row, layer); the layer is None outside the decoder layers."""
    for parameter in parameters(shape):
        for layer in range(shape.num_layers) if parameter.per_layer else (None,):
            yield parameter, layer
