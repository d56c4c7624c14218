"""Mistral: a Llama, where its window over the tokens is off or holds the whole sequence."""

from __future__ import annotations

from nemo_minitron.model.family import Family

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    hf_absent={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    hf_fresh={"sliding_window": None},
    hf_window=True,
)
