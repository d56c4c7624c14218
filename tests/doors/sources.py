"""The same model in every format that is read, each laid as its own tool lays it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from nemo_minitron.checkpoint import HfReader
from nemo_minitron.convert import convert
from tests.checkpoint.megatron_dresses import DRESSES
from tests.doors.models import VOCAB, saved_by_transformers_5

_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def hf4(hf: Path, folder: Path) -> Path:
    """As transformers 4 saved it."""
    return hf


def hf5(hf: Path, folder: Path) -> Path:
    """As transformers 5 saves it."""
    return saved_by_transformers_5(hf, folder / "hf5")


def nemo(hf: Path, folder: Path) -> Path:
    """A ``.nemo`` of ours."""
    return convert(hf, folder / "ours.nemo")


def nemo_of_nemo(hf: Path, folder: Path) -> Path:
    """A ``.nemo`` as NeMo's own converter leaves it: no section of ours, nothing packed by us."""
    ours, theirs = convert(hf, folder / "a.nemo"), folder / "theirs.nemo"
    with tarfile.open(ours) as source, tarfile.open(theirs, "w") as target:
        for member in source.getmembers():
            name, data = member.name.removeprefix("./"), source.extractfile(member).read()
            if name.startswith("minitron/"):
                continue
            if name == "model_config.yaml":
                config = yaml.safe_load(data)
                del config["minitron"]
                config["tokenizer"] = {"library": "huggingface", "type": str(hf), "model": None}
                data = yaml.safe_dump(config).encode()
            info = tarfile.TarInfo(member.name)
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))
    return theirs


def dress(name: str) -> Callable[[Path, Path], Path]:
    """A folder of NeMo 2, Megatron-Bridge or Megatron-LM, whose table has rows of padding."""

    def lay(hf: Path, folder: Path) -> Path:
        with HfReader(hf) as reader:
            return DRESSES[name](reader, folder / name, reader.shape.replace(padded_vocab_size=320))

    return lay


def llama_cpp(hf: Path, folder: Path) -> Path:
    """A GGUF in float32 as llama.cpp's converter writes it, by the ``gguf`` package."""
    config = json.loads((hf / "config.json").read_text())
    architecture = _ARCHITECTURES[config["architectures"][0].replace("Mistral", "Llama")]
    heads, groups, d = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(d)
    writer.add_value_length(d)
    writer.add_rope_dimension_count(d)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(VOCAB)
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(config, scaling, d))
    _add_tokenizer(writer, hf)
    for name, tensor in load_file(hf / "model.safetensors").items():
        values = tensor.float().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            count = heads if "q_proj" in name else groups
            pairs = values.reshape(count, 2, d // 2, *values.shape[1:])
            values = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(_gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    begin, kind = name.rsplit(".", 1)
    if not begin.startswith("model.layers."):
        return f"{_GGUF_NAMES[begin]}.{kind}"
    _, _, layer, rest = begin.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[rest]}.{kind}"


def _llama3_factors(config: dict, scaling: dict, d: int) -> np.ndarray:
    """What each frequency is divided by, as llama.cpp's converter computes it."""
    factors = []
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    for frequency in 1.0 / config["rope_theta"] ** (torch.arange(0, d, 2).float() / d):
        wavelength = 2 * np.pi / float(frequency)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(scaling["factor"])
        else:
            smooth = (scaling["original_max_position_embeddings"] / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def _add_tokenizer(writer: gguf.GGUFWriter, hf: Path) -> None:
    model = json.loads((hf / "tokenizer.json").read_text())
    added = {entry["content"]: entry["id"] for entry in model["added_tokens"]}
    entries = {**model["model"]["vocab"], **added}
    tokens = [token for token, _ in sorted(entries.items(), key=lambda entry: entry[1])]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in added else 1 for token in tokens])
    writer.add_token_merges(merges or ["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


SOURCES: dict[str, Callable[[Path, Path], Path]] = {
    "HF 4": hf4,
    "HF 5": hf5,
    "GGUF": llama_cpp,
    "`.nemo` of ours": nemo,
    "`.nemo` of NeMo": nemo_of_nemo,
    "NeMo 2": dress("nemo2"),
    "Megatron-Bridge": dress("bridge"),
    "Megatron-LM": dress("megatron"),
}
"""Name of each column of origins: what lays a HF folder in that format."""
