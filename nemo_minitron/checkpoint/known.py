"""What every key of a config or header means to us, by source: applied, neutral, or refused unless it says little.

A key that changes what a model computes and that we do not compute must stop a conversion: a wrong result with exit
status 0 is the worst fault. A key that nobody here has heard of is said in one line, since most are harmless, and
refusing them all would refuse most files. A family adds conditions of its own
(:class:`nemo_minitron.model.family.Family`).
"""

from __future__ import annotations

from typing import Any

from nemo_minitron.checkpoint.keys import Keys

_OFF = (False, None, 0)
_ZERO = (0, None, False)
_NONE = (None,)
_EMPTY: tuple[Any, ...] = (None, [], {}, "", False)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


HF = Keys(
    applied=_names(
        """
        architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings
        rope_theta rope_scaling rope_parameters original_max_position_embeddings layer_types
        """
    ),
    neutral=_names(
        """
        dtype torch_dtype use_bfloat16 transformers_version transformers.js_config _name_or_path _commit_hash
        _attn_implementation_autoset _attn_implementation attn_implementation _flash_attn_2_enabled torchscript
        initializer_range use_cache attention_dropout hidden_dropout attn_pdrop resid_pdrop embd_pdrop embd_dropout
        classifier_dropout output_attentions output_hidden_states output_scores output_router_logits return_dict
        return_dict_in_generate pretraining_tp max_window_layers gradient_checkpointing cache_implementation
        bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class prefix
        finetuning_task id2label label2id num_labels problem_type task_specific_params bad_words_ids
        begin_suppress_tokens suppress_tokens forced_bos_token_id forced_eos_token_id remove_invalid_values
        do_sample early_stopping max_length max_new_tokens min_length length_penalty diversity_penalty
        encoder_no_repeat_ngram_size no_repeat_ngram_size num_beams num_beam_groups num_return_sequences
        repetition_penalty exponential_decay_length_penalty temperature top_k top_p typical_p
        chunk_size_feed_forward is_decoder tf_legacy_loss use_mps use_flash_attention_2 _use_flash_attention_2
        model_max_length max_sequence_length name_or_path
        unsloth_version unsloth_fixed
        """
    ),
    only={
        "hidden_act": ("silu", "swish"),
        "hidden_activation": (None, "silu", "swish"),
        "activation_function": (None, "silu", "swish"),
        "attention_bias": _OFF,
        "mlp_bias": _OFF,
        "use_bias": _OFF,
        "bias": _OFF,
        "no_bias": (None, True),
        "attention_out_bias": _OFF,
        "attention_in_bias": _OFF,
        "sliding_window": _NONE,
        "use_sliding_window": _OFF,
        "sliding_window_pattern": _NONE,
        "attention_chunk_size": _NONE,
        "partial_rotary_factor": (None, 1),
        "rotary_pct": (None, 1),
        "rotary_percent": (None, 1),
        "rotary_emb_fraction": (None, 1),
        "rope_interleaved": _OFF,
        "rope_interleave": _OFF,
        "rotary_interleaved": _OFF,
        "rope_ratio": (None, 1),
        "rope_local_base_freq": _NONE,
        "rope_pct": (None, 1),
        "position_embedding_type": (None, "rope", "rotary"),
        "use_rotary_embedding": (None, True),
        "alibi": _OFF,
        "no_rope_layers": _EMPTY,
        "no_rope_layer_interval": _ZERO,
        "nope_layer_interval": _ZERO,
        "use_qk_norm": _OFF,
        "qk_norm": _OFF,
        "qk_layernorm": _OFF,
        "use_qk_layernorm": _OFF,
        "clip_qkv": _ZERO,
        "attn_logit_softcapping": _ZERO,
        "final_logit_softcapping": _ZERO,
        "logit_scale": (None, 1),
        "logits_scaling": (None, 1),
        "logits_scale": (None, 1),
        "embedding_multiplier": (None, 1),
        "residual_multiplier": (None, 1),
        "attention_multiplier": _NONE,
        "query_pre_attn_scalar": _NONE,
        "attention_scale": _NONE,
        "scale_emb": (None, 1),
        "scale_embedding": _OFF,
        "scale_depth": _NONE,
        "dim_model_base": _NONE,
        "use_mup": _OFF,
        "mup_denominator": _NONE,
        "parallel_attn": _OFF,
        "use_parallel_residual": _OFF,
        "normalization_layer_type": (None, "rmsnorm"),
        "norm_type": (None, "rmsnorm"),
        "rms_norm_add_unit_offset": _OFF,
        "num_experts": _ZERO,
        "num_local_experts": _ZERO,
        "n_routed_experts": _ZERO,
        "num_experts_per_tok": _ZERO,
        "moe_intermediate_size": _ZERO,
        "mlp_only_layers": _EMPTY,
        "num_nextn_predict_layers": _ZERO,
        "num_mtp_modules": _ZERO,
        "block_configs": _EMPTY,
        "num_kv_shared_layers": _ZERO,
        "cla_share_factor": (None, 1),
        "quantization_config": _EMPTY,
        "compression_config": _EMPTY,
        "pruned_heads": _EMPTY,
        "is_encoder_decoder": _OFF,
        "add_cross_attention": _OFF,
        "cross_attention_hidden_size": _NONE,
        "tie_encoder_decoder": _OFF,
        "text_config": _EMPTY,
        "vision_config": _EMPTY,
        "audio_config": _EMPTY,
    },
)
"""``config.json`` of any family. ``auto_map`` is unknown on purpose: that a model comes with code of its
own, which is not run, is worth a line."""


