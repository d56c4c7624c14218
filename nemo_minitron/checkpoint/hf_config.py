"""HF ``config.json`` to and from :class:`ModelShape`: which architectures are supported, and which fields mean what."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from nemo_minitron.errors import MinitronError
from nemo_minitron.shape import ModelShape, RopeScaling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
# What transformers assumes where config.json is silent, and a Llama's would differ.
_ABSENT: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
}
_MODEL_TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def dtype_name(dtype: torch.dtype) -> str:
    """HF's spelling of a storage dtype."""
    return str(dtype).removeprefix("torch.")


def shape_from_hf(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """Read the shape of a supported decoder; V = Vp = the rows of HF's table.

    Raises:
        MinitronError: an architecture or feature that Megatron's Llama layers would compute differently.
    """
    try:
        architecture = _architecture(config, where)
        config = {**_ABSENT.get(architecture, {}), **config}
        _check_features(config, architecture, where)
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        vocab = int(config["vocab_size"])
        return ModelShape(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            ffn_hidden_size=int(config["intermediate_size"]),
            num_attention_heads=heads,
            num_query_groups=int(config.get("num_key_value_heads") or heads),
            kv_channels=int(config.get("head_dim") or hidden // heads),
            vocab_size=vocab,
            padded_vocab_size=vocab,
            share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
            rotary_base=_finite(config.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(config.get("rope_scaling"), where),
            max_position_embeddings=int(config.get("max_position_embeddings") or 2048),
            layernorm_epsilon=_finite(config.get("rms_norm_eps") or 1e-6),
            qkv_bias=architecture == "Qwen2ForCausalLM",
        )
    except KeyError as error:
        raise MinitronError(f"{where}: expected the key {error}, found none") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise MinitronError(f"{where}: expected numbers for the sizes of the model, found {error}") from None


def _finite(value: Any) -> float:
    number = float(value)
    if not 0 <= number < 1e30:
        raise ValueError(f"{number}, which is negative or not finite")
    return number


def hf_config_from_shape(shape: ModelShape, dtype: torch.dtype, source: Mapping[str, Any] | None = None) -> dict:
    """A ``config.json`` for ``shape``: ``source`` with only the fields changed whose meaning differs.

    With ``source`` of the same shape and dtype the result equals ``source`` key by key, so that a round trip is
    bit-identical; without it, a plain Llama (or Qwen2 where ``qkv_bias``) config is made.
    """
    config = copy.deepcopy(dict(source)) if source else _fresh_config(shape)
    before = shape_from_hf(config) if source else None
    for key, field in _FIELDS.items():
        value = getattr(shape, field)
        if before is None or getattr(before, field) != value:
            config[key] = value
    if before is None or before.kv_channels != shape.kv_channels or _implied_head_dim(config) != shape.kv_channels:
        config["head_dim"] = shape.kv_channels
    if before is None or before.rope_scaling != shape.rope_scaling:
        config["rope_scaling"] = _rope_dict(shape.rope_scaling)
    if before is None or config.get("torch_dtype", dtype_name(dtype)) != dtype_name(dtype):
        config["torch_dtype"] = dtype_name(dtype)
    return config


_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "rope_theta": "rotary_base",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
}


def _fresh_config(shape: ModelShape) -> dict[str, Any]:
    name = "Qwen2ForCausalLM" if shape.qkv_bias else "LlamaForCausalLM"
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": "qwen2" if shape.qkv_bias else "llama",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if not shape.qkv_bias:
        config |= {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    return config


def _implied_head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _architecture(config: Mapping[str, Any], where: str) -> str:
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise MinitronError(f"{where}: architectures must be a list, found {names!r:.80}")
    name = names[0] if names else _MODEL_TYPES.get(str(config.get("model_type")), str(config.get("model_type")))
    if name not in SUPPORTED:
        raise MinitronError(f"{where}: architecture must be one of {', '.join(SUPPORTED)}, found '{name}'")
    return name


def _check_features(config: Mapping[str, Any], architecture: str, where: str) -> None:
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise MinitronError(f"{where}: {key} must be false for {architecture}, found {config[key]!r}")
    window = config.get("sliding_window")
    if architecture == "Qwen2ForCausalLM":
        if config.get("use_sliding_window"):
            raise MinitronError(f"{where}: use_sliding_window must be false, found true")
    elif window is not None:
        raise MinitronError(f"{where}: sliding_window must be null, found {window!r}")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise MinitronError(f"{where}: hidden_act must be 'silu', found {activation!r}")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "?")
        raise MinitronError(f"{where}: expected plain weights, found quantization_config of method '{method}'")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise MinitronError(f"{where}: partial_rotary_factor must be 1.0, found {config['partial_rotary_factor']!r}")


_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope_scaling(scaling: Mapping[str, Any] | None, where: str) -> RopeScaling | None:
    if not scaling:
        return None
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise MinitronError(f"{where}: rope_scaling type must be 'llama3', found '{kind}'")
    missing = [key for key in _ROPE_KEYS if key not in scaling]
    if missing:
        raise MinitronError(f"{where}: rope_scaling needs {', '.join(_ROPE_KEYS)}; missing: {', '.join(missing)}")
    return RopeScaling(
        factor=_finite(scaling["factor"]),
        low_freq_factor=_finite(scaling["low_freq_factor"]),
        high_freq_factor=_finite(scaling["high_freq_factor"]),
        original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
    )


def _rope_dict(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {"rope_type": "llama3", **{key: getattr(scaling, key) for key in _ROPE_KEYS}}
