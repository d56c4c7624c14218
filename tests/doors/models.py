"""Random models of every family with awkward numbers, made and saved by transformers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from nemo_minitron.model.shape import ModelShape
from nemo_minitron.synthetic import _write_tokenizer

VOCAB = 310
LAYERS = 3
TOKENS = torch.arange(120).view(1, 120) * 7 % VOCAB
"""One prompt, long enough that what scaling does to the longest wavelengths shows in its logits."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # 48 / 6 heads would be 8
    "max_position_embeddings": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _llama3(factor: float) -> dict[str, Any]:
    numbers = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_type": "llama3", **numbers, "original_max_position_embeddings": 8192}  # which Megatron has built in


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {"rope_scaling": _llama3(8.0), "tie_word_embeddings": False}),
    "Llama, tied": ("Llama", {"rope_scaling": _llama3(32.0), "tie_word_embeddings": True}),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama, linear RoPE": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "Mistral": ("Mistral", {"sliding_window": 120}),
    "Qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {"tie_word_embeddings": False}),
}
"""Name of each row: transformers' family and what its config has beside the sizes."""


def make(name: str, folder: Path) -> Path:
    """Write the model ``name`` as transformers 4 saves it, with a tokenizer; norms and biases are far from 1 and 0."""
    family, changes = CONFIGS[name]
    config = getattr(transformers, f"{family}Config")(**{**_SIZES, **changes})
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for key, parameter in model.named_parameters():
        if key.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
        elif key.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    _write_small_tokenizer(folder)
    return folder


def _write_small_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of ``VOCAB`` entries, among them those that transformers adds to any GGUF of a Qwen."""
    sizes = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "num_query_groups": 1}
    _write_tokenizer(
        folder, ModelShape(**sizes, kv_channels=8, vocab_size=VOCAB, padded_vocab_size=VOCAB), ["some text"]
    )
    file = folder / "tokenizer.json"
    text = file.read_text()
    for number, name in enumerate(("<|im_start|>", "<|im_end|>")):
        assert f"<|unused_{number}|>" in text
        text = text.replace(f"<|unused_{number}|>", name)
    file.write_text(text)


def saved_by_transformers_5(source: Path, folder: Path) -> Path:
    """The same folder as transformers 5 writes it: RoPE in one section, ``dtype``, its tokenizer class."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())

    def edit(name: str, change: Callable[[dict[str, Any]], None]) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    def config(content: dict[str, Any]) -> None:
        scaling = content.pop("rope_scaling", None) or {"rope_type": "default"}
        content["rope_parameters"] = {**scaling, "rope_theta": content.pop("rope_theta")}
        content["dtype"] = content.pop("dtype", None) or content.pop("torch_dtype")
        content["transformers_version"] = "5.24.0"

    def tokenizer(content: dict[str, Any]) -> None:
        content |= {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": []}

    edit("config.json", config)
    edit("tokenizer_config.json", tokenizer)
    return folder


def transformers_logits(folder: Path, **keys: Any) -> torch.Tensor:
    """Logits ``[b, s, V]`` of a folder by transformers, float32; every weight of the file is used."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **keys
    )
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(TOKENS).logits
