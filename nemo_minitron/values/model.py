"""What is done with every key of ``model`` in a training, ``model.optim`` and ``model.data`` included."""

from __future__ import annotations

from nemo_minitron.values.rules import (
    Rules,
    applied,
    boolean,
    choice,
    each,
    fixed,
    list_of,
    neutral,
    number,
    text,
    whole,
)

FRACTION = number(0.0, below=1.0)

SCHEDULES = {
    "CosineAnnealing": "warmup constant min_lr",
    "WarmupPolicy": "warmup",
    "WarmupHoldPolicy": "warmup hold",
    "WarmupAnnealing": "warmup min_lr",
    "SquareAnnealing": "warmup min_lr",
    "SquareRootAnnealing": "warmup min_lr",
    "InverseSquareRootAnnealing": "warmup",
    "NoamHoldAnnealing": "warmup hold decay_rate min_lr",
    "PolynomialDecayAnnealing": "warmup power cycle min_lr",
    "PolynomialHoldDecayAnnealing": "warmup hold power cycle min_lr",
}
"""NeMo's schedules that work from step to step on the keys there are, and what each of them heeds; ``warmup`` stands
for ``warmup_steps`` and ``warmup_ratio``, and so with ``constant`` and ``hold``."""

LEAN = "adamw_8bit"
OPTIMIZERS = (
    "adam", "adamw", LEAN, "fused_adam", "megatron_fused_adam", "distributed_fused_adam", "mcore_distributed_optim",
)  # fmt: skip
DISTRIBUTED = ("distributed_fused_adam", "mcore_distributed_optim")

SCHED: Rules = {
    "name": applied(choice(*SCHEDULES), "NeMo's schedule of the learning rate", needed=True),
    **each("warmup_steps constant_steps hold_steps", applied(whole(0), "steps of this part of the schedule")),
    **each("warmup_ratio constant_ratio hold_ratio", applied(FRACTION, "the same as a share of trainer.max_steps")),
    "min_lr": applied(number(0.0), "rate that the schedule ends with; not above model.optim.lr"),
    "max_steps": applied(whole(-1), "trainer.max_steps, and nothing else"),
    "decay_rate": applied(number(0.0), "of NoamHoldAnnealing: exponent"),
    "power": applied(number(above=0.0), "of the polynomial schedules: exponent"),
    "cycle": applied(boolean, "of the polynomial schedules: begin again"),
    **each("decay_steps gamma step_size", fixed((), "of schedules that are not supported")),
    "last_epoch": fixed((-1,), "exp_manager.resume_if_exists goes on with a schedule"),
    "monitor": neutral("of ReduceLROnPlateau alone, which is not supported"),
    "reduce_on_plateau": fixed((False,), "ReduceLROnPlateau is not supported"),
}

OPTIM: Rules = {
    "name": applied(
        choice(*OPTIMIZERS),
        "optimizer; fused_adam without Apex is torch's adamw, adamw_8bit is torchao's, with moments in 8 bits",
        needed=True,
    ),
    "lr": applied(number(above=0.0), "learning rate at its highest", needed=True),
    "weight_decay": applied(number(0.0), "of matrices; norms and biases have none"),
    "betas": applied(list_of(FRACTION, 2), "of Adam"),
    "eps": applied(number(above=0.0), "of Adam"),
    "amsgrad": applied(boolean, "of Adam; of torch's alone"),
    **each("momentum nesterov", fixed((), "of SGD, which is not supported")),
    **each(
        "bucket_cap_mb overlap_grad_sync overlap_param_sync contiguous_grad_buffer contiguous_param_buffer "
        "grad_sync_dtype dtype ddp_bucket_size average_in_collective check_for_nan_in_grad align_grad_reduce "
        "align_param_gather delay_grad_reduce delay_param_gather num_distributed_optimizer_instances "
        "overlap_param_gather_with_optimizer_step store_params store_param_remainders "
        "use_precision_aware_optimizer",
        applied(None, "of distributed_fused_adam and mcore_distributed_optim alone"),
    ),
    **each("capturable master_weights", applied(boolean, "of fused_adam and megatron_fused_adam alone, with Apex")),
    "sched": SCHED,
}

