"""Qwen2 and Qwen2.5: queries, keys and values have a bias."""

from __future__ import annotations

from nemo_minitron.model.family import Family

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    hf_absent={"num_key_value_heads": 32, "max_position_embeddings": 32768},
    hf_neutral=("sliding_window",),  # without use_sliding_window, which must be off
    qkv_bias=True,
    gguf="qwen2",
)
