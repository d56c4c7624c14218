"""Checkpoints in Megatron's three dresses around the same weights, as NeMo 2, Megatron-Bridge and Megatron-LM lay them.

The weights are written by our own writer, whose files Megatron-Core loads (``test_megatron.py``); the configs are
those of the tools, with all of their keys that say something about a Llama.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_minitron.checkpoint.archive import ArchiveWriter
from nemo_minitron.checkpoint.sharded_write import ShardedWeights
from nemo_minitron.model.shape import LinearScaling, ModelShape, RopeScaling

SILU = {"_target_": "torch.nn.functional.silu", "_call_": False}
DTYPE = {"_target_": "torch.bfloat16", "_call_": False}


def write_weights(
    reader: Any, target: Path, folder: str, prefix: str, common: dict[str, Any], shape: ModelShape
) -> None:
    """The weights of ``reader`` as one rank of Megatron-Core saves them, below ``target/folder``."""
    from nemo_minitron.checkpoint import each_tensor

    archive = ArchiveWriter(target)
    weights = ShardedWeights(archive, shape, reader.dtype, target, folder=folder, prefix=prefix, common=common)
    for parameter, layer in each_tensor(shape):
        weights.write(parameter, reader.tensor(parameter, layer), layer)
    weights.close()
    archive.commit()


def fields(shape: ModelShape) -> dict[str, Any]:
    """What Megatron's model classes call a shape."""
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "share_embeddings_and_output_weights": shape.share_embeddings_and_output_weights,
        "rotary_base": shape.rotary_base,
        "seq_length": shape.max_position_embeddings,
        "layernorm_epsilon": shape.layernorm_epsilon,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": SILU,
        "add_bias_linear": shape.mlp_bias,
        "add_qkv_bias": shape.qkv_bias and not shape.mlp_bias,
        "qk_layernorm": shape.family == "qwen3",
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "params_dtype": DTYPE,
        "pipeline_dtype": DTYPE,
        "bf16": False,
        "tensor_model_parallel_size": 2,
    }


def llama31(shape: ModelShape) -> dict[str, Any]:
    """Llama 3.1's scaling as the classes have it that always scale."""
    scaling = shape.rope_scaling
    if not isinstance(scaling, RopeScaling):
        return linear(shape, "seq_len_interpolation_factor")
    return {
        "scale_factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "old_context_len": scaling.original_max_position_embeddings,
    }


def linear(shape: ModelShape, key: str) -> dict[str, Any]:
    """Positions that are divided, by the name that a tool has for it."""
    return {key: shape.rope_scaling.factor} if isinstance(shape.rope_scaling, LinearScaling) else {}


def bridge(reader: Any, target: Path, shape: ModelShape, **changes: Any) -> Path:
    """Megatron-Bridge 0.6: ``iter_0000000`` with ``run_config.yaml``, and the trackers beside it."""
    target.mkdir()
    write_weights(reader, target / "iter_0000000", "", "", {"checkpoint_version": 3.0, "iteration": 0}, shape)
    scaling = shape.rope_scaling if isinstance(shape.rope_scaling, RopeScaling) else None
    model = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        **fields(shape),
        **linear(shape, "seq_len_interpolation_factor"),
        "vocab_size": shape.vocab_size,
        "make_vocab_size_divisible_by": 32,
        "should_pad_vocab": True,
        "rope_scaling": scaling is not None,
        "rope_scaling_factor": 1.0 if scaling is None else scaling.factor,
        "transformer_layer_spec": {
            "_target_": "megatron.bridge.models.gpt_provider.default_layer_spec",
            "_call_": False,
        },
        "attention_backend": {
            "_target_": "megatron.core.transformer.enums.AttnBackend",
            "_call_": True,
            "_args_": [5],
            "_name_": "auto",
        },
        **changes,
    }
    config = {"_target_": "megatron.bridge.training.config.ConfigContainer", "model": model, "peft": None}
    (target / "iter_0000000" / "run_config.yaml").write_text(yaml.safe_dump(config))
    (target / "latest_checkpointed_iteration.txt").write_text("0")
    torch.save({"step": torch.tensor(0)}, target / "latest_train_state.pt")
    return target


def nemo2(reader: Any, target: Path, shape: ModelShape, **changes: Any) -> Path:
    """NeMo 2: ``context/model.yaml`` and ``weights``."""
    write_weights(reader, target, "weights/", "module.", {}, shape)
    kind = "Llama31Config8B" if isinstance(shape.rope_scaling, RopeScaling) else "LlamaConfig"
    config = {"_target_": f"nemo.collections.llm.gpt.model.llama.{kind}", **fields(shape), **llama31(shape), **changes}
    model = {
        "_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel",
        "config": config,
        "optim": {"_target_": "nemo.lightning.pytorch.optim.megatron.MegatronOptimizerModule", "config": {}},
        "model_transform": None,
    }
    (target / "context").mkdir()
    (target / "context" / "model.yaml").write_text(yaml.safe_dump(model))
    (target / "context" / "io.json").write_text("{}")
    return target


def arguments(shape: ModelShape) -> dict[str, Any]:
    """Megatron-LM's arguments of a shape."""
    scaling = shape.rope_scaling if isinstance(shape.rope_scaling, RopeScaling) else None
    return {
        **linear(shape, "rotary_seq_len_interpolation_factor"),
        "num_layers": shape.num_layers,
        "encoder_num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "group_query_attention": shape.num_query_groups != shape.num_attention_heads,
        "num_query_groups": 1 if shape.num_query_groups == shape.num_attention_heads else shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "max_position_embeddings": shape.max_position_embeddings,
        "seq_length": 16,
        "norm_epsilon": shape.layernorm_epsilon,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": shape.mlp_bias,
        "add_qkv_bias": shape.qkv_bias and not shape.mlp_bias,
        "qk_layernorm": shape.family == "qwen3",
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "rotary_base": shape.rotary_base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": scaling is not None,
        "rope_scaling_factor": 8.0 if scaling is None else scaling.factor,
        "untie_embeddings_and_output_weights": not shape.share_embeddings_and_output_weights,
        "vocab_size": shape.vocab_size,
        "padded_vocab_size": shape.padded_vocab_size,
        "make_vocab_size_divisible_by": 64,
        "tensor_model_parallel_size": 1,
        "tokenizer_type": "HuggingFaceTokenizer",
        "params_dtype": torch.bfloat16,
        "optimizer": "adam",
        "lr": 1e-4,
    }


def megatron(reader: Any, target: Path, shape: ModelShape, **changes: Any) -> Path:
    """Megatron-LM: ``release`` with ``args`` in ``common.pt``, and the tracker beside it."""
    target.mkdir()
    args = argparse.Namespace(**{**arguments(shape), **changes})
    write_weights(reader, target / "release", "", "", {"args": args, "checkpoint_version": 3.0}, shape)
    (target / "latest_checkpointed_iteration.txt").write_text("release")
    return target


DRESSES = {"nemo2": nemo2, "bridge": bridge, "megatron": megatron}
