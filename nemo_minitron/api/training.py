"""Calls that train: teacher correction, distillation, and a search, which distils what it finds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from nemo_minitron.api.arguments import Config, Text, beside, data, machine
from nemo_minitron.api.process import Settings, call
from nemo_minitron.api.results import Checkpoint, PathLike, SearchResult

VALIDATE_EVERY = 100
"""Steps between two looks at the validation data, where there are as many."""


def finetune(
    model: PathLike,
    train: Text,
    output: PathLike | None = None,
    *,
    validation: Text | None = None,
    seq_length: int | None = None,
    max_steps: int | None = None,
    micro_batch_size: int | None = None,
    global_batch_size: int | None = None,
    lr: float | None = None,
    devices: int | str | None = None,
    precision: int | str | None = None,
    resume: bool = False,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Checkpoint:
    """Train a model on text by next-token prediction: teacher correction.

    Args:
        model: ``.nemo`` file.
        train: token files to train on. validation: those that decide which model is best; ``train`` when None.
        output: the best model by validation loss, ``NAME.finetuned.nemo`` when None; checkpoints and logs go to a
            folder ``OUTPUT.logs`` beside it.
        seq_length: tokens of a sequence. max_steps: optimizer steps of ``global_batch_size`` sequences each.
        lr: learning rate at its highest.
        devices: processes on this machine. precision: 32, ``bf16`` or 16.
        resume: go on from the last checkpoint in the folder of logs.
    """
    output = beside(model, "finetuned") if output is None else Path(output)
    config = {"model.restore_from_path": model, "model.nemo_path": output}
    config |= _training(output, train, validation, max_steps)
    config |= _batches(seq_length, micro_batch_size, global_batch_size) | machine(devices, precision)
    with _logs(output, resume):
        call("finetune", config | {"model.optim.lr": lr}, settings, verbose=verbose)
    return Checkpoint(output)


def distill(
    student: PathLike,
    teacher: PathLike | None,
    train: Text,
    output: PathLike | None = None,
    *,
    teacher_cache: PathLike | None = None,
    loss: str | None = None,
    validation: Text | None = None,
    seq_length: int | None = None,
    max_steps: int | None = None,
    micro_batch_size: int | None = None,
    global_batch_size: int | None = None,
    lr: float | None = None,
    devices: int | str | None = None,
    precision: int | str | None = None,
    resume: bool = False,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Checkpoint:
    """Train a student to follow a teacher's predictions.

    Args:
        student, teacher: ``.nemo`` files of one vocabulary; no teacher where ``teacher_cache`` has all answers.
        output: ``NAME.distilled.nemo`` when None.
        teacher_cache: folder of the teacher's answers, written once and read by later calls on the same text.
        loss: how far the two are apart; ``sampled_kl`` with a ``teacher_cache`` and ``forward_kl`` without, when None.
            The others are as for :func:`finetune`.
    """
    output = beside(student, "distilled") if output is None else Path(output)
    config = {
        "model.restore_from_path": student,
        "model.kd_teacher_restore_from_path": teacher,
        "model.nemo_path": output,
        "distill.teacher_cache": teacher_cache,
        "distill.loss": "sampled_kl" if loss is None and teacher_cache is not None else loss,
    }
    config |= _training(output, train, validation, max_steps)
    config |= _batches(seq_length, micro_batch_size, global_batch_size) | machine(devices, precision)
    if teacher is None:  # said, for it is a key that must be
        settings = {"model.kd_teacher_restore_from_path": None} | dict(settings or {})
    with _logs(output, resume):
        call("distill", config | {"model.optim.lr": lr}, settings, verbose=verbose)
    return Checkpoint(output)


def search(
    model: PathLike | None,
    scores: PathLike,
    output: PathLike,
    *,
    num_parameters: float | None = None,
    memory_gib: float | None = None,
    latency_ms: float | None = None,
    shapes: Sequence[Mapping[str, int]] = (),
    train: Text | None = None,
    validation: PathLike | None = None,
    seq_length: int | None = None,
    micro_batch_size: int | None = None,
    global_batch_size: int | None = None,
    lr: float | None = None,
    devices: int | str | None = None,
    precision: int | str | None = None,
    settings: Settings | None = None,
    verbose: bool = False,
) -> SearchResult:
    """Find the best shape for a budget; a search that was stopped goes on where it was.

    Args:
        model: ``.nemo`` of the teacher; None predicts from the scores alone.
        scores: as :func:`importance` returns them.
        output: folder of candidates, plans and students.
        num_parameters, memory_gib, latency_ms: the budget: most parameters, memory of weights and KV cache, longest
            decoding step; all that are given hold.
        shapes: of your own, measured with the others: ``{"hidden_size": 512, "ffn_hidden_size": 1408}``.
        train: token files that candidates are distilled on. validation: those that losses are measured on.
            The others are as for :func:`finetune`.
    """
    config = {
        "model.restore_from_path": model,
        "scores": scores,
        "output_path": output,
        "budget.num_parameters": num_parameters,
        "budget.memory_gib": memory_gib,
        "budget.latency_ms": latency_ms,
        "search.shapes": [dict(shape) for shape in shapes],
        "evaluate.data_prefix": validation,
        "evaluate.seq_length": seq_length,
        "evaluate.micro_batch_size": micro_batch_size,
    }
    if train is not None:
        config |= _prefixes(train, validation)
    config |= _batches(seq_length, micro_batch_size, global_batch_size) | machine(devices, precision)
    call("search", config | {"model.optim.lr": lr}, settings, verbose=verbose)
    return SearchResult(Path(output))


@contextmanager
def _logs(output: Path, resume: bool) -> Iterator[None]:
    """Begin new logs where an earlier call's are not resumed. Those go once this call has some of its own, so that a
    mistake in its arguments costs no checkpoint."""
    logs = beside(output, "logs", "")
    if resume or not logs.exists():
        yield
        return
    earlier = logs.with_name(f".{logs.name}.earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    logs.rename(earlier)
    try:
        yield
    except BaseException:
        if not logs.exists():
            earlier.rename(logs)
        raise
    finally:
        shutil.rmtree(earlier, ignore_errors=True)


def _training(output: Path, train: Text, validation: Text | None, max_steps: int | None) -> Config:
    """Keys of data, steps and logs."""
    logs = beside(output, "logs", "")
    return _prefixes(train, validation) | {
        "model.data.index_mapping_dir": logs / "index",
        "trainer.max_steps": max_steps,
        "trainer.val_check_interval": None if max_steps is None else min(max_steps, VALIDATE_EVERY),
        "exp_manager.exp_dir": logs,
        "exp_manager.use_datetime_version": False,
        "exp_manager.resume_if_exists": True,  # of a folder that is new, nothing
    }


def _prefixes(train: Text, validation: Text | None) -> Config:
    """Key of both texts, each a weighted list."""
    parts = {"train": data(train), "validation": data(train if validation is None else validation)}
    return {
        "model.data.data_prefix": {name: [1.0, part] if isinstance(part, str) else part for name, part in parts.items()}
    }


def _batches(seq_length: int | None, micro_batch_size: int | None, global_batch_size: int | None) -> Config:
    """Keys of the sizes of a step."""
    return {
        "model.data.seq_length": seq_length,
        "model.micro_batch_size": micro_batch_size,
        "model.global_batch_size": global_batch_size,
    }
