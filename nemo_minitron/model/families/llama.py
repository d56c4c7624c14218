"""Llama 1 to 3, SmolLM 1 and 2, and whatever else is a ``LlamaForCausalLM``."""

from __future__ import annotations

from nemo_minitron.model.family import Family

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    hf_biases=("attention_bias", "mlp_bias"),
    hf_fresh={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    gguf="llama",
    gguf_permuted=True,
)