GGUF = Keys(
    applied=_names(
        """
        general.architecture general.alignment llama.block_count llama.context_length llama.embedding_length
        llama.feed_forward_length llama.attention.head_count llama.attention.head_count_kv llama.attention.key_length
        llama.attention.value_length llama.attention.layer_norm_rms_epsilon llama.rope.freq_base
        llama.rope.dimension_count llama.vocab_size split.count split.no split.tensors.count minitron.rope_scaling
        llama.rope.scaling.original_context_length llama.rope.scaling.factor llama.rope.scale_linear
        GGUF.version GGUF.tensor_count GGUF.kv_count
        """
    ),
    neutral=_names(
        """
        llama.rope.scaling.finetuned llama.expert_used_count
        """
    ),
    neutral_beginnings=(
        "general.",
        "tokenizer.",
        "quantize.",
        "llama.rope.scaling.yarn_",  # used under scaling.type yarn alone
    ),
    only={
        "general.type": ("model",),
        "llama.tensor_data_layout": (None, "Meta AI original pth"),  # rows of Q and K permuted, as they always are
        "llama.rope.scaling.type": ("none", "linear"),
        "llama.rope.scaling.attn_factor": (1, 0),
        "llama.rope.freq_base_swa": _NONE,
        "llama.rope.dimension_sections": _NONE,
        "llama.attention.sliding_window": _ZERO,
        "llama.attention.sliding_window_pattern": _NONE,
        "llama.attention.causal": (True,),
        "llama.attention.clamp_kqv": _ZERO,
        "llama.attention.max_alibi_bias": _ZERO,
        "llama.attention.scale": _ZERO,
        "llama.attention.layer_norm_epsilon": _NONE,
        "llama.attention.key_length_mla": _NONE,
        "llama.attention.value_length_mla": _NONE,
        "llama.attention.temperature_scale": _ZERO,
        "llama.attn_logit_softcapping": _ZERO,
        "llama.final_logit_softcapping": _ZERO,
        "llama.logit_scale": (None, 0, 1),
        "llama.embedding_scale": (None, 0, 1),
        "llama.residual_scale": (None, 0, 1),
        "llama.expert_count": _ZERO,
        "llama.interleave_moe_layer_step": _ZERO,
        "llama.use_parallel_residual": _OFF,
        "llama.pooling_type": _ZERO,
        "llama.hidden_act": (None, "silu", "swish"),
        "llama.hidden_activation": (None, "silu", "swish"),
    },
)
"""Metadata of a GGUF of architecture ``llama``; a factor without a type is linear to llama.cpp, and 0 is none."""


