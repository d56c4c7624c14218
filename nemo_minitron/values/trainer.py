"""What is done with every key of ``trainer`` and ``exp_manager``: Lightning's Trainer, NeMo's experiment manager."""

from __future__ import annotations

from nemo_minitron.values.rules import (
    Rules,
    applied,
    boolean,
    choice,
    duration,
    each,
    either,
    fixed,
    list_of,
    mapping,
    neutral,
    number,
    text,
    whole,
)

PRECISIONS = (32, "32", "32-true", "bf16", "bf16-mixed", 16, "16", "16-mixed")

FORWARD: Rules = {
    "devices": applied(
        lambda v: (
            None if v in (-1, "-1", "auto") or (str(v).isdecimal() and int(v)) else "a number of at least 1, -1 or auto"
        ),
        "processes on each machine; auto and -1 are every GPU",
    ),
    "num_nodes": applied(whole(1), "machines"),
    "accelerator": applied(choice("auto", "gpu", "cuda", "cpu"), "what there is runs: the GPU, else the CPU"),
    "precision": applied(choice(*PRECISIONS), "weights stay in 32 bits; bf16 and 16 multiply in half precision"),
}
"""Keys of ``trainer`` that matter to commands that only run a model forward; the others are theirs to ignore."""

MONITOR = "val_loss"
"""What NeMo's callbacks watch where nothing is said."""

TRAINER: Rules = FORWARD | {
    "strategy": fixed(("auto", "ddp"), "tensor, pipeline and data parallelism follow from model.*_parallel_size"),
    "logger": fixed((False,), "exp_manager makes the loggers: exp_manager.create_tensorboard_logger and the like"),
    "callbacks": fixed(([],), "a config cannot hold any; exp_manager makes the known ones"),
    "fast_dev_run": fixed((False, 0), "it would write no model; set trainer.max_steps to a few"),
    "max_epochs": applied(
        either(choice(-1), whole(1)), "trainer.max_steps comes first: an epoch of data is as long as the run"
    ),
    "min_epochs": fixed((0,), "an epoch of data is as long as the run; trainer.min_steps is what early stopping heeds"),
    "max_steps": applied(whole(1), "optimizer steps of the run; data are repeated as often as it takes", needed=True),
    "min_steps": applied(whole(0), "steps that early stopping waits for; not more than trainer.max_steps"),
    "max_time": applied(duration, "stops the run after this time, DAYS:HOURS:MINUTES:SECONDS"),
    "limit_train_batches": fixed((1.0,), "the length of a run is trainer.max_steps"),
    "limit_val_batches": applied(
        either(whole(0), number(above=0.0, below=1.0000001)),
        "global batches of each validation, or the share of all that there are; 0 for no validation",
    ),
    **each("limit_test_batches limit_predict_batches", neutral("nothing is tested here; minitron evaluate measures")),
    "overfit_batches": fixed((0, 0.0), "give a small data set by model.data.data_prefix"),
    "val_check_interval": applied(
        either(whole(1), number(above=0.0, below=1.0000001)),
        "steps between validations, or their share of trainer.max_steps",
    ),
    "check_val_every_n_epoch": fixed((1,), "an epoch is as long as the run; trainer.val_check_interval counts steps"),
    "num_sanity_val_steps": applied(either(choice(-1), whole(0)), "validation batches before the first step"),
    "log_every_n_steps": applied(whole(1), "steps between lines of the logs"),
    "enable_checkpointing": fixed((False,), "exp_manager.create_checkpoint_callback makes checkpoints"),
    "enable_progress_bar": applied(boolean, "shows the line of progress; false: none at all"),
    "enable_model_summary": fixed((False,), "the sizes of a model are told by minitron evaluate and report"),
    "accumulate_grad_batches": fixed(
        (1,), "gradients are accumulated over model.global_batch_size / (micro_batch_size x data-parallel ranks)"
    ),
    "gradient_clip_val": applied(number(0.0), "largest norm of all gradients together; 0 for none"),
    "gradient_clip_algorithm": fixed(("norm",), "trainer.gradient_clip_val is a norm over all ranks"),
    "deterministic": applied(choice(True, False, "warn"), "torch's deterministic algorithms alone"),
    "benchmark": applied(boolean, "cuDNN tries its algorithms"),
    "inference_mode": applied(boolean, "validation in torch's inference mode"),
    **each("use_distributed_sampler replace_sampler_ddp", fixed((False,), "NeMo's samplers share the data out")),
    "profiler": fixed((), "its table would not be shown; use an outside profiler, for instance nsys or py-spy"),
    "detect_anomaly": applied(boolean, "torch's anomaly detection"),
    "barebones": fixed((False,), "it would leave no logs"),
    "plugins": fixed(([],), "they follow from trainer.precision"),
    "sync_batchnorm": fixed((False,), "there is no batch norm here"),
    "reload_dataloaders_every_n_epochs": fixed((0,), "an epoch is as long as the run"),
    "default_root_dir": fixed((), "exp_manager.exp_dir or exp_manager.explicit_log_dir says where a run writes"),
}

