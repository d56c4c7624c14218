"""What the keys of Megatron's configs mean to us: of NeMo 2 and Megatron-Bridge, and the ``args`` of Megatron-LM.

They are the fields of Megatron-Core's ``TransformerConfig`` and ``ModelParallelConfig``, 0.13 to 0.19, with what the
model classes around it add: ``GPTConfig`` of NeMo 2, ``GPTModelProvider`` and ``GPTModelConfig`` of Megatron-Bridge.
Megatron-LM's arguments have many of the same names. A name that begins as one of :data:`_NEUTRAL_BEGINNINGS` belongs to
training, inference, parallelism or kinds of layers that a model has only where another key, which is a condition here,
says so.
"""

from __future__ import annotations

from typing import Any

from nemo_minitron.checkpoint.keys import Keys


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OFF = (False, None, 0)
_ZERO = (0, None, False)
_NONE = (None,)
_EMPTY: tuple[Any, ...] = (None, [], {}, "", False, 0)
_ONE = (1, None)

_NEUTRAL_BEGINNINGS = tuple(
    _names(
        """
        moe_ mamba_ dsa_ mtp_ mup_ yarn_ linear_ inference_ cuda_graph_ fp8 fp4 tp_comm_ cpu_offloading recompute_
        log_ rl_ grpo_ muon_ retro_ retriever_ relative_attention_ biencoder_ bert_ dino_ vision_ swin_ patch_ img_
        ict_ fim_ langrl_ inprocess_ wandb_ tensorboard_ tokenizer_ tiktoken_ null_tokenizer_ ckpt_ non_persistent_
        save_ load_ no_load_ no_save_ lr_ decoupled_ train_ valid_ test_ eval_ exit_ profile_ pytorch_profiler_
        record_ one_logger ddp_ kitchen_ async_ use_checkpoint optimizer_ overlap_ rerun_ distrib dist_ data_
        dataloader_ per_ mask_ timing_ ft_ qk_clip fine_grained_ min_ main_ offload_ pipeline_ expert_
        virtual_pipeline_ adam_ sgd_ lion_ adlr_ exp_avg_ error_injection flight_recorder nccl_ sharp straggler
        num_dataset fsdp_ torch_fsdp2 use_torch_ use_megatron_fsdp megatron_fsdp use_precision use_tp_ use_te_
        use_kitchen use_layer_wise_ use_persistent_ wsd_ weight_decay wd_ sft iterations_ replication hysteresis
        validation_ check_ hybrid_context logits_ eod_ reset_ init_method embedding_init_ output_layer_init_
        mlp_chunks delay_ disable_ enable_ cross_entropy_ export_ modelopt_ consumed_ do_ manual_gc app_tag_ align_
        keep_fp8 pin_cpu_ indexer_ loss_scale decode_only_ _
        """
    )
)

_CONDITIONS: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",),
    "rotary_percent": _ONE,
    "rotary_interleaved": _OFF,
    "layernorm_zero_centered_gamma": _OFF,
    "apply_residual_connection_post_layernorm": _OFF,
    "qk_layernorm": _OFF,
    "qk_l2_norm": _OFF,
    "attention_output_gate": _OFF,
    "softmax_type": ("vanilla", None),
    "softmax_scale": _NONE,
    "glu_linear_offset": _ZERO,
    "activation_func_clamp_value": _NONE,
    "window_size": _NONE,
    "no_rope_freq": _EMPTY,
    "mrope_section": _EMPTY,
    "multi_latent_attention": _OFF,
    "experimental_attention_variant": _NONE,
    "linear_attention_freq": _EMPTY,
    "linear_attention_type": _NONE,
    "is_hybrid_model": _OFF,
    "hybrid_layer_pattern": _EMPTY,
    "hybrid_override_pattern": _EMPTY,
    "hybrid_attention_ratio": _ZERO,
    "hybrid_mlp_ratio": _ZERO,
    "heterogeneous_block_specs": _OFF,
    "heterogeneous_layers_config_path": _EMPTY,
    "heterogeneous_layers_config_encoded_json": _EMPTY,
    "mtp_num_layers": _ZERO,
    "use_mup": _OFF,
    "quant_recipe": _EMPTY,
}