_SIZES = _names(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels make_vocab_size_divisible_by
    override_vocab_size rotary_base scale_factor low_freq_factor high_freq_factor old_context_len
    seq_len_interpolation_factor max_position_embeddings encoder_seq_length layernorm_epsilon
    """
)
_SWITCHES = _names("share_embeddings_and_output_weights scale_positional_embedding qkv_bias")
_TRAINING_NUMBERS = _names("hidden_dropout attention_dropout ffn_dropout init_method_std")
_TRAINING_SWITCHES = _names(
    """
    use_scaled_init_method do_layer_norm_weight_decay apply_query_key_layer_scaling fp32_residual_connection
    megatron_amp_O2 grad_div_ar_fusion gradient_accumulation_fusion bias_activation_fusion bias_dropout_add_fusion
    masked_softmax_fusion persist_layer_norm get_attention_mask_from_fusion apply_rope_fusion transformer_engine
    """
)
NEMO = Keys(
    kinds=dict.fromkeys(_SIZES | _TRAINING_NUMBERS, "number")
    | dict.fromkeys(_SWITCHES | _TRAINING_SWITCHES, "flag")
    | {"precision": "word"},
    applied=_SIZES | _SWITCHES | _names("vocab_size tokenizer minitron precision name window_size"),
    neutral=_TRAINING_NUMBERS
    | _TRAINING_SWITCHES
    | _names(
        """
        target nemo_version restore_from_path restore_from_ckpt kd_teacher_restore_from_path nemo_path
        resume_from_checkpoint skip_train data optim peft nsys_profile inference enable_megatron_timers
        megatron_timer_kwargs sharp seed seq_length global_batch_size micro_batch_size rampup_batch_size
        answer_only_loss save_nemo_on_validation_end merge_cfg_with use_loss_mask sample_weight drop_last
        reset_lr reset_lr_steps gc_interval megatron_legacy pre_process post_process attention_backend
        attention_softmax_in_fp32 use_flash_attention use_emha fp16_lm_cross_entropy fp16 bf16 params_dtype
        autocast_dtype enable_autocast pipeline_dtype native_amp_init_scale native_amp_growth_interval
        hysteresis loss_scale grad_allreduce_chunk_size_mb async_grad_allreduce bias_gelu_fusion
        cross_entropy_loss_fusion cross_entropy_fusion_impl memory_efficient_layer_norm overlap_p2p_comm
        overlap_p2p_comm_warmup_flush batch_p2p_comm batch_p2p_sync defer_embedding_wgrad_compute
        wgrad_deferral_limit with_fp32_embedding_grads delay_wgrad_compute distributed_adam_bucket_merge_size
        perform_initialization use_cpu_initialization onnx_safe apex_transformer_log_level
        gradient_as_bucket_view sync_batch_comm nccl_communicator_config_path validation_param_sync_overlap
        enable_cuda_graph use_te_rng_tracker inference_rng_tracker tensor_model_parallel_size
        pipeline_model_parallel_size virtual_pipeline_model_parallel_size pipeline_model_parallel_split_rank
        pipeline_model_parallel_comm_backend context_parallel_size expert_model_parallel_size
        expert_tensor_parallel_size use_tp_pp_dp_mapping sequence_parallel num_layers_in_first_pipeline_stage
        num_layers_in_last_pipeline_stage account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split cp_comm_type hierarchical_context_parallel_sizes variable_seq_lengths
        deterministic_mode deallocate_pipeline_outputs calculate_per_token_loss test_mode barrier_with_L1_time
        config_logger_dir reduce_amax tp_only_amax_red skip_fp8_attention_checkpoint_load
        activations_checkpoint_granularity activations_checkpoint_method activations_checkpoint_num_layers
        distribute_saved_activations num_micro_batches_with_partial_activation_checkpoints
        activations_checkpoint_layers_per_pipeline recompute_granularity recompute_method recompute_num_layers
        recompute_modules sync_batchnorm load_directly_on_device hidden_size_per_head
        apply_residual_connection_post_layernorm moe_router_load_balancing_type moe_router_topk
        moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps moe_token_dropping moe_grouped_gemm
        moe_extended_tp
        """
    ),
    neutral_beginnings=("dist_ckpt_", "fsdp", "fp8", "ub_tp_comm_", "tp_comm_", "cpu_offloading", "cuda_graph_"),
    only={
        "mcore_gpt": (True,),
        "normalization": ("rmsnorm", "RMSNorm"),
        "activation": ("fast-swiglu", "swiglu"),
        "position_embedding_type": ("rope",),
        "bias": (False, True),
        "rotary_percentage": (1,),
        "rotary_interleaved": (False, None),
        "transformer_block_type": ("pre_ln", None),
        "attention_type": ("multihead", None),
        "normalize_attention_scores": (True, None),
        "headscale": _OFF,
        "openai_gelu": _OFF,
        "layernorm_zero_centered_gamma": _OFF,
        "apply_embedding_scaling": _OFF,
        "mcore_customization_config": _EMPTY,
        "drop_layers": _EMPTY,
        "hyena": _EMPTY,
        "encoder": _EMPTY,
        "decoder": _EMPTY,
        "qk_layernorm": _OFF,
        "softmax_scale": _NONE,
        "no_rope_freq": _EMPTY,
        "mrope_section": _EMPTY,
        "multi_latent_attention": _OFF,
        "num_moe_experts": (None, 0),
        "moe_ffn_hidden_size": (None, 0),
        "moe_shared_expert_intermediate_size": (None, 0),
        "mtp_num_layers": (None, 0),
        "is_hybrid_model": _OFF,
        "heterogeneous_block_specs": _OFF,
        "heterogeneous_layers_config_path": _EMPTY,
        "heterogeneous_layers_config_encoded_json": _EMPTY,
        "add_bias_linear": _OFF,
        "add_qkv_bias": _OFF,
        "gated_linear_unit": (None, True),
        "quant_recipe": _EMPTY,
    },
    absent={  # NeMo's defaults are GPT-2's
        "mcore_gpt": False,
        "normalization": "layernorm",
        "activation": "gelu",
        "position_embedding_type": "learned_absolute",
        "bias": True,
    },
)
"""``model_config.yaml`` of a ``.nemo``, and with ``kinds`` all that NeMo's model class is told of it."""
