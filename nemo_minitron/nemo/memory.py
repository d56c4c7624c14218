"""Memory of a configured distillation, said before anything is built (``minitron distill plan_only=true``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron import runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.config.grid import Grid, Machines
from nemo_minitron.config.schema import DistillConfig
from nemo_minitron.distill.memory import ITEMS, Run, largest_micro_batch, memory
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.model.shape import ModelShape


def plan_memory(cfg: DistillConfig) -> str:
    """Table of a rank's memory by item at the configured grid and batch, and the largest micro-batch that fits.

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
    grid, machines = Grid.of(cfg.model), Machines.of(cfg.trainer)
    ranks = machines.devices * machines.num_nodes
    if ranks % (grid.tensor * grid.pipeline):
        raise MinitronError(
            f"trainer.devices x trainer.num_nodes ({ranks}) must be a multiple of model.tensor_model_parallel_size "
            f"({grid.tensor}) x model.pipeline_model_parallel_size ({grid.pipeline})"
        )
    run = _run(cfg, student, teacher, grid, grid.data_ranks(ranks), machines.half)
    available = runtime.memory_bytes() if runtime.has_cuda() else runtime.memory_bytes() * machines.num_nodes // ranks
    return _table(run, available)


def _shape(path: str) -> ModelShape:
    with NemoReader(Path(path)) as reader:
        return reader.shape


def _run(
    cfg: DistillConfig, student: ModelShape, teacher: ModelShape | None, grid: Grid, data_ranks: int, half: bool
) -> Run:
    from nemo_minitron.nemo.spec import has_transformer_engine

    model: Mapping[str, Any] = cfg.model
    on_gpu, mib = runtime.has_cuda(), cfg.distill.loss_memory_mib
    micro = int(model["micro_batch_size"])
    return Run(
        student=student,
        teacher=teacher,
        seq_length=int(model["data"]["seq_length"]),
        micro_batch_size=micro,
        micro_batches=max(1, int(model["global_batch_size"]) // (micro * data_ranks)),
        tensor_parallel=grid.tensor,
        pipeline_parallel=grid.pipeline,
        data_parallel=data_ranks,
        sequence_parallel=grid.sequence_parallel,
        half=half,
        half_weights=half and bool(model.get("megatron_amp_O2")) and on_gpu,
        sharded_optimizer=str(model["optim"]["name"]) in ("distributed_fused_adam", "mcore_distributed_optim"),
        recompute=model.get("activations_checkpoint_granularity") == "full",
        fused_norms=on_gpu and has_transformer_engine(),
        device="cuda" if on_gpu else "cpu",
        process=0 if on_gpu else runtime.resident_bytes(),
        loss_memory=None if mib is None else mib << 20,
    )


def _table(run: Run, available: int) -> str:
    items = memory(run)
    lines = [
        f"memory per rank at TP {run.tensor_parallel} x PP {run.pipeline_parallel} x DP {run.data_parallel}, "
        f"micro-batch {run.micro_batch_size} x {run.seq_length} tokens"
    ]
    lines += [f"  {name:<12}{items[name] / 2**20:>12,.0f} MiB" for name in ITEMS]
    lines += [f"  {'in all':<12}{sum(items.values()) / 2**20:>12,.0f} MiB of {available / 2**20:,.0f}"]
    largest = largest_micro_batch(run, available)
    lines.append(f"largest micro-batch that fits: {largest}" if largest else "no micro-batch fits")
    return "\n".join(lines)