_NEUTRAL = _names(
    """
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split activation_func_fp8_input_store
    activation_offload_fraction apply_query_key_layer_scaling apply_rope_fusion attention_backend attention_dropout
    attention_softmax_in_fp32 autocast_dtype barrier_with_L1_time batch_invariant_mode batch_p2p_comm batch_p2p_sync
    bf16 bias_activation_fusion bias_dropout_add_fusion bias_dropout_fusion calculate_per_token_loss
    clone_scatter_output_in_embedding config_logger_dir context_parallel_size cp_comm_type data_step_fn
    deallocate_pipeline_outputs defer_embedding_wgrad_compute delta_offload_bytes_across_pp_ranks dense_grouped_gemm
    deterministic_mode ep_overlap_early_attn_memory_release experimental_attention_variant_loss_scale_func
    external_cuda_graph finalize_model_grads_func first_last_layers_bf16 flash_attention_version flash_decode
    forward_step_fn fp16 fp16_lm_cross_entropy fp32_residual_connection fused_residual_rmsnorm fused_single_qkv_rope
    grad_scale_func grad_sync_func gradient_accumulation_fusion gtp_weight_remat_size hetereogenous_dist_checkpoint
    hidden_dropout hierarchical_context_parallel_sizes high_priority_a2a_comm_stream init_model_with_meta_device
    logit_dtype masked_softmax_fusion max_seqlen_per_dp_cp_rank memory_efficient_layer_norm
    microbatch_group_size_per_vp_stage mixed_precision_wrapper model_type no_sync_func num_layers_at_end_in_bf16
    num_layers_at_start_in_bf16 num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    num_microbatches_with_partial_activation_checkpoints parallel_output param_sync_func params_dtype
    perform_initialization persist_layer_norm rotary_scaling_factor scatter_embedding_sequence_parallel
    sequence_parallel symmetric_ar_type tensor_parallel_num_weight_shards timers tp_only_amax_red transformer_impl
    use_arbitrary_attention_mask use_cpu_initialization use_fused_weighted_squared_relu use_grouped_gemm_for_dense_mlp
    use_grouped_gemm_for_shared_expert use_inference_optimized_layers use_mamba_mem_eff_path use_ring_exchange_p2p
    use_transformer_engine_full_layer_spec use_transformer_engine_op_fuser variable_seq_lengths wgrad_deferral_limit
    window_attn_skip_freq wrap_with_ddp
    """
)  # rotary_scaling_factor is yarn's

MODEL = Keys(
    applied=_names(
        """
        num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size
        make_vocab_size_divisible_by should_pad_vocab tensor_model_parallel_size share_embeddings_and_output_weights
        rotary_base seq_length max_position_embeddings layernorm_epsilon add_qkv_bias add_bias_linear scale_factor
        low_freq_factor high_freq_factor old_context_len rope_scaling rope_scaling_factor seq_len_interpolation_factor
        generation_config
        """
    ),
    neutral=_NEUTRAL
    | _names("hf_model_id hf_model_revision extra_checkpoint_metadata pre_wrap_hook pre_wrap_hooks post_wrap_hook")
    | _names("post_wrap_hooks"),
    neutral_beginnings=_NEUTRAL_BEGINNINGS,
    only=_CONDITIONS
    | {
        "gated_linear_unit": (True,),
        "activation_func": ("torch.nn.functional.silu", "silu", "swish"),
        "num_moe_experts": _ZERO,
        "mtp_enabled": _OFF,
        "restore_modelopt_state": _OFF,
        "transformer_layer_spec": (
            None,
            "default_layer_spec",
            "transformer_engine_layer_spec",
            "transformer_engine_full_layer_spec",
            "local_layer_spec",
            "get_gpt_layer_local_spec",
            "get_gpt_layer_with_transformer_engine_spec",
            "get_gpt_decoder_block_spec",
        ),
    },
    absent={  # the classes' defaults are GPT-2's
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "gated_linear_unit": False,
        "activation_func": "gelu",
    },
)
"""``model:`` of Megatron-Bridge's ``run_config.yaml`` and ``config:`` of NeMo 2's ``context/model.yaml``."""