_OTHER_LOGGERS = "loggers here are TensorBoard, CSV, Weights & Biases and MLflow"

AGREEMENT = "top1_agreement"
"""Name of the logged share of tokens on which student and teacher agree: of all that is logged after a validation, more
is better of it alone."""

CHECKPOINT: Rules = {
    "filepath": fixed((), "NeMo's old name: dirpath and filename took its place"),
    "dirpath": applied(text, "folder of the checkpoints; checkpoints/ in the run's folder when null"),
    "filename": applied(text, "name of a checkpoint; {NAME} stands for a logged value"),
    "monitor": applied(text, "logged value by which the best are kept", needed=True),
    "mode": applied(choice("min", "max"), "whether less or more of it is better", needed=True),
    "save_top_k": applied(whole(-1), "how many of the best to keep; -1 for all", needed=True),
    "save_last": applied(boolean, "keep the last one too, which is what resuming needs"),
    "save_weights_only": fixed((False,), "a checkpoint is for resuming; weights alone are in model.nemo_path"),
    "verbose": neutral("NeMo's own messages are not shown"),
    "auto_insert_metric_name": applied(boolean, "write NAME= before a value in filename"),
    "every_n_epochs": fixed((1, 0), "checkpoints follow validations, or every_n_train_steps"),
    "every_n_train_steps": applied(whole(0), "checkpoints at every n-th step instead of after validations"),
    "train_time_interval": fixed((), "give every_n_train_steps"),
    "prefix": fixed((), "NeMo's old name; filename has it all"),
    "postfix": neutral("of .nemo files that NeMo would write; model.nemo_path is written by the command itself"),
    **each(
        "save_best_model always_save_nemo save_nemo_on_train_end",
        fixed((False,), "model.nemo_path is written by the command itself: the best, and the last beside it"),
    ),
    "model_parallel_size": neutral("it follows from model.*_parallel_size"),
    "save_on_train_epoch_end": fixed((False,), "an epoch is as long as the run"),
    "async_save": fixed((False,), "checkpoints are complete before training goes on"),
    "save_last_n_optim_states": fixed((-1,), "a checkpoint without optimizer cannot be resumed from"),
}

EARLY_STOPPING: Rules = {
    "monitor": applied(text, "logged value of a validation that must improve"),
    "mode": applied(choice("min", "max"), "whether less or more of it is better"),
    "min_delta": applied(number(0.0), "least change that is an improvement"),
    "patience": applied(whole(1), "validations without one that end the run"),
    **each("strict check_finite log_rank_zero_only", applied(boolean, "as Lightning's EarlyStopping has it")),
    "verbose": neutral("Lightning's own messages are not shown"),
    **each("stopping_threshold divergence_threshold", applied(number(), "ends the run beyond this value")),
    "check_on_train_epoch_end": fixed((False,), "an epoch is as long as the run; validations are what is looked at"),
}

WANDB = (
    "project name entity offline save_dir dir id anonymous prefix checkpoint_name notes tags config "
    "config_exclude_keys config_include_keys allow_val_change group job_type mode force reinit resume resume_from "
    "fork_from save_code sync_tensorboard monitor_gym settings"
)
MLFLOW: Rules = {
    "experiment_name": applied(text, "experiment; exp_manager.name when null"),
    "run_name": applied(text, "run; the version of the run's folder when null"),
    "tracking_uri": applied(text, "server or file:FOLDER; save_dir when null"),
    "save_dir": applied(text, "folder where there is no tracking_uri"),
    "tags": applied(mapping, "tags of the run"),
    "prefix": applied(lambda v: None if isinstance(v, str) else "text", "of every value's name"),
    "artifact_location": applied(text, "where the experiment's files go"),
    "run_id": applied(text, "run to go on with"),
    "log_model": fixed((False,), "checkpoints are folders of shards; upload model.nemo_path yourself"),
}
WANDB_KWARGS: Rules = each(WANDB, applied(None, "as wandb.init has it")) | {
    "project": applied(text, "project; must be given"),
    "offline": applied(boolean, "keep the run on this machine; as WANDB_MODE=offline"),
    "mode": applied(choice("online", "offline", "disabled", "shared"), "as wandb.init has it"),
    "log_model": fixed((False,), "checkpoints are folders of shards; upload model.nemo_path yourself"),
    "version": fixed((), "exp_manager.version is it"),
    "experiment": fixed((), "a config cannot hold one"),
}

