"""The HF architecture that a model is exported as: its own, or one of the same layers that more readers load.

A pruned model's head_dim is no longer its hidden size divided by its heads, and readers differ in what they make of
that. Read in their sources (heads = ``num_attention_heads``):

===========  ==================================  ==========================  ============================
architecture transformers 4.51, 4.57             transformers 5.24           vLLM
===========  ==================================  ==========================  ============================
Llama        head_dim of the config              refuses hidden % heads > 0  head_dim of the config
Mistral      head_dim of the config              head_dim of the config      as Llama
Qwen2        head_dim of the config              head_dim of the config      always hidden // heads
Qwen3        head_dim of the config              head_dim of the config      head_dim of the config
===========  ==================================  ==========================  ============================

llama.cpp's converter writes head_dim as it stands for Llama and Mistral, which are one architecture there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_minitron.checkpoint.biases import biases_of
from nemo_minitron.model.family import PLAIN, Family
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.registry import FAMILIES

_NEWER = "5.0.0"
"""Below it, transformers says of any tokenizer beside a Mistral's config that it must be loaded with
``fix_mistral_regex=True``, which would give this one another's rules."""
_WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_LLAMA_KEYS = ("attention_bias", "mlp_bias", "pretraining_tp", "layer_types")


@dataclass(frozen=True)
class Dress:
    """What becomes of a ``config.json`` where a model is exported as another architecture.

    Attributes:
        family: whose architecture it is; None where the config keeps its own.
        set: keys to set. drop: keys of the former architecture that mean another thing in this one, or nothing.
        note: one line for people; empty where nothing is worth a word.
    """

    family: Family | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    note: str = ""

    def put_on(self, config: dict[str, Any]) -> None:
        """Rewrite a config that says all of its sizes."""
        if self.family is None:
            return
        for key in self.drop:
            config.pop(key, None)
        config |= {"architectures": [self.family.architecture], "model_type": self.family.model_type, **self.set}


def dress_of(shape: ModelShape, family: Family, may_change: bool) -> Dress:
    """The dress of a model of ``shape`` whose own architecture is that of ``family``.

    Args:
        may_change: whether the config may name another architecture; not where it is the source's own.
    """
    uneven = shape.hidden_size % shape.num_attention_heads > 0
    explicit = shape.kv_channels * shape.num_attention_heads != shape.hidden_size
    sizes = f"hidden_size {shape.hidden_size}, {shape.num_attention_heads} heads of {shape.kv_channels}"
    if shape.family != PLAIN:
        return Dress()
    if family.architecture == "LlamaForCausalLM" and uneven:
        refused = f"transformers 5 refuses a LlamaForCausalLM of {sizes}"
        if may_change and biases_of(shape) == (True, False, False):
            qwen2 = FAMILIES.get("qwen2")
            note = f"exported as {qwen2.architecture}, which computes the same: {refused}; vLLM loads neither"
            return Dress(qwen2, {"use_sliding_window": False}, _LLAMA_KEYS, note)
        if not may_change or any(biases_of(shape)):
            return Dress(note=f"{refused}; transformers 4 loads this one")
        mistral = FAMILIES.get("mistral")
        note = f"exported as {mistral.architecture} without a window, which computes the same: {refused}"
        if shape.rope_scaling is not None:
            note += "; Megatron-Bridge loses the RoPE scaling of a Mistral"
        return Dress(mistral, {"sliding_window": None, "transformers_version": _NEWER}, _LLAMA_KEYS, note)
    if family.architecture == "Qwen2ForCausalLM" and explicit:
        ignored = f"vLLM takes hidden_size // heads for the head_dim of a Qwen2ForCausalLM, here {sizes}"
        if not may_change or uneven:
            return Dress(note=f"{ignored}; it will not load this one, transformers does")
        llama = FAMILIES.get(PLAIN)
        note = f"exported as {llama.architecture} with attention_bias, every o_proj.bias zero: {ignored}"
        return Dress(llama, {"attention_bias": True, "mlp_bias": False}, _WINDOW_KEYS, note)
    return Dress()
