"""The stages as Python functions: ``import nemo_minitron as nm; nm.prune("teacher.nemo", ffn_hidden_size=1024)``.

Each function is a command of ``minitron`` with its common keys as arguments. It runs in a process of its own, prints
nothing unless ``verbose=True``, and returns what it wrote. Any other key of the command is given by its dotted name:
``settings={"model.tensor_model_parallel_size": 2}``. What a user can mend is raised as
:class:`nemo_minitron.errors.MinitronError`, anything else as :class:`RuntimeError` with the command's last lines.

    import nemo_minitron as nm

    teacher = nm.convert("Llama-3.2-1B", "teacher.nemo")
    text = nm.preprocess("articles.jsonl", "data/articles", tokenizer=teacher)
    scores = nm.importance(teacher, text, seq_length=512)
    student = nm.prune(teacher, scores=scores, ffn_hidden_size=6144)
    better = nm.distill(student, teacher, text, seq_length=512, max_steps=100)
    print(nm.evaluate(better, text, seq_length=512).loss)
    print(nm.generate(better, "The capital of France is"))
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.api.process import Settings, call
from nemo_minitron.api.results import Checkpoint, Evaluation, PathLike, Run, Scores, Student, Tokens
from nemo_minitron.config.words import word

__all__ = [
    "Checkpoint",
    "Evaluation",
    "Run",
    "Scores",
    "Student",
    "Tokens",
    "convert",
    "distill",
    "evaluate",
    "finetune",
    "generate",
    "importance",
    "preprocess",
    "prune",
    "run",
]

Config = dict[str, Any]
VALIDATE_EVERY = 100
"""Steps between two looks at the validation data, where there are as many."""

Text = PathLike | Sequence[float | PathLike]
"""A prefix of token files, or several, each behind its weight: ``[0.7, "data/books", 0.3, "data/code"]``."""


def convert(
    source: PathLike,
    output: PathLike,
    *,
    format: str | None = None,
    precision: str | None = None,
    verify: bool = False,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Checkpoint:
    """Write a checkpoint of one format as another, one tensor at a time.

    Args:
        source: HF folder, GGUF, ``.nemo`` or Megatron folder; or ``ORG/NAME`` on the hub.
        output: ``.nemo`` or ``.gguf`` file, or a folder.
        format: of a folder: ``hf``, ``bridge``, ``megatron`` or ``nemo2``; HF when None.
        precision: ``32``, ``bf16`` or ``16``; the source's own when None.
        verify: read the result again and compare every tensor.

    Returns:
        The result; :attr:`Checkpoint.shape` reads that of a ``.nemo``.
    """
    config = {"input_name_or_path": source, "output_path": output, "format": format, "precision": precision}
    call("convert", {**config, "verify": verify}, settings, verbose=verbose)
    return Checkpoint(Path(output))


def preprocess(
    source: PathLike,
    output_prefix: PathLike,
    *,
    tokenizer: PathLike,
    json_key: str = "text",
    heldout_every: int | None = None,
    heldout_part: str | None = None,
    workers: int | None = None,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Tokens:
    """Make token files of a text.

    Args:
        source: jsonl, csv, txt, parquet, a folder, or a data set: ``wikitext``, ``pydoc_topics`` (comes with Python).
        output_prefix: of the files; the name of the record's field is added to it.
        tokenizer: ``.nemo`` that holds one, an HF folder, or a name on the hub.
        json_key: field of a record that holds text.
        heldout_every: hold every n-th document out; ``heldout_part`` says which side is written, ``heldout`` or, when
            None, the rest.
    """
    config = {
        "input": source,
        "output_prefix": output_prefix,
        "tokenizer.type": tokenizer,
        "json_keys": [json_key],
        "heldout_every": heldout_every,
        "heldout_part": heldout_part,
        "workers": workers,
    }
    call("preprocess", config, settings, verbose=verbose)
    return Tokens(Path(f"{Path(output_prefix)}_{json_key}_document"))


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
    output = _beside(model, "finetuned") if output is None else Path(output)
    config = {"model.restore_from_path": model, "model.nemo_path": output}
    config |= _training(output, train, validation, max_steps, resume)
    config |= _batches(seq_length, micro_batch_size, global_batch_size) | _machine(devices, precision)
    call("finetune", config | {"model.optim.lr": lr}, settings, verbose=verbose)
    return Checkpoint(output)


def importance(
    model: PathLike,
    text: Text,
    output: PathLike | None = None,
    *,
    num_samples: int | None = None,
    seq_length: int | None = None,
    micro_batch_size: int | None = None,
    devices: int | str | None = None,
    precision: int | str | None = None,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Scores:
    """Score neurons, heads, query groups, channels and layers on calibration text.

    Args:
        model: ``.nemo`` file. text: token files.
        output: scores folder, ``NAME.scores`` beside the model when None.
        num_samples: blocks that are drawn. seq_length: tokens of each; the model's own length when None.
    """
    output = _beside(model, "scores", "") if output is None else Path(output)
    config = {
        "model.restore_from_path": model,
        "output_path": output,
        "calibration.data_prefix": _data(text),
        "calibration.num_samples": num_samples,
        "calibration.seq_length": seq_length,
        "calibration.micro_batch_size": micro_batch_size,
    }
    call("importance", config | _machine(devices, precision), settings, verbose=verbose)
    return Scores(output)


def prune(
    model: PathLike,
    output: PathLike | None = None,
    *,
    hidden_size: int | None = None,
    ffn_hidden_size: int | None = None,
    num_attention_heads: int | None = None,
    num_query_groups: int | None = None,
    num_layers: int | None = None,
    drop_layers: Sequence[int] | None = None,
    scores: PathLike | None = None,
    plan: PathLike | None = None,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Student:
    """Make a smaller student; the weights that are kept are re-solved on the calibration tokens of the scores.

    Args:
        model: ``.nemo`` of the teacher.
        output: ``.nemo`` of the student, ``NAME.pruned.nemo`` when None; its plan is written beside it.
        hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, num_layers: sizes to keep; None keeps all.
        drop_layers: layers to remove, counted from 1.
        scores: as :func:`importance` returns them; not needed where only ``drop_layers`` is given.
        plan: apply this plan instead of making one.
    """
    output = _beside(model, "pruned") if output is None else Path(output)
    plan_path = output.with_name(f"{output.name.removesuffix('.nemo')}.plan.yaml")
    config = {
        "model.restore_from_path": model,
        "export.save_path": output,
        "export.plan_path": plan_path,
        "prune.hidden_size": hidden_size,
        "prune.ffn_hidden_size": ffn_hidden_size,
        "prune.num_attention_heads": num_attention_heads,
        "prune.num_query_groups": num_query_groups,
        "prune.num_layers": num_layers,
        "prune.drop_layers": None if drop_layers is None else list(drop_layers),
        "prune.scores": scores,
        "prune.plan": plan,
    }
    call("prune", config, settings, verbose=verbose)
    return Student(output, plan_path)


def distill(
    student: PathLike,
    teacher: PathLike,
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
    """Train a student to follow a teacher's predictions.

    Args:
        student, teacher: ``.nemo`` files of one vocabulary. output: ``NAME.distilled.nemo`` when None. The others are
            as for :func:`finetune`.
    """
    output = _beside(student, "distilled") if output is None else Path(output)
    config = {
        "model.restore_from_path": student,
        "model.kd_teacher_restore_from_path": teacher,
        "model.nemo_path": output,
    }
    config |= _training(output, train, validation, max_steps, resume)
    config |= _batches(seq_length, micro_batch_size, global_batch_size) | _machine(devices, precision)
    call("distill", config | {"model.optim.lr": lr}, settings, verbose=verbose)
    return Checkpoint(output)


def evaluate(
    model: PathLike,
    text: PathLike | None = None,
    output: PathLike | None = None,
    *,
    tasks: Sequence[str] = (),
    seq_length: int | None = None,
    micro_batch_size: int | None = None,
    devices: int | str | None = None,
    precision: int | str | None = None,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Evaluation:
    """Measure a model: loss and speed on text, and tasks of lm-evaluation-harness.

    Args:
        model: ``.nemo`` file; for tasks alone an HF folder does as well.
        text: token files that it was not trained on; None measures tasks alone.
        output: JSON file to keep; None keeps none.
        tasks: names of tasks.
    """
    config = {
        "model.restore_from_path": model,
        "evaluate.data_prefix": text,
        "evaluate.perplexity": text is not None,
        "evaluate.lm_eval.tasks": list(tasks),
        "evaluate.seq_length": seq_length,
        "evaluate.micro_batch_size": micro_batch_size,
    } | _machine(devices, precision)
    with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
        path = Path(folder) / "evaluation.json" if output is None else Path(output)
        call("evaluate", config | {"output_path": path}, settings, verbose=verbose)
        return Evaluation.read(path)


def generate(
    model: PathLike,
    prompt: str,
    *,
    tokens_to_generate: int | None = None,
    greedy: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    precision: int | str | None = None,
    seed: int | None = None,
    settings: Settings | None = None,
    verbose: bool = False,
) -> str:
    """Go on with a prompt.

    Args:
        model: ``.nemo`` file, HF folder or GGUF.
        tokens_to_generate: most tokens of the answer.
        greedy: take the likeliest token each time; else tokens are drawn: from the softmax at ``temperature``, of the
            ``top_k`` likeliest tokens, and of those that together have the probability ``top_p``.
        precision: what is computed in, 32 or ``bf16``. seed: of the drawing.
        verbose: show the text as it is made.

    Returns:
        The answer, without the prompt.
    """
    config = {
        "model.restore_from_path": model,
        "prompt": prompt,
        "inference.tokens_to_generate": tokens_to_generate,
        "inference.greedy": greedy,
        "inference.temperature": temperature,
        "inference.top_p": top_p,
        "inference.top_k": top_k,
        "precision": None if precision is None else str(precision),
        "seed": seed,
    }
    with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
        path = Path(folder) / "answers.jsonl"
        call("generate", config | {"output_path": path}, settings, verbose=verbose)
        return str(json.loads(path.read_text())["answer"])


def run(
    recipe: PathLike,
    folder: PathLike | None = None,
    *,
    stages: Sequence[str] | None = None,
    force: bool = False,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Run:
    """Walk a recipe, skipping the stages that are done and unchanged.

    Args:
        recipe: its name, as ``minitron run`` knows it (``tiny``, ``smollm2_135m``, …), or a YAML file.
        folder: of the run; ``runs/NAME`` when None.
        stages: run only these. force: run stages even if they are done.
        settings: the recipe's own, by name: ``{"max_steps": 100}``; a dotted key is one of the command's.
    """
    name = str(recipe)
    folder = Path("runs", Path(name).stem) if folder is None else Path(folder)
    chosen = {key if "." in key else f"recipe.settings.{key}": value for key, value in (settings or {}).items()}
    words = [word("recipe", name), *(word(key, value) for key, value in chosen.items())]
    stages = None if stages is None else list(stages)
    call("run", {"run_dir": folder, "stages": stages, "force": force}, words=words, verbose=verbose)
    metrics = folder / "metrics.json"
    found = json.loads(metrics.read_text()) if metrics.is_file() else {}
    return Run(folder, {role: Evaluation(values) for role, values in found.items()})


def _beside(model: PathLike, what: str, ending: str = ".nemo") -> Path:
    """Name of what is made of a model: ``NAME.WHAT`` beside it."""
    path = Path(model)
    return path.with_name(f"{path.name.removesuffix('.nemo')}.{what}{ending}")


def _data(text: Text) -> Any:
    """A prefix, or a weighted list of them, as NeMo's keys take it."""
    if isinstance(text, (str, os.PathLike)):
        return os.fspath(text)
    return [item if isinstance(item, (int, float)) else os.fspath(item) for item in text]


