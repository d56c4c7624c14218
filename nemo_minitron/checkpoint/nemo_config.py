"""``model_config.yaml`` of a ``.nemo``: to and from :class:`ModelShape`, and the section in which we keep HF's config.

NeMo ignores the section ``minitron``, which holds what its own keys cannot say: the true vocabulary and the source's
``config.json`` and ``generation_config.json``, from which an export restores them key by key.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoint import known
from nemo_minitron.checkpoint.biases import biases_for_nemo, biases_from_nemo, flag
from nemo_minitron.checkpoint.hf_layers import differ
from nemo_minitron.checkpoint.keys import Keys
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.family import PLAIN, Family, family_of
from nemo_minitron.model.shape import LinearScaling, ModelShape, RopeScaling, Scaling
from nemo_minitron.registry import FAMILIES

SECTION = "minitron"
TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
_PRECISIONS = {
    torch.float32: ("32", "32-true", "float32", "fp32"),
    torch.bfloat16: ("bf16", "bf16-mixed", "bf16-true", "bfloat16"),
    torch.float16: ("16", "16-mixed", "16-true", "float16", "fp16"),
}
_NEMO_PRECISION: dict[torch.dtype, int | str] = {torch.float32: 32, torch.bfloat16: "bf16", torch.float16: 16}
_OTHER_LAYERS = (
    "megatron_falcon_gpt",
    "megatron_gemma2",
    "megatron_gpt_hyena",
    "te_gpt_hyena",
)  # names of NeMo's specs
_INTERPOLATION = "seq_len_interpolation_factor"
_SCALING_KEYS = {
    "scale_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}


def dtype_from_precision(precision: str | int) -> torch.dtype:
    """Storage dtype for a ``precision`` as NeMo, Lightning or HF spell it."""
    for dtype, names in _PRECISIONS.items():
        if str(precision) in names:
            return dtype
    known = ", ".join(name for names in _PRECISIONS.values() for name in names)
    raise MinitronError(f"precision must be one of {known}; found '{precision}'")


def vocab_divisor(vocab_size: int) -> int:
    """``make_vocab_size_divisible_by`` as NeMo's Llama converter has it: the largest power of two <= 128 dividing V.

    With it NeMo pads nothing at TP=1, and only to a multiple of TP beyond.
    """
    divisor = 128
    while vocab_size % divisor:
        divisor //= 2
    return divisor


def padded_vocab(vocab_size: int, divisor: int) -> int:
    """Rows Vp of the table at TP=1 (upstream: ``MegatronBaseModel._vocab_size_with_padding``)."""
    if divisor < 1:
        raise MinitronError(f"make_vocab_size_divisible_by must be at least 1, found {divisor}")
    return -(-vocab_size // divisor) * divisor


def shape_from_nemo(
    config: Mapping[str, Any], table_rows: int, true_vocab: int | None = None, where: str = "model_config.yaml"
) -> ModelShape:
    """Read the shape of a Megatron-Core GPT that computes what a Llama does.

    Args:
        table_rows: rows of the stored embedding table: Vp, whatever the config says about padding.
        true_vocab: V where the caller knows it; else ``minitron.vocab_size``, else ``override_vocab_size``, else Vp.

    Raises:
        MinitronError: a key whose value a Llama cannot have, or a size that is missing.
    """
    family = family_from_nemo(config, where)
    nemo_keys(family).check(config, where)
    if config.get("name") in _OTHER_LAYERS:
        raise MinitronError(f"{where}: name must not be '{config['name']}', which has layers of another kind")
    section = config.get(SECTION) or {}
    vocab = true_vocab or section.get("vocab_size") or config.get("override_vocab_size") or table_rows
    heads = _size(config, "num_attention_heads", where)
    hidden = _size(config, "hidden_size", where)
    if heads < 1:
        raise MinitronError(f"{where}: num_attention_heads must be at least 1, found {heads}")
    qkv_bias, proj_bias, mlp_bias = biases = biases_from_nemo(config, config.get(SECTION) or {}, where)
    if not family.has_biases(biases, zeros=True):
        key = "bias" if proj_bias or mlp_bias else "qkv_bias"
        wanted = str(not config.get(key, True)).lower()
        raise MinitronError(f"{where}: {key} must be {wanted} in the family '{family.name}'")
    return ModelShape(
        num_layers=_size(config, "num_layers", where),
        hidden_size=hidden,
        ffn_hidden_size=_size(config, "ffn_hidden_size", where),
        num_attention_heads=heads,
        num_query_groups=_size(config, "num_query_groups", where, heads),
        kv_channels=_size(config, "kv_channels", where, hidden // heads),
        vocab_size=_size({"vocab_size": vocab}, "vocab_size", where),
        padded_vocab_size=table_rows,
        share_embeddings_and_output_weights=flag(config, "share_embeddings_and_output_weights", where, True),
        rotary_base=_number(config, "rotary_base", where, 10000),
        rope_scaling=_scaling(config, where),
        max_position_embeddings=_size(config, "max_position_embeddings", where, config.get("encoder_seq_length", 512)),
        layernorm_epsilon=_number(config, "layernorm_epsilon", where, 1e-5),
        qkv_bias=qkv_bias,
        proj_bias=proj_bias,
        mlp_bias=mlp_bias,
        family=family.layers,
        sliding_window=window_from_nemo(config, where),
    )


def _scaling(config: Mapping[str, Any], where: str) -> Scaling | None:
    factor = 1.0 if config.get(_INTERPOLATION) is None else _number(config, _INTERPOLATION, where)
    linear = LinearScaling(factor) if factor != 1 else None
    if factor < 1:
        raise MinitronError(f"{where}: {_INTERPOLATION} must be at least 1, found {factor}")
    if not flag(config, "scale_positional_embedding", where, False):
        return linear
    if linear is not None:
        raise MinitronError(f"{where}: {_INTERPOLATION} must be 1 with scale_positional_embedding, found {factor}")
    given = {ours: theirs for theirs, ours in _SCALING_KEYS.items() if config.get(theirs) is not None}
    numbers: dict[str, Any] = {ours: _number(config, theirs, where) for ours, theirs in given.items()}
    if "original_max_position_embeddings" in numbers:
        numbers["original_max_position_embeddings"] = int(numbers["original_max_position_embeddings"])
    return RopeScaling(**numbers)


def window_from_nemo(config: Mapping[str, Any], where: str) -> int | None:
    """Tokens that a token attends to by ``window_size: [W, 0]``, W as NeMo's converters take it from HF's config.

    NeMo's model class is not told of it, so that what that class saves has it in the section ``minitron`` alone.
    """
    value = config.get("window_size")
    value = (config.get(SECTION) or {}).get("window_size") if value is None else value
    if value is None:
        return None
    if not isinstance(value, list) or [type(number) for number in value] != [int, int] or value[1] != 0:
        raise MinitronError(f"{where}: window_size must be null or [W, 0], found {value!r:.80}")
    if value[0] < 1:
        raise MinitronError(f"{where}: window_size must have at least 1 token, found {value!r:.80}")
    return int(value[0])


def family_from_nemo(config: Mapping[str, Any], where: str = "model_config.yaml") -> Family:
    """The family of a NeMo model: the one that a file of ours names, else the one most of whose keys are there.

    Raises:
        MinitronError: a name that no family has.
    """
    named = (config.get(SECTION) or {}).get("family")
    if named is not None:
        if not isinstance(named, str) or named not in FAMILIES.names():
            raise MinitronError(
                f"{where}: {SECTION}.family must be one of {', '.join(FAMILIES.names())}, found {named!r:.80}; "
                "extensions=[./FILE.py] adds a family of your own"
            )
        family: Family = FAMILIES.get(named)
        return family
    biases = biases_from_nemo(config, config.get(SECTION) or {}, where)
    fitting = [
        family
        for family in FAMILIES.every()
        if family.has_biases(biases) and all(config.get(key) == value for key, value in family.nemo.items())
    ]
    return max(fitting, key=lambda family: len(family.nemo))  # the first of equals, and there is always a Llama's


def nemo_keys(family: Family) -> Keys:
    """What the keys of a ``model_config.yaml`` mean for a model of this family."""
    return known.NEMO.having({key: (value,) for key, value in family.nemo.items()}, required=True)


def _size(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise MinitronError(f"{where}: {key} must be an integer, found {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e30:
        raise MinitronError(f"{where}: {key} must be a number that is finite and not negative, found {value!r:.80}")
    return float(value)


def nemo_config_from_hf(
    hf_config: Mapping[str, Any] | None,
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    divisor: int,
    tokenizer: Path | None,
    tokenizer_size: int | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A ``model_config.yaml`` with which NeMo's ``MegatronGPTModel.restore_from`` builds and fills this model.

    Args:
        hf_config: the source's, kept for an export; None where it has none.
        divisor: ``make_vocab_size_divisible_by`` that led to ``shape.padded_vocab_size``.
        tokenizer: HF tokenizer folder, stored as an absolute path as NeMo wants it.
        tokenizer_size: entries of the tokenizer; where NeMo would derive other table rows from it,
            ``override_vocab_size`` pins them.
    """
    config = model_defaults()
    config |= {"precision": _NEMO_PRECISION[dtype], "make_vocab_size_divisible_by": divisor}
    config["tokenizer"] = {
        "library": "huggingface",
        "type": str(tokenizer.absolute()) if tokenizer else None,
        "model": None,
        "use_fast": True,
    }
    config["init_method_std"] = float((hf_config or {}).get("initializer_range") or 0.02)
    if tokenizer_size is None or padded_vocab(tokenizer_size, divisor) != shape.padded_vocab_size:
        config["override_vocab_size"] = shape.padded_vocab_size
    config[SECTION] = {"vocab_size": shape.vocab_size}
    if hf_config is not None:
        config[SECTION]["hf_config"] = dict(hf_config)
    if generation_config is not None:
        config[SECTION]["generation_config"] = dict(generation_config)
    config["data"]["seq_length"] = shape.longest_sequence
    return update_shape(config, shape)