DATA: Rules = {
    "data_prefix": applied(
        None, "[prefix], [weight, prefix, …] or {train: …, validation: …}; weights are more than 0", needed=True
    ),
    "index_mapping_dir": applied(text, "where Megatron keeps the order of samples; beside the data when null"),
    "data_impl": fixed(("mmap",), "data are .bin/.idx files"),
    "mmap_bin_files": applied(boolean, "map .bin files into memory instead of reading them"),
    "splits_string": applied(text, "shares of train, validation and test documents where data_prefix is one list"),
    "seq_length": applied(whole(1), "tokens of a sample", needed=True),
    "skip_warmup": neutral("files are mapped into memory"),
    "num_workers": applied(whole(0), "processes that read data"),
    "num_dataset_builder_threads": applied(whole(1), "threads that make the order of samples"),
    "dataloader_type": fixed(("single",), "samples come in the order of the index, which resuming relies on"),
    "reset_position_ids": applied(boolean, "positions begin at 0 in every document of a sample"),
    "reset_attention_mask": applied(boolean, "tokens attend to their own document, not to the sample as a whole"),
    "eod_mask_loss": applied(boolean, "leave the token after an end-of-text token out of the loss"),
    "validation_drop_last": fixed((True,), "an incomplete last sample is always left out"),
    "no_seqlen_plus_one_input_tokens": fixed((False,), "every token of a sample has its next token as label"),
    "pad_samples_to_global_batch_size": fixed((False,), "batches are complete: data are repeated"),
    "shuffle_documents": fixed((True,), "Megatron's dataset always shuffles"),
    **each(
        "exchange_indices_distributed data_cache_generation_only legacy_dataset add_fim delay_data_init "
        "delay_data_mmap create_attention_mask",
        fixed((False,), "Megatron-Core's GPTDataset alone is used, in a training"),
    ),
    "fim": neutral("of add_fim, which is not supported"),
    **each("pin_memory persistent_workers", fixed((True,), "NeMo's loader always does")),
}

_CHECKPOINT = "the checkpoint's; one that differs is refused"
_FRESH = "weights come from the checkpoint"
_OWN_LOSS = "losses are computed here, in 32 bits, over one head"
_SPEED = "speed or memory alone; off where the machine lacks it"
_LLAMA = "a Llama has no other"

