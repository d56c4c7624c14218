"""Which linear layers of a model have a bias, as HF's and NeMo's configs say it.

HF's ``attention_bias`` gives queries, keys, values and the attention's output a bias, ``mlp_bias`` gate, up and down.
NeMo's ``bias`` gives every linear layer one, ``qkv_bias`` queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_minitron.errors import MinitronError
from nemo_minitron.model.family import Biases
from nemo_minitron.model.shape import ModelShape

_PARTIAL: tuple[Biases, ...] = ((True, True, False), (False, False, True), (True, False, True))
"""What NeMo's two keys cannot say."""


def biases_of(shape: ModelShape) -> Biases:
    """Whether QKV, the attention's output, and gate, up and down have a bias."""
    return shape.qkv_bias, shape.proj_bias, shape.mlp_bias


def has_zero_biases(config: ModelShape, shape: ModelShape) -> bool:
    """Whether a HF folder of the first shape holds a model of the second with zeros for the attention's output bias.

    Qwen2 has a bias on queries, keys and values alone; as a ``LlamaForCausalLM`` it can only have that one beside them.
    """
    return config.proj_bias and biases_of(config.replace(proj_bias=False)) == biases_of(shape)


def in_words(biases: Biases) -> str:
    """``with a bias on …``, in messages."""
    names = zip(("queries, keys and values", "the attention's output", "the MLP"), biases, strict=True)
    there = " and ".join(name for name, bias in names if bias)
    return f"with a bias on {there}" if there else "without a bias"


def flag(config: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    """A switch of a config; null is off.

    Raises:
        MinitronError: another value.
    """
    value = config.get(key, default)
    if value not in (True, False, None):
        raise MinitronError(f"{where}: {key} must be true or false, found {value!r:.80}")
    return bool(value)


def biases_from_nemo(config: Mapping[str, Any], section: Mapping[str, Any], where: str) -> Biases:
    """The biases of a NeMo model.

    Where it has others than NeMo's keys can say, as a Llama with ``attention_bias`` alone, a file of ours has
    ``bias: true``, so that NeMo misses the rest and stops, and names those that there are in a section of ours.

    Args:
        section: ours, which may have ``biases``, the names of :func:`linear_names`.

    Raises:
        MinitronError: the keys contradict each other, or name another layer.
    """
    every, qkv = flag(config, "bias", where, True), flag(config, "qkv_bias", where, False)
    named = section.get("biases")
    if named is None:
        return every or qkv, every, every
    for biases in _PARTIAL:
        if named == linear_names(biases) and every and qkv == biases[0]:
            return biases
    known = ", ".join(str(linear_names(biases)) for biases in _PARTIAL)
    raise MinitronError(
        f"{where}: minitron.biases must be one of {known}, with bias true and qkv_bias as it says, found {named!r:.80}"
    )


def biases_for_nemo(shape: ModelShape) -> tuple[dict[str, bool], dict[str, list[str]]]:
    """Inverse of :func:`biases_from_nemo`: NeMo's keys, and those of our section."""
    biases = biases_of(shape)
    keys = {"qkv_bias": shape.qkv_bias, "bias": shape.proj_bias or shape.mlp_bias}
    return keys, {"biases": linear_names(biases)} if biases in _PARTIAL else {}


def linear_names(biases: Biases) -> list[str]:
    """Megatron's names of the linear layers that have a bias."""
    there = dict(zip(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), (*biases, biases[2]), strict=True))
    return [name for name, bias in there.items() if bias]
