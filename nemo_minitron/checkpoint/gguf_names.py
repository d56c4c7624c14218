"""Names of a GGUF's tensors beside HF's, and the order in which llama.cpp keeps the rows of queries and keys."""

from __future__ import annotations

import torch

from nemo_minitron.model import layout
from nemo_minitron.model.family import Family

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def places(family: Family) -> dict[str, str]:
    """HF's name of each tensor that a GGUF of this family can have, ``N`` for the layer."""
    optional = "attention_bias" in family.hf_biases
    rows = layout.layer_rows(family, family.qkv_bias or optional, optional, "mlp_bias" in family.hf_biases)
    known_to_hf = {name.replace("{l}", "N") for row in rows for name in row.hf}
    names = {
        f"blk.N.{own}.{kind}": f"model.layers.N.{theirs}.{kind}"
        for own, theirs in (_LAYER | dict(family.gguf_names)).items()
        for kind in ("weight", "bias")
    }
    top = {f"{own}.weight": f"{theirs}.weight" for own, theirs in _TOP.items()}
    return {own: theirs for own, theirs in names.items() if theirs in known_to_hf} | top


def permuted_heads(family: Family, hf_name: str, heads: int, groups: int) -> int:
    """Heads of a tensor whose rows llama.cpp stores in pairs for an interleaved RoPE, weight or bias; 0 for others."""
    module = hf_name.rsplit(".", 2)[-2]
    return {"q_proj": heads, "k_proj": groups}.get(module, 0) if family.gguf_permuted else 0


def permute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """(heads·d, …) in HF's halves → rows 2i and 2i+1 of a head from HF's i and i + d/2, llama.cpp's pairs."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of :func:`permute`."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()