EXP_MANAGER: Rules = {
    "explicit_log_dir": applied(text, "folder of this very run, whatever exp_dir and version say"),
    "exp_dir": applied(text, "folder of runs, each in NAME/VERSION; ./nemo_experiments when null"),
    "name": applied(text, "name of the run"),
    "version": applied(either(text, whole(0)), "folder of the run below its name; the time when null"),
    "use_datetime_version": applied(boolean, "name that folder by the time, not by a number"),
    "resume_if_exists": applied(boolean, "go on from the last checkpoint of the folder"),
    "resume_past_end": applied(boolean, "go on from a checkpoint that says the run has ended"),
    "resume_ignore_no_checkpoint": applied(boolean, "start anew where there is none"),
    "resume_from_checkpoint": applied(text, "checkpoint to go on from"),
    "create_tensorboard_logger": applied(boolean, "log to TensorBoard; a CSV table is always written"),
    "summary_writer_kwargs": each(
        "max_queue flush_secs filename_suffix comment purge_step prefix sub_dir default_hp_metric log_graph",
        applied(None, "as torch's SummaryWriter has it"),
    )
    | {"log_dir": fixed((), "the run's folder is it")},
    "create_wandb_logger": applied(boolean, "log to Weights & Biases: pip install 'nemo_minitron[wandb]'"),
    "wandb_logger_kwargs": WANDB_KWARGS,
    "create_mlflow_logger": applied(boolean, "log to MLflow: pip install 'nemo_minitron[mlflow]'"),
    "mlflow_logger_kwargs": MLFLOW,
    **each("create_dllogger_logger create_clearml_logger create_neptune_logger", fixed((False,), _OTHER_LOGGERS)),
    **each("dllogger_logger_kwargs clearml_logger_kwargs neptune_logger_kwargs", neutral(_OTHER_LOGGERS)),
    "create_checkpoint_callback": applied(boolean, "write checkpoints to resume from"),
    "checkpoint_callback_params": CHECKPOINT,
    "create_early_stopping_callback": applied(boolean, "end the run when a value no longer improves"),
    "early_stopping_callback_params": EARLY_STOPPING,
    "create_preemption_callback": applied(boolean, "on GPUs, write a checkpoint at SIGTERM"),
    "files_to_copy": applied(list_of(text), "files copied to the run's folder"),
    "log_step_timing": applied(boolean, "log the seconds of a step"),
    "log_delta_step_timing": fixed((False,), "it prints to a log that is not shown; take log_step_timing"),
    "step_timing_kwargs": {
        "reduction": applied(choice("mean", "sum", "min", "max", "none"), "over buffer_size steps"),
        "sync_cuda": applied(boolean, "wait for the GPU first"),
        "buffer_size": applied(whole(1), "steps that are averaged over"),
    },
    **each("log_local_rank_0_only log_global_rank_0_only", applied(boolean, "which ranks write NeMo's log; not both")),
    "disable_validation_on_resume": applied(boolean, "do not repeat the validation that a checkpoint was written at"),
    "ema": {
        "enable": fixed((False,), "model.nemo_path holds the trained weights, not their average"),
        **each("decay cpu_offload validate_original_weights every_n_steps", neutral("there is no average of weights")),
    },
    "max_time_per_run": applied(duration, "stops this start of the run after a time, DAYS:HOURS:MINUTES:SECONDS"),
    "seconds_to_sleep": applied(number(0.0), "wait of other ranks while the first makes the folder"),
    "create_straggler_detection_callback": fixed((False,), "NVIDIA's resiliency package is not part of this"),
    "create_fault_tolerance_callback": fixed((False,), "NVIDIA's resiliency package is not part of this"),
    **each("straggler_detection_params fault_tolerance", neutral("NVIDIA's resiliency package is not part of this")),
    "log_tflops_per_sec_per_gpu": fixed((False,), "tokens_per_second is logged"),
}
