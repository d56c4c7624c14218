"""Names that NeMo 2.4 and Lightning 2.4 know under ``trainer``, ``exp_manager`` and ``model``.

A static table, so that a misspelt key is caught before anything heavy is imported. Sources: the Lightning
``Trainer`` signature, ``nemo.utils.exp_manager.ExpManagerConfig``, NeMo's ``megatron_gpt_config.yaml``,
``megatron_llama_config.yaml`` and ``megatron_llama_distill.yaml``, and the keys that ``MegatronGPTModel`` and
``MegatronBaseModel`` read from their config. A name maps to None where any value is taken (a list, a mapping or a
scalar), else to the names below it.
"""

from __future__ import annotations

from typing import Any

Tree = dict[str, Any]


def _names(text: str) -> Tree:
    return dict.fromkeys(text.split())


TRAINER: Tree = _names(
    """
    accelerator strategy devices num_nodes precision logger callbacks fast_dev_run max_epochs min_epochs max_steps
    min_steps max_time limit_train_batches limit_val_batches limit_test_batches limit_predict_batches overfit_batches
    val_check_interval check_val_every_n_epoch num_sanity_val_steps log_every_n_steps enable_checkpointing
    enable_progress_bar enable_model_summary accumulate_grad_batches gradient_clip_val gradient_clip_algorithm
    deterministic benchmark inference_mode use_distributed_sampler profiler detect_anomaly barebones plugins
    sync_batchnorm reload_dataloaders_every_n_epochs default_root_dir replace_sampler_ddp
    """
)

EXP_MANAGER: Tree = _names(
    """
    explicit_log_dir exp_dir name version use_datetime_version resume_if_exists resume_past_end
    resume_ignore_no_checkpoint resume_from_checkpoint create_tensorboard_logger summary_writer_kwargs
    create_wandb_logger wandb_logger_kwargs create_mlflow_logger mlflow_logger_kwargs create_dllogger_logger
    dllogger_logger_kwargs create_clearml_logger clearml_logger_kwargs create_neptune_logger neptune_logger_kwargs
    create_checkpoint_callback create_early_stopping_callback early_stopping_callback_params
    create_preemption_callback files_to_copy log_step_timing log_delta_step_timing step_timing_kwargs
    log_local_rank_0_only log_global_rank_0_only disable_validation_on_resume ema max_time_per_run seconds_to_sleep
    create_straggler_detection_callback straggler_detection_params create_fault_tolerance_callback fault_tolerance
    log_tflops_per_sec_per_gpu
    """
) | {
    "checkpoint_callback_params": _names(
        """
        filepath dirpath filename monitor verbose save_last save_top_k save_weights_only mode auto_insert_metric_name
        every_n_epochs every_n_train_steps train_time_interval prefix postfix save_best_model always_save_nemo
        save_nemo_on_train_end model_parallel_size save_on_train_epoch_end async_save save_last_n_optim_states
        """
    )
}

