"""What the ranks of a grid do in ``test_grids.py``."""

from __future__ import annotations

import contextlib
import csv
import importlib
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nemo_minitron import runtime
from nemo_minitron.config.compose import configure
from nemo_minitron.config.sections import Distill
from tests.zygote import end_children

MICRO, LENGTH = 2, 32


def settings(tp: int, pp: int, sp: bool, global_batch: int = 8) -> dict[str, Any]:
    """The run's ``model`` section for a grid."""
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "sequence_parallel": sp,
        "micro_batch_size": MICRO,
        "global_batch_size": global_batch,
        "encoder_seq_length": LENGTH,
        "optim": {"name": "adamw"},
    }


def batches(blocks: torch.Tensor, mask: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """This data-parallel rank's micro-batches of one global batch, as NeMo's loader gives them."""
    from megatron.core import parallel_state

    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    parts = list(zip(blocks.split(MICRO), mask.split(MICRO), strict=True))[rank::ranks]
    positions = torch.arange(LENGTH).expand(MICRO, -1)
    return [{"tokens": b[:, :-1], "labels": b[:, 1:], "loss_mask": m, "position_ids": positions} for b, m in parts]


def distillation_step(
    teacher: str, student: str, grid: tuple[int, int, bool], blocks: torch.Tensor, mask: torch.Tensor, distill: dict
) -> tuple[float, dict, dict]:
    """Loss, named terms and canonical gradients of one training step, all reductions as in training."""
    from nemo_minitron.nemo import weights
    from nemo_minitron.nemo.distillation import MinitronDistillModel
    from nemo_minitron.nemo.restore import load_model
    from nemo_minitron.nemo.trainer import inference_trainer

    trainer = inference_trainer(devices=runtime.world_size())
    model = load_model(student, trainer, settings(*grid, global_batch=len(blocks)), MinitronDistillModel)
    model.set_teacher(teacher, Distill(**distill))
    logged: dict[str, float] = {}
    model.log = lambda name, value, **_: logged.__setitem__(name, float(value))  # type: ignore[method-assign]
    model._optimizer = SimpleNamespace(zero_grad=lambda: None, param_groups=[{"lr": 0.0}])
    model.init_consumed_samples, model.init_global_step = 0, 0
    loss = model.training_step(iter(batches(blocks, mask)))
    gradients = {(p.key, layer): t.clone() for p, layer, t in weights.gather(model, lambda p: p.grad)}
    return float(loss), logged, gradients


def scores_and_student(source: str, prefix: str, folder: str, grid: tuple[int, int, bool], sizes: list[str]) -> None:
    """``importance`` and ``prune`` to ``sizes`` at a grid, into ``folder``."""
    tp, pp, sp = grid
    common = [
        f"model.restore_from_path={source}",
        f"model.tensor_model_parallel_size={tp}",
        f"model.pipeline_model_parallel_size={pp}",
        f"++model.sequence_parallel={sp}",
        f"trainer.devices={runtime.world_size()}",
    ]
    from nemo_minitron.stages import importance, prune

    calibration = [f"calibration.data_prefix={prefix}", "calibration.num_samples=8", f"calibration.seq_length={LENGTH}"]
    importance.run(configure("importance", [*common, *calibration, f"output_path={folder}/scores"]))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first rank writes the scores; as commands, all ranks of the one end first
    files = [f"prune.scores={folder}/scores", f"export.save_path={folder}/student.nemo"]
    prune.run(configure("prune", [*common, *files, *(f"prune.{size}" for size in sizes)]))


def evaluate(source: str, prefix: str, folder: str, grid: tuple[int, int, bool]) -> float:
    """``evaluate`` at a grid; its val_loss as each rank has it."""
    from nemo_minitron.stages import evaluate as stage

    tp, pp, sp = grid
    options = [
        f"model.restore_from_path={source}",
        f"evaluate.data_prefix={prefix}",
        f"evaluate.seq_length={LENGTH}",
        "evaluate.num_samples=13",
        "evaluate.micro_batch_size=2",
        f"model.tensor_model_parallel_size={tp}",
        f"model.pipeline_model_parallel_size={pp}",
        f"++model.sequence_parallel={sp}",
        f"trainer.devices={runtime.world_size()}",
    ]
    return stage.run(configure("evaluate", [*options, f"output_path={folder}/out.json"]))["val_loss"]


def evaluate_speed(source: str, prefix: str, folder: str, grid: tuple[int, int]) -> dict[str, Any]:
    """``evaluate`` with all that it measures itself; its metrics as each rank has them."""
    from nemo_minitron.stages import evaluate as stage

    options = [
        f"model.restore_from_path={source}",
        f"evaluate.data_prefix={prefix}",
        f"evaluate.seq_length={LENGTH}",
        "evaluate.num_samples=2",
        "evaluate.throughput=true",
        "evaluate.energy=true",
        "evaluate.batch_size=2",
        "evaluate.prefill_tokens=16",
        "evaluate.decode_tokens=4",
        f"model.tensor_model_parallel_size={grid[0]}",
        f"model.pipeline_model_parallel_size={grid[1]}",
        f"trainer.devices={runtime.world_size()}",
        f"output_path={folder}/out.json",
    ]
    return stage.run(configure("evaluate", options))


def decode(source: str, tokens: list[list[int]], prompt: int, grid: tuple[int, int]) -> list | None:
    """``[b, s, Vp]`` logits of ``tokens``, ``prompt`` of them read at once and the rest one by one."""
    from megatron.core.inference.contexts import StaticInferenceContext

    from nemo_minitron.evaluate.throughput import step
    from nemo_minitron.nemo.restore import load_model
    from nemo_minitron.nemo.trainer import inference_trainer

    given = torch.tensor(tokens)
    model = load_model(source, inference_trainer(devices=runtime.world_size()), settings(*grid, False))
    model.get_model_module_list()[0].eval()
    context = StaticInferenceContext(*given.shape)
    passes = [given[:, :prompt], *given[:, prompt:].split(1, dim=1)]
    logits = [step(model, part, context) for part in passes]
    return None if logits[0] is None else torch.cat([part for part in logits if part is not None], dim=1).tolist()


def train(
    command: str,
    source: str,
    prefix: str,
    folder: str,
    grid: tuple[int, int, bool],
    steps: int = 10,
    extra: tuple[str, ...] = (),
    die_at: int | None = None,
) -> None:
    """``finetune`` or ``distill`` at a grid, into ``folder``; ``die_at`` ends every rank without a word at a step."""
    from nemo_minitron.nemo.model import MinitronGPTModel

    def on_train_batch_start(self: Any, *_: Any) -> None:
        if self.trainer.global_step == die_at:
            end_children()
            os._exit(9)

    if die_at is not None:
        MinitronGPTModel.on_train_batch_start = on_train_batch_start  # this process is the test's own
    tp, pp, sp = grid
    stage = importlib.import_module(f"nemo_minitron.stages.{command}")
    stage.run(
        configure(
            command,
            [
                f"model.restore_from_path={source}",
                f"model.nemo_path={folder}/trained.nemo",
                f"model.tensor_model_parallel_size={tp}",
                f"model.pipeline_model_parallel_size={pp}",
                f"model.sequence_parallel={sp}",
                f"model.data.data_prefix={{train: [{prefix}], validation: [{prefix}]}}",
                f"model.data.seq_length={LENGTH}",
                f"model.data.index_mapping_dir={folder}/index",
                f"model.micro_batch_size={MICRO}",
                "model.global_batch_size=8",
                "model.optim.lr=1e-3",
                f"trainer.devices={runtime.world_size()}",
                f"trainer.max_steps={steps}",
                f"trainer.val_check_interval={steps}",
                "trainer.limit_val_batches=1",
                "trainer.log_every_n_steps=1",
                "++trainer.enable_progress_bar=false",
                f"exp_manager.exp_dir={folder}/exp",
                "++exp_manager.use_datetime_version=false",
                "exp_manager.create_checkpoint_callback=false",
                *extra,
            ],
        )
    )


def train_aloud(said: str, *args: Any) -> None:
    """:func:`train`, whose words go to the file ``said``."""
    with open(said, "w", buffering=1) as stream, contextlib.redirect_stdout(stream):
        train(*args)


def train_killed(step: int, writing: bool, delay: float, said: str, *args: Any) -> None:
    """:func:`train_aloud`, ended by SIGKILL with all its processes ``delay`` seconds after it begins a step, or, with
    ``writing``, after it begins to write a checkpoint of that step or a later one."""
    from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint

    from nemo_minitron.nemo.model import MinitronGPTModel

    def die() -> None:
        time.sleep(delay)
        for child in multiprocessing.active_children():
            child.kill()
        os.kill(os.getpid(), signal.SIGKILL)

    def arm() -> None:
        if not armed:
            armed.append(threading.Thread(target=die, daemon=True))
            armed[0].start()

    def on_train_batch_start(self: Any, *_: Any) -> None:
        if not writing and self.trainer.global_step >= step:
            arm()

    def mark(path: Any, **options: Any) -> None:
        before(path, **options)
        if writing and int(str(path).split("step=")[1].split("-")[0]) >= step:
            arm()

    armed: list[threading.Thread] = []
    before = NeMoModelCheckpoint.set_checkpoint_unfinished_marker
    NeMoModelCheckpoint.set_checkpoint_unfinished_marker = staticmethod(mark)
    MinitronGPTModel.on_train_batch_start = on_train_batch_start
    train_aloud(said, *args)


def curve(folder: Path, column: str = "train_lm_loss") -> dict[int, float]:
    """A logged loss by step, of the last run in ``folder``."""
    path = max(folder.glob("exp/**/csv/metrics.csv"), key=lambda found: found.stat().st_mtime)
    with path.open() as stream:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(stream) if row.get(column)}
