"""Megatron-Bridge's description of a checkpoint: ``run_config.yaml`` and ``train_state.pt``, as plain data.

The section ``model`` is a ``GPTModelProvider``, which every release has had; the classes for single families, and
with them three of the four numbers of Llama 3's RoPE scaling, are gone from later ones.
"""

from __future__ import annotations

import io
from typing import Any

import torch

from nemo_minitron.checkpoint.megatron_fields import bias_everywhere, interpolation, llama3_factor, switches, values
from nemo_minitron.model.shape import ModelShape

RUN_CONFIG, TRAIN_STATE = "run_config.yaml", "train_state.pt"
_PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
_TOKENIZER = "megatron.bridge.training.tokenizers.config.TokenizerConfig"


def run_config(
    shape: ModelShape, dtype: torch.dtype, divisor: int, tokenizer: str | None, where: str
) -> dict[str, Any]:
    """Everything that Megatron-Bridge reads when it builds the model, or goes on to train it.

    Args:
        divisor: ``make_vocab_size_divisible_by``, from which it derives the rows of the table at its own TP.
        tokenizer: where the folder of the tokenizer is going to lie; None without one.

    Raises:
        MinitronError: a shape that its model class cannot have.
    """
    model: dict[str, Any] = {"_target_": _PROVIDER}
    model |= {field.config: value for field, value in values(shape, where)}
    model |= {
        "make_vocab_size_divisible_by": divisor,
        "should_pad_vocab": True,
        "normalization": "RMSNorm",
        "activation_func": _named("torch.nn.functional.silu"),
        "gated_linear_unit": True,
        "add_bias_linear": bias_everywhere(shape, where),
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **switches(shape, where),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": _named(str(dtype)),
        "pipeline_dtype": _named(str(dtype)),
        "autocast_dtype": _named(str(dtype)),
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    factor = llama3_factor(shape, where)
    model |= {"rope_scaling": factor is not None, "rope_scaling_factor": 1.0 if factor is None else factor}
    model["seq_len_interpolation_factor"] = interpolation(shape)
    named = None
    if tokenizer is not None:
        named = {"_target_": _TOKENIZER, "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tokenizer}
    # without these, it looks for the states of an optimizer and of random generators
    checkpoint = {"save_optim": False, "save_rng": False, "fully_parallel_save": False, "ckpt_format": "torch_dist"}
    return {"model": model, "tokenizer": named, "checkpoint": checkpoint}


def _named(name: str) -> dict[str, Any]:
    """A function or a dtype, as its YAML has them."""
    return {"_target_": name, "_call_": False}


def train_state() -> bytes:
    """``train_state.pt`` before the first step."""
    counts = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    state = dict.fromkeys(counts, torch.tensor(0, dtype=torch.int64))
    state["floating_point_operations_so_far"] = torch.tensor(0, dtype=torch.int64)
    state |= {f"do_{part}": torch.tensor(False) for part in ("train", "valid", "test")}
    out = io.BytesIO()
    torch.save({name: value.clone() for name, value in state.items()}, out)
    return out.getvalue()