def with_kept_layers(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A NeMo config that notes in ``minitron.layers`` which layers stay, where lists of HF's config tell them apart.

    Args:
        kept: indices among the layers of ``config``; noted are those among the layers of ``minitron.hf_config``.
    """
    section = config.get(SECTION) or {}
    hf_config, earlier = section.get("hf_config") or {}, section.get("layers")
    if not differ(hf_config, hf_config.get("num_hidden_layers", 0)):
        return dict(config)
    return {**config, SECTION: {**section, "layers": [earlier[i] if earlier else i for i in kept]}}


def update_shape(config: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """A copy of a NeMo config that describes ``shape``; all other keys are kept.

    ``minitron.hf_config`` stays the source's: an export overlays the fields that pruning changed.
    """
    new: dict[str, Any] = copy.deepcopy(dict(config))
    bias_keys, bias_section = biases_for_nemo(shape)
    new |= {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "share_embeddings_and_output_weights": shape.share_embeddings_and_output_weights,
        "rotary_base": shape.rotary_base,
        "layernorm_epsilon": shape.layernorm_epsilon,
        "max_position_embeddings": shape.max_position_embeddings,
        **bias_keys,
        "scale_positional_embedding": isinstance(shape.rope_scaling, RopeScaling),
    }
    new.setdefault("encoder_seq_length", shape.longest_sequence)
    (new.get(SECTION) or {}).pop("window_size", None)
    if shape.sliding_window is not None or new.get("window_size") is not None:
        new["window_size"] = None if shape.sliding_window is None else [shape.sliding_window, 0]
    for theirs, ours in _SCALING_KEYS.items():
        new.pop(theirs, None)
        if isinstance(shape.rope_scaling, RopeScaling):
            new[theirs] = getattr(shape.rope_scaling, ours)
    if isinstance(shape.rope_scaling, LinearScaling):
        new[_INTERPOLATION] = shape.rope_scaling.factor
    elif new.get(_INTERPOLATION) not in (None, 1):
        del new[_INTERPOLATION]
    if new.get("override_vocab_size") is not None:
        new["override_vocab_size"] = shape.padded_vocab_size
    new |= family_of(shape).nemo
    named: dict[str, Any] = {} if shape.family == PLAIN else {"family": shape.family}
    named |= bias_section
    kept = {key: value for key, value in (new.get(SECTION) or {}).items() if key != "biases"}
    new[SECTION] = {**kept, "vocab_size": shape.vocab_size, **named}
    return new


def with_precision(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A copy whose ``precision`` has the dtype of the stored tensors; kept where it already means that."""
    new = dict(config)
    if str(new.get("precision")) not in _PRECISIONS[dtype]:
        new["precision"] = _NEMO_PRECISION[dtype]
    return new


def model_defaults() -> dict[str, Any]:
    """A new copy of what a ``model_config.yaml`` of ours says besides sizes and tokenizer."""
    return copy.deepcopy(_DEFAULTS)


_DEFAULTS: dict[str, Any] = {
    "mcore_gpt": True,
    "target": TARGET,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "rampup_batch_size": None,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "normalization": "rmsnorm",
    "bias": False,
    "activation": "fast-swiglu",
    "position_embedding_type": "rope",
    "rotary_percentage": 1.0,
    "transformer_block_type": "pre_ln",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "ffn_dropout": 0.0,
    "use_scaled_init_method": True,
    "apply_query_key_layer_scaling": False,
    "normalize_attention_scores": True,
    "do_layer_norm_weight_decay": False,
    "pre_process": True,
    "post_process": True,
    "headscale": False,
    "openai_gelu": False,
    "attention_type": "multihead",
    "persist_layer_norm": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_add_fusion": False,
    "get_attention_mask_from_fusion": True,
    "grad_div_ar_fusion": True,
    "gradient_as_bucket_view": True,
    "fp32_residual_connection": False,
    "fp16_lm_cross_entropy": False,
    "native_amp_init_scale": 4294967296,
    "native_amp_growth_interval": 1000,
    "hysteresis": 2,
    "megatron_amp_O2": False,
    "grad_allreduce_chunk_size_mb": 125,
    "sequence_parallel": False,
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "num_micro_batches_with_partial_activation_checkpoints": None,
    "activations_checkpoint_layers_per_pipeline": None,
    "transformer_engine": True,
    "fp8": False,
    "use_cpu_initialization": False,
    "sync_batch_comm": False,
    "apex_transformer_log_level": 30,
    "onnx_safe": False,
    "seed": 1234,
    "resume_from_checkpoint": None,
    "dist_ckpt_format": "torch_dist",
    "dist_ckpt_load_strictness": None,
    "data": {
        "data_prefix": [],
        "index_mapping_dir": None,
        "data_impl": "mmap",
        "splits_string": "900,50,50",
        "seq_length": 2048,
        "skip_warmup": True,
        "num_workers": 0,
        "dataloader_type": "single",
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "validation_drop_last": True,
        "no_seqlen_plus_one_input_tokens": False,
        "pad_samples_to_global_batch_size": False,
        "shuffle_documents": True,
    },
    "optim": {
        "name": "adamw",
        "lr": 1e-4,
        "weight_decay": 0.1,
        "betas": [0.9, 0.95],
        "sched": {"name": "CosineAnnealing", "warmup_steps": 50, "constant_steps": 0, "min_lr": 1e-5},
    },
}
