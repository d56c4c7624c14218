"""What lies beside a checkpoint and tells how it came to be: its pruning plan, and the records of a run.

``minitron prune`` leaves ``NAME.plan.yaml`` beside ``NAME.nemo``; ``minitron run`` leaves ``.stages/STAGE.yaml``, the
configuration of each stage, and ``.stages/STAGE.json``, which says that it is done. What is missing, damaged, older
than the checkpoint or about another one is passed over: nothing here is needed to convert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import parse_plain_yaml, read_file, read_json
from nemo_minitron.model.shape import ModelShape

_PLAN_FORMAT, _PLAN_LIMIT = "nemo_minitron.plan/1", 32 << 20
_STAGES, _MOST_STAGES = ".stages", 64
_LARGEST = 1e18


@dataclass(frozen=True)
class Pruning:
    """Facts of a plan: the ranking that chose, None for the default; how layers and query groups were chosen, None
    where the plan does not say or the ranking chose; the source's layers that stay, as ranges; whether the kept weights
    were re-solved, and the stream turned."""

    ranking: str | None
    layers_by: str | None
    groups_by: str | None
    layers: str
    source_layers: int
    resolved: bool
    turned: bool


@dataclass(frozen=True)
class Training:
    """Facts of a distillation: file name of the teacher, the loss, optimizer steps and tokens in each."""

    teacher: str
    loss: str
    steps: int
    tokens: int


@dataclass(frozen=True)
class Measured:
    """A held-out loss in nats/token: of the model, and of its teacher where that was measured on the same data."""

    loss: float
    teacher: float | None
    data: str


@dataclass(frozen=True)
class Records:
    """All that is known; None where nothing is."""

    pruning: Pruning | None = None
    training: Training | None = None
    measured: Measured | None = None


def records_of(checkpoint: Path, shape: ModelShape) -> Records:
    """Records beside a ``.nemo`` whose model has ``shape``."""
    stages = list(_stages(checkpoint))
    trained = next((stage for stage in stages if _is(_at(stage, "model", "nemo_path"), checkpoint)), {})
    student, teacher = (_at(trained, "model", key) for key in ("restore_from_path", "kd_teacher_restore_from_path"))
    if not isinstance(student, str) or not isinstance(teacher, str):
        return Records(_pruning(checkpoint, shape), None, _measured(stages, checkpoint, None))
    pruned = checkpoint.with_name(Path(student).name)
    return Records(_pruning(pruned, shape), _training(trained), _measured(stages, checkpoint, teacher))


def _stages(checkpoint: Path) -> Iterator[Mapping[str, Any]]:
    """Configurations of stages that were done after the checkpoint was last written."""
    try:
        files = sorted((checkpoint.parent / _STAGES).glob("*.yaml"))[:_MOST_STAGES]
        written = checkpoint.stat().st_mtime
    except OSError:
        return
    for file in files:
        try:
            record = file.with_suffix(".json")
            if record.stat().st_mtime < written or read_json(record).get("state") != "done":
                continue
            yield parse_plain_yaml(read_file(file, _PLAN_LIMIT), str(file), _PLAN_LIMIT)
        except (OSError, MinitronError):
            continue


def _pruning(checkpoint: Path, shape: ModelShape) -> Pruning | None:
    """The facts of ``NAME.plan.yaml``, whose long middle, what is kept of every layer, is not parsed."""
    file = checkpoint.with_name(f"{checkpoint.name.removesuffix('.nemo')}.plan.yaml")
    try:
        lines = read_file(file, _PLAN_LIMIT).decode().splitlines()
        keep = lines.index("keep:")
        head = parse_plain_yaml("\n".join(lines[:keep]).encode(), str(file))
        layers = next(line for line in lines[keep:] if line.startswith("  layers: ")).removeprefix("  layers: ")
        tail = lines[lines.index("compensation:") :] if "compensation:" in lines else ["compensation: null"]
        compensation = parse_plain_yaml("\n".join(tail).encode(), str(file))["compensation"]
        target, source = head["target"], head["source"]["shape"]
        same = head["format"] == _PLAN_FORMAT and all(getattr(shape, key) == target[key] for key in target)
        if not same or not _is_ranges(layers) or not isinstance(source["num_layers"], int):
            return None
        return Pruning(
            ranking=_word(head.get("ranking")),
            layers_by=_word(_at(head, "selection", "layers")),
            groups_by=_word(_at(head, "selection", "groups")),
            layers=layers.strip("'"),
            source_layers=source["num_layers"],
            resolved=compensation is not None,
            turned=bool(compensation and compensation.get("rotate")),
        )
    except (MinitronError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None


def _training(stage: Mapping[str, Any]) -> Training | None:
    steps, batch = _at(stage, "trainer", "max_steps"), _at(stage, "model", "global_batch_size")
    length, loss = _at(stage, "model", "data", "seq_length"), _word(_at(stage, "distill", "loss"))
    teacher = _word(Path(str(_at(stage, "model", "kd_teacher_restore_from_path"))).name)
    numbers = [value for value in (steps, batch, length) if type(value) is int and 0 < value < _LARGEST]
    if len(numbers) < 3 or teacher is None or loss is None or _at(stage, "trainer", "max_time"):
        return None  # a training that the clock may have ended says nothing of its steps
    return Training(teacher, loss, numbers[0], numbers[1] * numbers[2])


def _measured(stages: list[Mapping[str, Any]], checkpoint: Path, teacher: str | None) -> Measured | None:
    losses: dict[str, tuple[float, object]] = {}
    for stage in stages:
        source, output = _at(stage, "model", "restore_from_path"), _at(stage, "output_path")
        if not isinstance(source, str) or not isinstance(output, str) or not output.endswith(".json"):
            continue
        folder = Path(output).parent.name
        near = checkpoint.parent / (folder if folder != checkpoint.parent.name else "") / Path(output).name
        try:
            loss = read_json(near).get("val_loss")
        except MinitronError:
            continue
        if isinstance(loss, float) and 0 <= loss < _LARGEST:
            losses[Path(source).name] = (loss, _at(stage, "evaluate", "data_prefix"))
    mine, theirs = losses.get(checkpoint.name), losses.get(Path(teacher).name) if teacher else None
    if mine is None or (data := _word(Path(str(mine[1])).name)) is None:
        return None
    return Measured(mine[0], theirs[0] if theirs and theirs[1] == mine[1] else None, data)


def _is(path: object, checkpoint: Path) -> bool:
    """Whether a path of a configuration, which may be relative to another folder, is this checkpoint's."""
    return isinstance(path, str) and Path(path).name == checkpoint.name


def _at(section: object, *keys: str) -> object:
    """A value of a nested mapping; None where there is none."""
    for key in keys:
        section = section.get(key) if isinstance(section, Mapping) else None
    return section


def _word(value: object) -> str | None:
    """A name that is safe in a text for people; None for anything else."""
    fine = isinstance(value, str) and 0 < len(value) <= 100 and all(c.isalnum() or c in "._-+" for c in value)
    return str(value) if fine else None


def _is_ranges(text: str) -> bool:
    return len(text) < 2000 and all(c.isdigit() or c in " -'" for c in text)
