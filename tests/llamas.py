"""Small Llamas that cover the supported shapes, shared by the tests."""

from __future__ import annotations

import torch

from nemo_minitron.model.shape import LinearScaling, ModelShape, RopeScaling

GQA = ModelShape(
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=320,
    padded_vocab_size=320,
    max_position_embeddings=128,
)

SHAPES: dict[str, ModelShape] = {
    "mha": GQA.replace(num_query_groups=8),
    "gqa": GQA,
    "tied": GQA.replace(share_embeddings_and_output_weights=True),
    "head_dim": GQA.replace(hidden_size=48),  # 48 / 8 heads would be 6, it is 8
    "llama3_rope": GQA.replace(
        rotary_base=500000.0,
        rope_scaling=RopeScaling(
            factor=13.5, low_freq_factor=1.25, high_freq_factor=3.75, original_max_position_embeddings=48
        ),
    ),
    "linear_rope": GQA.replace(hidden_size=48, rotary_base=1e6, rope_scaling=LinearScaling(2.5)),
    "window": GQA.replace(sliding_window=96),  # Mistral; tests of logits run 96 tokens at most
    "padded": GQA.replace(vocab_size=250, padded_vocab_size=250, share_embeddings_and_output_weights=True),
    "bf16": GQA.replace(num_query_groups=2),
    "qkv_bias": GQA.replace(qkv_bias=True, share_embeddings_and_output_weights=True),  # Qwen2
    "biases": GQA.replace(hidden_size=48, qkv_bias=True, proj_bias=True, mlp_bias=True),  # Llama's two keys
    "attention_bias": GQA.replace(qkv_bias=True, proj_bias=True, share_embeddings_and_output_weights=True),
    "mlp_bias": GQA.replace(mlp_bias=True),
    "fp16": GQA.replace(layernorm_epsilon=1e-6, share_embeddings_and_output_weights=True),
}
"""Named shapes for ``pytest.mark.parametrize``; V = Vp, as an HF folder has them."""

DTYPES: dict[str, torch.dtype] = {name: torch.float32 for name in SHAPES} | {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Storage dtype of each named shape."""
