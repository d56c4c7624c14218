"""What a run folder holds, each part optional: evaluations, plan, scores, training logs, records of its stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nemo_minitron.errors import MinitronError
from nemo_minitron.plan import Plan
from nemo_minitron.report.curves import Training, read_training
from nemo_minitron.report.measures import ROLES, numbers
from nemo_minitron.scores import JSON, Scores
from nemo_minitron.text import parse_json, parse_yaml

T = TypeVar("T")

_COMMANDS = ("convert", "preprocess", "synthesize", "finetune", "importance", "prune", "distill", "evaluate", "report")
_LONGEST_CONFIG = 1 << 16


@dataclass(frozen=True)
class StageRecord:
    """One stage as ``minitron run`` recorded it; ``command`` is None where that is not known.

    Attributes:
        config: text of ``.stages/NAME.yaml``, all keys it ran with, up to 64 KiB.
        state: ``done`` or ``started``; seconds, fingerprint, versions of the packages: None or empty if not recorded.
    """

    name: str
    command: str | None
    config: str
    state: str | None = None
    seconds: float | None = None
    fingerprint: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """A run folder, read. What is not there is None or empty, and said in ``absent``."""

    folder: Path
    name: str
    recipe: str | None = None
    description: str | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    plan: Plan | None = None
    scores: Scores | None = None
    trainings: list[Training] = field(default_factory=list)
    stages: list[StageRecord] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    @property
    def distillation(self) -> Training | None:
        return next((training for training in self.trainings if training.is_distillation), None)


def read_run(folder: Path) -> Run:
    """Read what there is; a part that is missing or damaged is left out and named in ``Run.absent``.

    Raises:
        MinitronError: no such folder, or nothing in it that a run leaves.
    """
    if not folder.is_dir():
        raise MinitronError(f"run_dir: expected the folder of a run, found no folder '{folder}'")
    run = Run(folder, folder.resolve().name)
    recipe = _part(run, lambda: _recipe(folder)) or {}
    run.recipe, run.description = (str(recipe[key]) if recipe.get(key) else None for key in ("name", "description"))
    run.metrics = _metrics(run)
    run.plan = _part(run, lambda: _plan(run))
    run.scores = _part(run, lambda: _scores(run))
    run.trainings = _trainings(run)
    run.stages = _part(run, lambda: _stages(run, recipe)) or []
    if not (run.metrics or run.plan or run.scores or run.trainings or run.stages):
        damaged = "; ".join(reason for reason in run.absent if str(folder) in reason)
        raise MinitronError(
            f"run_dir: '{folder}' is no run folder: expected any of metrics.json, evaluation/, *.plan.yaml, scores/, "
            f".stages/ or a training's log, found {damaged or 'none of them'}"
        )
    return run


def _part(run: Run, read: Callable[[], T]) -> T | None:
    try:
        return read()
    except MinitronError as error:
        run.absent.append(str(error))
        return None


def _recipe(folder: Path) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    return parse_yaml(_bytes(path), str(path)) if path.is_file() else {}


def _metrics(run: Run) -> dict[str, dict[str, float]]:
    """One entry per model: its own evaluation, or else what ``metrics.json`` gathered earlier."""
    known = _part(run, lambda: _json(run.folder / "metrics.json")) or {}
    found: dict[str, dict[str, float]] = {}
    for role in ROLES:
        evaluation = _part(run, partial(_json, run.folder / "evaluation" / f"{role}.json"))
        values = numbers(evaluation or known.get(role))
        if "val_loss" in values:
            found[role] = values
        else:
            run.absent.append(f"The {role} model has no evaluation: its results are left out.")
    return found


def _plan(run: Run) -> Plan | None:
    path = _only(run, "*.plan.yaml", "pruned.plan.yaml", "plan of what was kept")
    if path is None:
        run.absent.append("There is no plan (*.plan.yaml): what was removed where is left out.")
        return None
    return Plan.load(path)


def _scores(run: Run) -> Scores | None:
    path = _only(run, f"*/{JSON}", f"scores/{JSON}", "scores folder")
    if path is None:
        run.absent.append("There are no scores: maps of importance and Block Influence are left out.")
        return None
    scores = Scores.load(path.parent)
    if run.plan is not None and scores.source_fingerprint != run.plan.source_fingerprint:
        raise MinitronError(
            f"'{path.parent}' scores weights {scores.source_fingerprint[:16]}, but the plan prunes "
            f"{run.plan.source_fingerprint[:16]}: these scores are left out."
        )
    return scores


def _only(run: Run, pattern: str, usual: str, what: str) -> Path | None:
    """The file that a recipe writes, or else the one that is there."""
    if (run.folder / usual).is_file():
        return run.folder / usual
    paths = sorted(run.folder.glob(pattern))
    if len(paths) > 1:
        raise MinitronError(f"'{run.folder}' holds {len(paths)} candidates for its {what} and no {usual}: left out.")
    return paths[0] if paths else None


def _trainings(run: Run) -> list[Training]:
    """Every folder with a training's log in it, in the order in which they were begun."""
    found = []
    for folder in sorted(path for path in run.folder.iterdir() if path.is_dir() and path.name != ".stages"):
        training = _part(run, partial(read_training, folder))
        if training is not None:
            found.append(training)
    if not any(training.is_distillation for training in found):
        run.absent.append("There is no log of a distillation (event files or metrics.csv): its curves are left out.")
    if all(training.is_distillation for training in found):
        run.absent.append("There is no log of a teacher correction (finetune): this run had none, or it is gone.")
    return sorted(found, key=lambda training: training.is_distillation)


def _stages(run: Run, recipe: Mapping[str, Any]) -> list[StageRecord]:
    folder = run.folder / ".stages"
    paths = {path.stem: path for path in folder.glob("*.yaml")}
    if not paths:
        run.absent.append("There are no records of stages (.stages/): commands and versions are left out.")
    order = recipe.get("order")
    order = [name for name in order if name in paths] if isinstance(order, list) else []
    order += sorted(paths.keys() - set(order), key=lambda name: paths[name].stat().st_mtime)
    known = recipe.get("stages")
    stages = []
    for name in order:
        node = known.get(name) if isinstance(known, dict) else None
        command = node.get("command") if isinstance(node, dict) else name.partition("_")[0]
        command = command if command in _COMMANDS else None
        if command == "report":
            continue
        record = _part(run, partial(_json, folder / f"{name}.json")) or {}
        seconds, versions = record.get("seconds"), record.get("versions")
        stages.append(
            StageRecord(
                name,
                command,
                _bytes(paths[name])[:_LONGEST_CONFIG].decode("utf-8", "replace"),
                state=str(record["state"]) if record.get("state") else None,
                seconds=float(seconds) if isinstance(seconds, int | float) else None,
                fingerprint=str(record["fingerprint"]) if record.get("fingerprint") else None,
                versions={str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
            )
        )
    return stages


def _json(path: Path) -> dict[str, Any]:
    return parse_json(_bytes(path), str(path)) if path.is_file() else {}


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MinitronError(f"'{path}' cannot be read: {error.strerror}") from None
