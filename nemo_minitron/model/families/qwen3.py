"""Qwen3, the dense models: queries and keys pass an RMSNorm each, one weight for all heads, before RoPE."""

from __future__ import annotations

from torch import Tensor

from nemo_minitron.model.decoder import rms_norm
from nemo_minitron.model.family import Family, LayerWeights
from nemo_minitron.model.parameter import HEAD, Parameter

_NEMO, _HF = "decoder.layers.self_attention.", "model.layers.{l}.self_attn."
QUERY_NORM = Parameter(_NEMO + "q_layernorm.weight", (_HF + "q_norm.weight",), axes=(HEAD,))
KEY_NORM = Parameter(_NEMO + "k_layernorm.weight", (_HF + "k_norm.weight",), axes=(HEAD,))


def normalised(layer: LayerWeights, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries ``[b, A, s, d]`` and keys ``[b, G, s, d]``, normalised over d."""
    epsilon = layer.shape.layernorm_epsilon
    return rms_norm(query, layer[QUERY_NORM], epsilon), rms_norm(key, layer[KEY_NORM], epsilon)


FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    hf_absent={"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    hf_neutral=("sliding_window",),  # without use_sliding_window, which must be off
    hf_fresh={"attention_bias": False},
    parameters=(QUERY_NORM, KEY_NORM),
    queries_and_keys=normalised,
    nemo={"qk_layernorm": True},
    gguf="qwen3",
    gguf_names={"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
)
