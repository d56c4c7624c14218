"""Names of a shape in the configs of Megatron's checkpoints, a row for each; what they cannot say is refused.

Megatron-Bridge and NeMo 2 use the names of Megatron-Core's ``TransformerConfig`` and ``GPTModel``, Megatron-LM those of
its command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from nemo_minitron.checkpoint.biases import biases_of, in_words
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.family import family_of
from nemo_minitron.model.shape import LinearScaling, ModelShape, RopeScaling


class Field(NamedTuple):
    """One attribute of :class:`ModelShape`.

    Attributes:
        shape: its name there.
        config: its key in the configs of Megatron-Bridge and NeMo 2.
        argument: its argument in Megatron-LM.
        inverted: whether the argument, a flag, says the opposite.
    """

    shape: str
    config: str
    argument: str
    inverted: bool = False


FIELDS = (
    Field("num_layers", "num_layers", "num_layers"),
    Field("hidden_size", "hidden_size", "hidden_size"),
    Field("ffn_hidden_size", "ffn_hidden_size", "ffn_hidden_size"),
    Field("num_attention_heads", "num_attention_heads", "num_attention_heads"),
    Field("num_query_groups", "num_query_groups", "num_query_groups"),
    Field("kv_channels", "kv_channels", "kv_channels"),
    Field("vocab_size", "vocab_size", "vocab_size"),
    Field(
        "share_embeddings_and_output_weights",
        "share_embeddings_and_output_weights",
        "untie_embeddings_and_output_weights",
        inverted=True,
    ),
    Field("rotary_base", "rotary_base", "rotary_base"),
    Field("max_position_embeddings", "seq_length", "max_position_embeddings"),
    Field("layernorm_epsilon", "layernorm_epsilon", "norm_epsilon"),
    Field("qkv_bias", "add_qkv_bias", "add_qkv_bias"),
)
_ELSEWHERE = (
    "padded_vocab_size",
    "proj_bias",
    "mlp_bias",
    "rope_scaling",
    "family",
)  # each has its own way in every config
SWITCHES = ("qk_layernorm",)
"""Keys of a family (:attr:`nemo_minitron.model.family.Family.nemo`) that all of these configs have by this name."""
LLAMA3 = RopeScaling()
"""The scaling of which Megatron-Core's ``rope_scaling`` takes the factor alone: the other three numbers are these."""


def values(shape: ModelShape, where: str) -> Iterator[tuple[Field, Any]]:
    """Rows with the values of a shape; a rotary base that is whole is an integer, as Megatron has it.

    Raises:
        MinitronError: a fact of the shape that has no row, by name.
    """
    named = {field.shape for field in FIELDS}.union(_ELSEWHERE)
    for fact in dataclasses.fields(shape):
        value = getattr(shape, fact.name)
        if fact.name not in named and value != fact.default:
            only = "null" if fact.default is None else fact.default
            raise MinitronError(f"{where}: {fact.name} must be {only} in a Megatron checkpoint, found {value}")
    for field in FIELDS:
        value = getattr(shape, field.shape)
        yield field, int(value) if field.shape == "rotary_base" and float(value).is_integer() else value


def switches(shape: ModelShape, where: str) -> dict[str, Any]:
    """Keys that make Megatron build the layers of the shape's family.

    Raises:
        MinitronError: a family that needs others than these configs have.
    """
    keys = dict(family_of(shape).nemo)
    for key in keys:
        if key not in SWITCHES:
            raise MinitronError(
                f"{where}: family must be one that a Megatron checkpoint can describe, found '{shape.family}', "
                f"which needs {key}"
            )
    return dict.fromkeys(SWITCHES, False) | keys


def bias_everywhere(shape: ModelShape, where: str) -> bool:
    """``add_bias_linear`` of Megatron-Core, a bias on every linear layer; ``add_qkv_bias`` is one on QKV alone.

    Raises:
        MinitronError: a bias on other layers than all, or queries, keys and values.
    """
    biases = biases_of(shape)
    if any(biases[1:]) and not all(biases):
        raise MinitronError(
            f"{where}: expected a model with a bias on no layer, on queries, keys and values, or on all linear layers, "
            f"which is all that a Megatron checkpoint can describe, found one {in_words(biases)}"
        )
    return all(biases)


def llama3_factor(shape: ModelShape, where: str) -> float | None:
    """The one number of Llama 3's RoPE scaling that Megatron-Core's models take; None without such a scaling.

    Raises:
        MinitronError: a scaling whose other numbers are not Megatron-Core's.
    """
    scaling = shape.rope_scaling
    if not isinstance(scaling, RopeScaling):
        return None
    for fact in dataclasses.fields(scaling):
        found, fixed = getattr(scaling, fact.name), getattr(LLAMA3, fact.name)
        if fact.name != "factor" and found != fixed:
            raise MinitronError(
                f"{where}: {fact.name} of the RoPE scaling must be {fixed:g}, which Megatron-Core has built in, "
                f"found {found:g}; format=nemo2 can say it"
            )
    return scaling.factor


def interpolation(shape: ModelShape) -> float | None:
    """``seq_len_interpolation_factor`` of Megatron-Core, which divides positions; None without linear scaling."""
    return shape.rope_scaling.factor if isinstance(shape.rope_scaling, LinearScaling) else None
