"""``minitron distill``: teach a pruned student by the logits of the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_minitron.errors import MinitronError, required


def run(cfg: DictConfig) -> None:
    """Distil ``model.kd_teacher_restore_from_path`` into ``model.restore_from_path``, write ``model.nemo_path``; or,
    with ``plan_only``, say what memory that would take."""
    if cfg.get("plan_only"):
        print(plan_memory(cfg))
        return
    from nemo_minitron.nemo.distillation import MinitronDistillModel
    from nemo_minitron.nemo.training import train

    train(cfg, MinitronDistillModel, monitor=cfg.distill.get("monitor", "val_loss"))


def plan_memory(cfg: DictConfig) -> str:
    """Table of a rank's memory by item at the configured grid and batch, and the largest micro-batch that fits.

    On a machine without CUDA the process itself is counted, and what fits is measured against this machine's memory
    shared by the ranks that run on it.
    """
    from nemo_minitron import runtime
    from nemo_minitron.checkpoint import NemoReader
    from nemo_minitron.distill.memory import ITEMS, Run, largest_micro_batch, memory
    from nemo_minitron.nemo import training  # noqa: F401  what a run imports is part of its memory
    from nemo_minitron.nemo.spec import has_transformer_engine

    with NemoReader(required(cfg, "model.restore_from_path")) as reader:
        student = reader.shape
    path, teacher = cfg.model.get("kd_teacher_restore_from_path"), None
    if cfg.distill.get("teacher_cache") is None:
        path = required(cfg, "model.kd_teacher_restore_from_path")
        with NemoReader(Path(path)) as reader:
            teacher = reader.shape
    model: Any = cfg.model
    tensor, pipeline = (int(model.get(f"{k}_model_parallel_size") or 1) for k in ("tensor", "pipeline"))
    devices, nodes = cfg.trainer.get("devices") or 1, int(cfg.trainer.get("num_nodes") or 1)
    ranks = (int(devices) if str(devices).isdigit() else 1) * nodes
    if ranks % (tensor * pipeline):
        raise MinitronError(
            f"trainer.devices x trainer.num_nodes ({ranks}) must be a multiple of model.tensor_model_parallel_size "
            f"({tensor}) x model.pipeline_model_parallel_size ({pipeline})"
        )
    data, micro = ranks // (tensor * pipeline), int(model.micro_batch_size)
    half = str(cfg.trainer.get("precision", 32)).startswith("bf16")
    on_gpu = runtime.has_cuda()
    mib = cfg.distill.get("loss_memory_mib")
    run = Run(
        student=student,
        teacher=teacher,
        seq_length=int(model.data.seq_length),
        micro_batch_size=micro,
        micro_batches=max(1, int(model.global_batch_size) // (micro * data)),
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        data_parallel=data,
        sequence_parallel=bool(model.get("sequence_parallel")),
        half=half,
        half_weights=half and bool(model.get("megatron_amp_O2")) and on_gpu,
        sharded_optimizer=str(model.optim.name) in ("distributed_fused_adam", "mcore_distributed_optim"),
        recompute=model.get("activations_checkpoint_granularity") == "full",
        fused_norms=on_gpu and has_transformer_engine(),
        device="cuda" if on_gpu else "cpu",
        process=0 if on_gpu else runtime.resident_bytes(),
        loss_memory=None if mib is None else int(mib) << 20,
    )
    items = memory(run)
    available = runtime.memory_bytes() if on_gpu else runtime.memory_bytes() * nodes // ranks
    lines = [
        f"memory per rank at TP {tensor} x PP {pipeline} x DP {data}, micro-batch {micro} x {run.seq_length} tokens"
    ]
    lines += [f"  {name:<12}{items[name] / 2**20:>12,.0f} MiB" for name in ITEMS]
    lines += [f"  {'in all':<12}{sum(items.values()) / 2**20:>12,.0f} MiB of {available / 2**20:,.0f}"]
    largest = largest_micro_batch(run, available)
    lines.append(f"largest micro-batch that fits: {largest}" if largest else "no micro-batch fits")
    return "\n".join(lines)