MODEL: Rules = {
    **each(
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
        "max_position_embeddings normalization layernorm_epsilon bias qkv_bias activation position_embedding_type "
        "rotary_base rotary_percentage scale_positional_embedding scale_factor low_freq_factor high_freq_factor "
        "old_context_len seq_len_interpolation_factor window_size share_embeddings_and_output_weights "
        "make_vocab_size_divisible_by override_vocab_size",
        applied(None, _CHECKPOINT),
    ),
    "encoder_seq_length": applied(whole(1), "the same as model.data.seq_length"),
    "tokenizer": applied(None, "the checkpoint's own where it holds one"),
    "hidden_dropout": applied(FRACTION, "share of hidden values dropped in training"),
    "attention_dropout": applied(FRACTION, "share of attention dropped in training"),
    "ffn_dropout": fixed((0, 0.0), "Megatron-Core has none"),
    "apply_query_key_layer_scaling": neutral("in 16-bit training alone, where it changes no result"),
    **each("name target nemo_version vocab_size", neutral("the checkpoint's")),
    "precision": applied(None, "trainer.precision, and nothing else"),
    **each("restore_from_path kd_teacher_restore_from_path nemo_path", applied(text, ".nemo")),
    **each(
        "restore_from_ckpt resume_from_checkpoint",
        fixed((), "model.restore_from_path is a .nemo; exp_manager.resume_if_exists goes on from a checkpoint"),
    ),
    "mcore_gpt": fixed((True,), "only Megatron-Core models"),
    "skip_train": fixed((False,), "minitron evaluate measures without training"),
    "micro_batch_size": applied(whole(1), "samples per forward pass"),
    "global_batch_size": applied(whole(1), "samples per step"),
    "rampup_batch_size": fixed((), "a step has model.global_batch_size samples throughout"),
    "tensor_model_parallel_size": applied(whole(1), "ranks that share a layer"),
    "pipeline_model_parallel_size": applied(whole(1), "ranks that share the layers out"),
    "virtual_pipeline_model_parallel_size": fixed((), "a pipeline stage is one piece"),
    "pipeline_model_parallel_split_rank": fixed((0,), "of encoder-decoder models"),
    "pipeline_model_parallel_comm_backend": fixed((), "it follows from the device"),
    **each("context_parallel_size expert_model_parallel_size", fixed((1,), "losses are not defined over split ones")),
    "use_tp_pp_dp_mapping": fixed((False,), "ranks are numbered tensor, data, pipeline"),
    **each(
        "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage",
        applied(whole(1), "layers of that stage"),
    ),
    **each(
        "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split",
        fixed((False,), "give num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage"),
    ),
    "sequence_parallel": applied(boolean, "norms and dropout split over tensor-parallel ranks"),
    **each("init_method_std use_scaled_init_method use_cpu_initialization", neutral(_FRESH)),
    "do_layer_norm_weight_decay": fixed((False,), "norms have no weight decay"),
    **each("pre_process post_process normalize_attention_scores", fixed((True,), _LLAMA)),
    **each("headscale openai_gelu rotary_interleaved apply_embedding_scaling megatron_legacy", fixed((False,), _LLAMA)),
    "transformer_block_type": fixed(("pre_ln",), _LLAMA),
    "attention_type": fixed(("multihead",), _LLAMA),
    "attention_backend": applied(choice("auto", "flash", "fused", "unfused", "local"), "of Transformer Engine"),
    "drop_layers": fixed(([],), "minitron prune prune.drop_layers=[…] removes layers"),
    **each("reset_lr reset_lr_steps", fixed((False,), "the first step would have a learning rate of 0")),
    "native_amp_init_scale": applied(number(above=0.0), "of trainer.precision=16: first scale of the loss"),
    "native_amp_growth_interval": applied(whole(1), "of trainer.precision=16: steps before it is doubled"),
    "hysteresis": applied(whole(1), "of trainer.precision=16: overflows before it is halved"),
    "fp32_residual_connection": fixed((False,), "not in Megatron-Core without half-precision weights"),
    "fp16_lm_cross_entropy": fixed((False,), _OWN_LOSS),
    "megatron_amp_O2": applied(
        boolean,
        "half-precision weights, with a copy in 32 bits on GPUs, off elsewhere; with adamw_8bit without one, anywhere",
    ),
    **each("cross_entropy_loss_fusion use_loss_mask", neutral(_OWN_LOSS)),
    "sample_weight": fixed(("token",), "every token of a batch counts alike"),
    **each(
        "grad_allreduce_chunk_size_mb async_grad_allreduce grad_div_ar_fusion gradient_accumulation_fusion "
        "bias_activation_fusion bias_dropout_add_fusion masked_softmax_fusion apply_rope_fusion persist_layer_norm "
        "overlap_p2p_comm batch_p2p_comm with_fp32_embedding_grads distributed_adam_bucket_merge_size "
        "gradient_as_bucket_view sync_batch_comm validation_param_sync_overlap transformer_engine "
        "use_flash_attention onnx_safe apex_transformer_log_level wgrad_deferral_limit",
        neutral(_SPEED),
    ),
    "get_attention_mask_from_fusion": fixed((True,), "masks are made in the attention kernel"),
    **each(
        "defer_embedding_wgrad_compute enable_cuda_graph use_te_rng_tracker cpu_offloading "
        "cpu_offloading_weights ub_tp_comm_overlap use_emha sharp enable_megatron_timers",
        fixed((False,), "not part of the training loop here"),
    ),
    **each(
        "cpu_offloading_num_layers cpu_offloading_activations ub_tp_comm_overlap_cfg ub_tp_comm_bootstrap_backend "
        "megatron_timer_kwargs",
        neutral("of switches that are not supported"),
    ),
    "seed": applied(None, "the command's own seed, and nothing else"),
    "nccl_communicator_config_path": applied(text, "of NeMo's strategy"),
    "gc_interval": applied(whole(0), "steps between garbage collections; 0 leaves it to Python"),
    "drop_last": fixed((True,), "batches are complete"),
    "fsdp": fixed((False,), "data-parallel ranks hold whole models; mcore_distributed_optim shares the optimizer out"),
    **each("fsdp_sharding_strategy fsdp_grad_reduce_dtype fsdp_sharded_checkpoint", neutral("of model.fsdp")),
    "dist_ckpt_format": fixed(("torch_dist",), "checkpoints are torch's distributed ones"),
    **each(
        "dist_ckpt_load_on_device dist_ckpt_parallel_save dist_ckpt_parallel_save_within_dp dist_ckpt_parallel_load "
        "dist_ckpt_assume_constant_structure dist_ckpt_parallel_dist_opt",
        applied(boolean, "how the ranks write and read a checkpoint"),
    ),
    "dist_ckpt_torch_dist_multiproc": applied(whole(1), "processes that write a checkpoint"),
    "dist_ckpt_load_strictness": applied(text, "what a checkpoint to go on from may lack"),
    "activations_checkpoint_granularity": applied(choice("selective", "full"), "what is computed again backward"),
    "activations_checkpoint_method": applied(choice("uniform", "block"), "of full: how layers are grouped"),
    "activations_checkpoint_num_layers": applied(whole(1), "of full: layers of a group"),
    **each(
        "num_micro_batches_with_partial_activation_checkpoints activations_checkpoint_layers_per_pipeline",
        fixed((), "every micro-batch and stage is treated alike"),
    ),
    "fp8": fixed((False,), "not supported"),
    **each(
        "fp8_e4m3 fp8_hybrid fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_params "
        "reduce_amax tp_only_amax_red skip_fp8_attention_checkpoint_load",
        neutral("of model.fp8"),
    ),
    "mcore_customization_config": fixed(({},), _LLAMA),
    "nsys_profile": {
        "enabled": fixed((False,), "start the command under nsys instead"),
        **each("start_step end_step ranks gen_shape trace", neutral("of model.nsys_profile.enabled")),
    },
    "data": DATA,
    "optim": OPTIM,
}