MODEL: Tree = _names(
    """
        num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels encoder_seq_length
        hidden_dropout attention_dropout apply_query_key_layer_scaling normalization bias activation
        position_embedding_type share_embeddings_and_output_weights scale_positional_embedding rotary_base
        name target precision nemo_version restore_from_path restore_from_ckpt kd_teacher_restore_from_path nemo_path
        mcore_gpt skip_train micro_batch_size global_batch_size rampup_batch_size tensor_model_parallel_size
        pipeline_model_parallel_size virtual_pipeline_model_parallel_size pipeline_model_parallel_split_rank
        pipeline_model_parallel_comm_backend context_parallel_size expert_model_parallel_size use_tp_pp_dp_mapping
        num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split sequence_parallel
        max_position_embeddings vocab_size init_method_std use_scaled_init_method ffn_dropout layernorm_epsilon
        do_layer_norm_weight_decay make_vocab_size_divisible_by override_vocab_size pre_process post_process
        persist_layer_norm headscale transformer_block_type openai_gelu normalize_attention_scores rotary_percentage
        rotary_interleaved attention_type attention_backend seq_len_interpolation_factor scale_factor low_freq_factor
        high_freq_factor old_context_len qkv_bias drop_layers apply_embedding_scaling megatron_legacy window_size
        reset_lr reset_lr_steps native_amp_init_scale native_amp_growth_interval hysteresis fp32_residual_connection
        fp16_lm_cross_entropy megatron_amp_O2 grad_allreduce_chunk_size_mb async_grad_allreduce grad_div_ar_fusion
        gradient_accumulation_fusion bias_activation_fusion bias_dropout_add_fusion masked_softmax_fusion
        get_attention_mask_from_fusion apply_rope_fusion cross_entropy_loss_fusion overlap_p2p_comm batch_p2p_comm
        defer_embedding_wgrad_compute wgrad_deferral_limit with_fp32_embedding_grads distributed_adam_bucket_merge_size
        seed resume_from_checkpoint use_cpu_initialization onnx_safe apex_transformer_log_level gradient_as_bucket_view
        sync_batch_comm nccl_communicator_config_path validation_param_sync_overlap gc_interval enable_cuda_graph
        use_te_rng_tracker use_loss_mask sample_weight drop_last
        fsdp fsdp_sharding_strategy fsdp_grad_reduce_dtype fsdp_sharded_checkpoint
        dist_ckpt_format dist_ckpt_load_on_device dist_ckpt_parallel_save dist_ckpt_parallel_save_within_dp
        dist_ckpt_parallel_load dist_ckpt_torch_dist_multiproc dist_ckpt_assume_constant_structure
        dist_ckpt_parallel_dist_opt dist_ckpt_load_strictness
        activations_checkpoint_granularity activations_checkpoint_method activations_checkpoint_num_layers
        num_micro_batches_with_partial_activation_checkpoints activations_checkpoint_layers_per_pipeline
        cpu_offloading cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights
        transformer_engine fp8 fp8_e4m3 fp8_hybrid fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo
        fp8_params reduce_amax tp_only_amax_red use_emha use_flash_attention skip_fp8_attention_checkpoint_load
        ub_tp_comm_overlap ub_tp_comm_overlap_cfg ub_tp_comm_bootstrap_backend mcore_customization_config
        enable_megatron_timers megatron_timer_kwargs sharp
        """
) | {
    "tokenizer": _names(
        """
            library type model vocab_file merge_file delimiter sentencepiece_legacy use_fast trust_remote_code
            tokenizer_model additional_special_tokens special_tokens chat_template bcp_47_code
            """
    ),
    "data": _names(
        """
            data_prefix index_mapping_dir data_impl mmap_bin_files splits_string seq_length skip_warmup num_workers
            num_dataset_builder_threads dataloader_type reset_position_ids reset_attention_mask eod_mask_loss
            validation_drop_last no_seqlen_plus_one_input_tokens pad_samples_to_global_batch_size shuffle_documents
            exchange_indices_distributed data_cache_generation_only legacy_dataset add_fim fim delay_data_init
            delay_data_mmap create_attention_mask pin_memory persistent_workers
            """
    ),
    "nsys_profile": _names("enabled start_step end_step ranks gen_shape trace"),
    "optim": _names(
        """
            name lr weight_decay betas eps amsgrad momentum nesterov bucket_cap_mb overlap_grad_sync
            overlap_param_sync contiguous_grad_buffer contiguous_param_buffer grad_sync_dtype dtype ddp_bucket_size
            average_in_collective check_for_nan_in_grad align_grad_reduce align_param_gather delay_grad_reduce
            delay_param_gather num_distributed_optimizer_instances overlap_param_gather_with_optimizer_step
            store_params store_param_remainders capturable master_weights use_precision_aware_optimizer
            """
    )
    | {
        "sched": _names(
            """
                name warmup_steps warmup_ratio constant_steps constant_ratio hold_steps hold_ratio min_lr max_steps
                decay_steps decay_rate power cycle gamma step_size last_epoch monitor reduce_on_plateau
                """
        )
    },
}

INFERENCE: Tree = _names(
    """
    greedy top_k top_p temperature add_BOS tokens_to_generate all_probs repetition_penalty min_tokens_to_generate
    compute_logprob batch_size max_context_length
    """
)
"""Section of NeMo's ``megatron_gpt_prune.yaml`` (it calibrates inside sampled generation): accepted, not used."""

S3_CHECKPOINTING: Tree = _names("max_write_concurrency max_read_concurrency chunk_size_MB enable_async_checkpointing")