ARGS = Keys(
    applied=_names(
        """
        num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups group_query_attention kv_channels
        vocab_size padded_vocab_size tokenizer_type make_vocab_size_divisible_by tensor_model_parallel_size
        untie_embeddings_and_output_weights rotary_base max_position_embeddings seq_length norm_epsilon
        layernorm_epsilon add_qkv_bias add_bias_linear use_rope_scaling rope_scaling_factor
        """
    ),
    neutral=_NEUTRAL
    | _names(
        """
        accumulate_allreduce_grads_in_fp32 add_position_embedding allow_ambiguous_pad_tokens apply_wd_to_qk_layernorm
        auto_detect_ckpt_format batch_size bias_gelu_fusion bias_swiglu_fusion block_data_path cache_mla_latents
        calc_ft_timeouts chat_template checkpoint_activations classes_fraction clip_grad create_all_gather_group
        create_attention_mask_in_dataloader curr_iteration decoder_first_pipeline_num_layers
        decoder_last_pipeline_num_layers decoder_num_layers decoder_seq_length decrease_batch_size_if_needed
        deprecated_use_mcore_models dump_param_to_param_group_map embedding_path empty_unused_memory_level
        encoder_num_layers encoder_pipeline_model_parallel_size encoder_seq_length encoder_tensor_model_parallel_size
        end_weight_decay evidence_data_path fake_process_group filter_warnings finetune freeze_all_layers
        full_validation fully_parallel_load fully_parallel_save global_batch_size gpu_sniff_test_interval
        grad_reduce_in_bf16 gradient_reduce_div_fusion head_lr_mult high_priority_stream_groups initial_loss_scale
        iter_per_epoch iteration kv_lora_rank lazy_mpu_init legacy_tokenizer load local_rank logging_level lr
        max_tokens_to_oom memory_keys memory_snapshot_path merge_file metadata_path micro_batch_size
        mid_level_dataset_surplus mla_down_proj_fusion mmap_bin_files mock_data model_parallel_size modules_to_filter
        most_recent_k mscale mscale_all_dim multiple_validation_sets no_persist_layer_norm no_weight_decay_cond_type
        num_channels num_classes num_distributed_optimizer_instances num_floating_point_operations_so_far
        num_layers_per_virtual_pipeline_stage num_speculative_tokens num_virtual_stages_per_pipeline_rank num_workers
        nvtx_ranges object_storage_cache_path offset_sampling_seed_by_dp_rank optimizer outer_dp_sharding_strategy
        output_bert_embeddings override_ckpt_iteration override_opt_param_scheduler pad_vocab_size perform_rl_step
        phase_transition_iterations pretrained_checkpoint profile q_lora_rank qk_head_dim qk_pos_emb_head_dim
        query_in_block_prob rampup_batch_size rank refit_method result_rejected_tracker_filename return_log_probs
        reuse_grad_buf_for_mxfp8_param_ag run_workload_inspector_server runtime_time_unit sample_rate save
        scatter_gather_tensors_in_pipeline seed set_level_for_all_loggers short_seq_prob skip_prompt_log_probs
        skip_train skipped_train_samples special_tokens split start_eval_at_iter start_weight_decay
        step_batch_size_schedule stream_ckpt_dequant strict_fsdp_dtensor_load suggested_communication_unit_size
        te_precision_config_file te_rng_tracker throughput_window_size titles_data_path to_test
        transformer_pipeline_model_parallel_size trust_remote_code use_custom_fsdp use_dist_ckpt
        use_dist_ckpt_deprecated use_distributed_optimizer use_flash_attn use_flashinfer_fused_rope
        use_gloo_process_groups use_legacy_static_engine use_mcore_models use_mp_args_from_checkpoint_args
        use_nsys_profiler use_one_sent_docs use_pytorch_profiler use_rotary_position_embeddings use_sharp
        use_tokenizer_model_from_checkpoint_args activation_func gated_linear_unit v_head_dim verify_integrity
        vocab_extra_ids vocab_file warmup world_size
        """
    ),
    neutral_beginnings=_NEUTRAL_BEGINNINGS,
    only=_CONDITIONS
    | {
        "swiglu": (True,),
        "quick_geglu": _OFF,
        "squared_relu": _OFF,
        "openai_gelu": _OFF,
        "onnx_safe": _OFF,
        "apply_layernorm_1p": _OFF,
        "rope_type": ("rope", None),
        "rotary_seq_len_interpolation_factor": _ONE,  # some versions alone apply it
        "num_experts": _ZERO,
        "num_moe_experts": _ZERO,
        "spec": _EMPTY,
        "yaml_cfg": _EMPTY,
        "use_legacy_models": _OFF,
        "retro_add_retriever": _OFF,
        "export_qk_l2_norm": _OFF,
    },
    absent={  # Megatron-LM's defaults are GPT-2's
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "swiglu": False,
    },
)
"""``args`` of a Megatron-LM checkpoint, an ``argparse.Namespace``."""
