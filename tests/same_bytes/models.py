"""Two tiny models and a text, written from integers: no random generator or tokenizer of a library plays a part."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, HIDDEN, FFN, HEADS, GROUPS, CHANNELS, VOCAB, POSITIONS = 4, 32, 48, 8, 4, 8, 257, 64


def write_models(out: Path) -> None:
    """``llama`` (float32, untied, Llama-3's RoPE) and ``qwen2`` (bfloat16, tied, with biases), HF folders; a text."""
    common = {
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": POSITIONS,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": CHANNELS,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": scaling,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    qwen2 = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "head_dim": CHANNELS,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    for seed, (name, config) in enumerate((("llama", llama), ("qwen2", qwen2)), 1):
        folder = out / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(common | config, indent=2) + "\n")
        biased, half = name == "qwen2", config["torch_dtype"] == "bfloat16"
        write_safetensors(
            folder / "model.safetensors", weights(seed, biased, bool(config["tie_word_embeddings"])), half
        )
        write_tokenizer(folder)
    (out / "text.txt").write_text("\n".join(sentences()))


def sentences() -> Iterator[str]:
    """Of a text that a model could learn something from."""
    for number in range(400):
        kind = "even" if number % 2 == 0 else "odd"
        yield f"Sentence {number} says that {number * number} is the square of {number}, which is {kind}."


def weights(seed: int, biased: bool, tied: bool) -> dict[str, np.ndarray]:
    """Random float32 weights by HF's names, of a trained model's scale; rows differ in size, norms are near 1."""
    raw = np.random.PCG64(seed)

    def integers(*size: int) -> np.ndarray:  # sums of four bytes, around 0: nearly normal, standard deviation 148
        words = raw.random_raw(int(np.prod(size)))
        return (
            sum((words >> np.uint64(8 * byte)) & np.uint64(255) for byte in range(4)).astype(np.int64) - 510
        ).reshape(size)

    def matrix(rows: int, columns: int, halvings: int) -> np.ndarray:
        sizes = 256 + integers(rows, 1) // 4  # below 2^24 in all, so that a float32 holds the product
        return np.ldexp((integers(rows, columns) * sizes).astype(np.float32), -halvings)

    def norm() -> np.ndarray:
        return np.ldexp((1024 + integers(HIDDEN)).astype(np.float32), -10)

    found = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN, 17)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found[prefix + "input_layernorm.weight"] = norm()
        for part, rows in (("q", HEADS * CHANNELS), ("k", GROUPS * CHANNELS), ("v", GROUPS * CHANNELS)):
            found[prefix + f"self_attn.{part}_proj.weight"] = matrix(rows, HIDDEN, 17)
            if biased:
                found[prefix + f"self_attn.{part}_proj.bias"] = np.ldexp(integers(rows).astype(np.float32), -10)
        found[prefix + "self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * CHANNELS, 18)
        found[prefix + "post_attention_layernorm.weight"] = norm()
        for part in ("gate", "up"):
            found[prefix + f"mlp.{part}_proj.weight"] = matrix(FFN, HIDDEN, 17)
        found[prefix + "mlp.down_proj.weight"] = matrix(HIDDEN, FFN, 18)
    found["model.norm.weight"] = norm()
    if not tied:
        found["lm_head.weight"] = matrix(VOCAB, HIDDEN, 17)
    return found


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], half: bool) -> None:
    """The file format in itself; ``half`` cuts float32 to bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in sorted(tensors.items()):
        part = (tensor.view("<u4") >> 16).astype("<u2").tobytes() if half else tensor.astype("<f4").tobytes()
        offsets = [len(data), len(data) + len(part)]
        header[name] = {"dtype": "BF16" if half else "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        data += part
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: 256 bytes, written as GPT-2 writes them, and the end of a text."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    signs = {byte: chr(byte) for byte in plain}
    signs |= {byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in signs)}
    eos = "<|endoftext|>"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256, "content": eos, **flags}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {signs[byte]: byte for byte in range(256)} | {eos: 256},
            "merges": [],
        },
    }
    special = {"bos_token": eos, "eos_token": eos}
    config = special | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": POSITIONS}
    for name, content in (
        ("tokenizer.json", document),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", config),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
