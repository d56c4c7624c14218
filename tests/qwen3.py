"""Random Qwen3 of awkward sizes as transformers writes them, and in float64: the independent reference."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA

TOKENS = torch.arange(3 * 40).view(3, 40) * 7 % 320


def random_qwen3(folder: Path, tied: bool) -> Path:
    """A HF folder: 3 layers, 8 heads of 16 at hidden 48, theta 1e6, norms far from one, a tokenizer of 320 entries."""
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=128,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.3, 3.0)
    model.save_pretrained(folder)
    llama = make_llama(folder.parent / f"{folder.name}_llama", GQA)
    PreTrainedTokenizerFast.from_pretrained(llama).save_pretrained(folder)
    return folder


def transformers_logits(folder: Path) -> torch.Tensor:
    """Logits ``[3, 40, 320]`` of :data:`TOKENS`, float32, every tensor of the folder in its place."""
    model, info = Qwen3ForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def double(folder: Path) -> Qwen3ForCausalLM:
    """Transformers' model in float64, whose norms do not round to float32."""
    model = Qwen3ForCausalLM.from_pretrained(folder, torch_dtype=torch.float64, attn_implementation="eager")
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if name.endswith("norm"):
                exact = torch.nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(module, name, exact)
    return model