def _training(output: Path, train: Text, validation: Text | None, max_steps: int | None, resume: bool) -> Config:
    """Keys of data, steps and logs; the logs of an earlier call go where this one does not resume it."""
    logs = output.with_name(f"{output.name.removesuffix('.nemo')}.logs")
    if not resume:
        shutil.rmtree(logs, ignore_errors=True)
    parts = {"train": _data(train), "validation": _data(train if validation is None else validation)}
    return {
        "model.data.data_prefix": {
            name: [1.0, part] if isinstance(part, str) else part for name, part in parts.items()
        },
        "model.data.index_mapping_dir": logs / "index",
        "trainer.max_steps": max_steps,
        "trainer.val_check_interval": None if max_steps is None else min(max_steps, VALIDATE_EVERY),
        "exp_manager.exp_dir": logs,
        "exp_manager.use_datetime_version": False,
        "exp_manager.resume_if_exists": True,  # of a folder that is new, nothing
    }


def _batches(seq_length: int | None, micro_batch_size: int | None, global_batch_size: int | None) -> Config:
    return {
        "model.data.seq_length": seq_length,
        "model.micro_batch_size": micro_batch_size,
        "model.global_batch_size": global_batch_size,
    }


def _machine(devices: int | str | None, precision: int | str | None) -> Config:
    return {"trainer.devices": devices, "trainer.precision": precision}
