"""Megatron-LM's description of a checkpoint: the ``args`` of the run that saved it, in the common state.

``--use-checkpoint-args`` reads most of them (``load_args_from_checkpoint``). What it leaves to the command line is
there as well, for Megatron-Bridge and for the reader of this package, and is said by :func:`further_arguments`.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from nemo_minitron.checkpoint.megatron_fields import bias_everywhere, interpolation, llama3_factor, switches, values
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import ModelShape

VERSION = 3.0
"""``checkpoint_version`` since which QKV has the order of today."""


def _names(text: str) -> list[str]:
    return text.split()


_OFF = _names(
    """
    apply_layernorm_1p rotary_interleaved squared_relu apply_query_key_layer_scaling multi_latent_attention
    no_persist_layer_norm overlap_p2p_comm fp8_param_gather bias_gelu_fusion init_method_xavier_uniform
    is_hybrid_model qk_l2_norm fp16_lm_cross_entropy moe_grouped_gemm moe_use_legacy_grouped_gemm
    init_model_with_meta_device use_legacy_models
    """
)
_NONE = _names(
    """
    num_experts mtp_num_layers spec heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json
    decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers hybrid_layer_pattern
    virtual_pipeline_model_parallel_size vocab_file
    """
)


def common_state(
    shape: ModelShape, dtype: torch.dtype, divisor: int, tokenizer: str | None, where: str
) -> dict[str, Any]:
    """The state that is not sharded, before the first step.

    Args:
        divisor: ``make_vocab_size_divisible_by``.
        tokenizer: where the folder of the tokenizer is going to lie; None without one.

    Raises:
        MinitronError: a shape that its model cannot have.
    """
    if interpolation(shape) is not None:
        raise MinitronError(
            f"{where}: RoPE scaling must be none or Llama 3's in format=megatron, found linear: Megatron-LM (0.13 to "
            "0.19) builds its GPT without it whatever it is told; format=bridge and format=nemo2 can say it"
        )
    args: dict[str, Any] = dict.fromkeys(_OFF, False) | dict.fromkeys(_NONE)
    args |= {f.argument: not value if f.inverted else value for f, value in values(shape, where)}
    args |= switches(shape, where)
    factor = llama3_factor(shape, where)
    args |= {
        "padded_vocab_size": shape.padded_vocab_size,
        "make_vocab_size_divisible_by": divisor,
        "seq_length": shape.max_position_embeddings,
        "group_query_attention": shape.num_query_groups != shape.num_attention_heads,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "add_position_embedding": True,
        "rotary_percent": 1.0,
        "use_rope_scaling": factor is not None,
        "rope_scaling_factor": 8.0 if factor is None else factor,
        "rotary_seq_len_interpolation_factor": None,
        "add_bias_linear": bias_everywhere(shape, where),
        "normalization": "RMSNorm",
        "swiglu": True,
        "bias_swiglu_fusion": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "cp_comm_type": ["p2p"],
        "config_logger_dir": "",
        "transformer_impl": "transformer_engine",
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "tokenizer_type": None if tokenizer is None else "HuggingFaceTokenizer",
        "tokenizer_model": tokenizer,
        "ckpt_format": "torch_dist",
        "iteration": 0,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
    }
    return {"args": Namespace(**args), "checkpoint_version": VERSION, "iteration": 0}


def further_arguments(shape: ModelShape, where: str) -> list[str]:
    """What a command line must say beside ``--use-checkpoint-args``, which does not read it from the checkpoint."""
    said = [f"--norm-epsilon {shape.layernorm_epsilon:g}"]
    said += [f"--{key.replace('_', '-')}" for key, value in switches(shape, where).items() if value is True]
    factor = llama3_factor(shape, where)
    return said + ([] if factor is None else ["--use-rope-scaling", f"--rope-scaling-factor {factor:g}"])
