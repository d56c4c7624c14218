"""Memory and time of a configured distillation, said before anything is built (``minitron distill plan_only=true``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_minitron import runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.config.grid import Grid, Machines
from nemo_minitron.config.schema import DistillConfig, FinetuneConfig
from nemo_minitron.distill import cards, duration
from nemo_minitron.distill.memory import CUDA_PROCESS, ITEMS, largest_micro_batch, memory
from nemo_minitron.distill.run import Run
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.values.model import DISTRIBUTED, LEAN


def plan_memory(cfg: DistillConfig) -> str:
    """Table of a rank's memory by item at the configured grid and batch, and the largest micro-batch that fits; then
    what would fit on GPUs of several sizes, whatever this machine has, and how long the run would take on those of
    which there are measured rates.

    On a machine without CUDA the process itself is counted, and what fits is measured against this machine's memory
    shared by the ranks that run on it.

    Raises:
        MinitronError: a checkpoint is missing or unreadable; processes that the grid does not divide.
    """
    from nemo_minitron.nemo import training  # noqa: F401  what a run imports is part of its memory

    student = _shape(required(cfg, "model.restore_from_path"))
    teacher = None
    if cfg.distill.teacher_cache is None:
        teacher = _shape(required(cfg, "model.kd_teacher_restore_from_path"))
    run = run_of(cfg, student, teacher, runtime.has_cuda())
    available = runtime.memory_bytes() // (1 if runtime.has_cuda() else Machines.of(cfg.trainer).devices)
    parts = [_table(run, available), cards.table(run)]
    if (steps := int(cfg.trainer.get("max_steps") or 0)) > 0:
        parts.append(duration.table(run, steps, torch.cuda.get_device_name() if runtime.has_cuda() else None))
    return "\n\n".join(parts)


def run_of(cfg: FinetuneConfig | DistillConfig, student: ModelShape, teacher: ModelShape | None, on_gpu: bool) -> Run:
    """What decides the memory of one rank of a configured training, on a GPU or on this machine's CPU.

    Raises:
        MinitronError: processes that the grid does not divide; a grid that the optimizer cannot go with.
    """
    from nemo_minitron.nemo.spec import has_transformer_engine

    model: Mapping[str, Any] = cfg.model
    data: Mapping[str, Any] = model["data"]
    grid, machines = Grid.of(model), Machines.of(cfg.trainer)
    ranks = machines.devices * machines.num_nodes
    if ranks % (grid.tensor * grid.pipeline):
        raise MinitronError(
            f"trainer.devices x trainer.num_nodes ({ranks}) must be a multiple of model.tensor_model_parallel_size "
            f"({grid.tensor}) x model.pipeline_model_parallel_size ({grid.pipeline})"
        )
    micro, data_ranks = int(model["micro_batch_size"]), grid.data_ranks(ranks)
    optimizer = str(model["optim"]["name"])
    lean = optimizer == LEAN
    if lean and grid.tensor * grid.pipeline > 1:
        raise MinitronError(
            f"model.optim.name={LEAN} needs tensor and pipeline size 1, found {grid.tensor} and {grid.pipeline}"
        )
    mib = cfg.distill.loss_memory_mib if isinstance(cfg, DistillConfig) else None
    return Run(
        student=student,
        teacher=teacher,
        seq_length=int(data["seq_length"]),
        micro_batch_size=micro,
        micro_batches=max(1, int(model["global_batch_size"]) // (micro * data_ranks)),
        tensor_parallel=grid.tensor,
        pipeline_parallel=grid.pipeline,
        data_parallel=data_ranks,
        sequence_parallel=grid.sequence_parallel,
        half=machines.half,
        half_weights=machines.half and bool(model.get("megatron_amp_O2")) and (on_gpu or lean),
        sharded_optimizer=optimizer in DISTRIBUTED,
        lean=lean,
        recompute=model.get("activations_checkpoint_granularity") == "full",
        recompute_block=model.get("activations_checkpoint_method") == "block",
        recompute_layers=int(model.get("activations_checkpoint_num_layers") or 1),
        documents_apart=bool(data.get("reset_attention_mask")),
        positions_restart=bool(data.get("reset_position_ids")),
        fused_norms=on_gpu and has_transformer_engine(),
        fused_swiglu=on_gpu and model.get("bias_activation_fusion") is not False,
        device="cuda" if on_gpu else "cpu",
        process=CUDA_PROCESS if on_gpu else runtime.resident_bytes(),
        loss_memory=None if mib is None else mib << 20,
    )


def _shape(path: str) -> ModelShape:
    with NemoReader(Path(path)) as reader:
        return reader.shape


def _table(run: Run, available: int) -> str:
    items = memory(run)
    lines = [
        f"memory per rank at TP {run.tensor_parallel} x PP {run.pipeline_parallel} x DP {run.data_parallel}, "
        f"micro-batch {run.micro_batch_size} x {run.seq_length} tokens"
    ]
    lines += [f"  {name:<12}{items[name] / 2**20:>12,.0f} MiB" for name in ITEMS]
    whole = sum(items.values())
    if run.device == "cuda":  # torch.cuda.max_memory_allocated()
        lines.append(f"  {'allocated':<12}{(whole - items['process']) / 2**20:>12,.0f} MiB, all but the process")
    lines += [f"  {'in all':<12}{whole / 2**20:>12,.0f} MiB of {available / 2**20:,.0f}"]
    largest = largest_micro_batch(run, available)
    lines.append(f"largest micro-batch that fits: {largest}" if largest else "no micro-batch fits")
    return "\n".join(lines)
