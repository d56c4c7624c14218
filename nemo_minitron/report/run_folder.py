"""What a run folder holds, each part optional: evaluations, plan, scores, training logs, records of its stages.

All of it is another's. Only plain files are read: up to 64 KiB of a stage's config, 1 MiB of a recipe, 4 MiB of JSON,
64 MiB of a training's log, 128 MiB in all. Up to 100 stages and 16 trainings are shown, shapes of up to 1,000 layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nemo_minitron.errors import MinitronError
from nemo_minitron.files.plain import short
from nemo_minitron.files.text import YAML_LIMIT, one_line, parse_json, parse_yaml
from nemo_minitron.importance.scores import JSON, NPZ, Scores
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.plan import Plan
from nemo_minitron.report.answers import Answers, read_answers
from nemo_minitron.report.curves import Training, is_log, read_log
from nemo_minitron.report.inventory import Inventory
from nemo_minitron.report.measures import LARGEST, ROLES, number, numbers
from nemo_minitron.report.tasks import task_scores

T = TypeVar("T")

_COMMANDS = (
    *("convert", "preprocess", "synthesize", "finetune", "importance", "prune"),
    *("distill", "evaluate", "generate", "report"),
)
_LONGEST_CONFIG, _LONGEST_JSON = 1 << 16, 4 << 20
_MOST_STAGES, _MOST_TRAININGS, _MOST_VERSIONS = 100, 16, 50
_MOST_LAYERS, _MOST_UNITS = 1_000, 1 << 24
_LARGEST_SCORE = 1e30


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
    tasks: dict[str, dict[tuple[str, str], str]] = field(default_factory=dict)
    answers: Answers = field(default_factory=dict)
    plan: Plan | None = None
    scores: Scores | None = None
    trainings: list[Training] = field(default_factory=list)
    stages: list[StageRecord] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.files = Inventory(self.folder)

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
    recipe = _part(run, lambda: _recipe(run)) or {}
    run.recipe, run.description = short(recipe.get("name")), short(recipe.get("description"), 2000)
    run.metrics = _metrics(run)
    run.answers = read_answers(run.files, run.absent)
    run.plan = _part(run, lambda: _plan(run))
    run.scores = _part(run, lambda: _scores(run))
    run.trainings = _trainings(run)
    run.stages = _stages(run, recipe)
    note = run.files.note()
    run.absent += [note] if note else []
    if not (run.metrics or run.tasks or run.plan or run.scores or run.trainings or run.stages):
        damaged = "; ".join(reason for reason in run.absent if str(folder) in reason or reason == note)
        raise MinitronError(
            f"run_dir: '{folder}' is no run folder: expected any of metrics.json, evaluation/, *.plan.yaml, scores/, "
            f".stages/ or a training's log, found {damaged or 'none of them'}"
        )
    return run


def _part(run: Run, read: Callable[[], T]) -> T | None:
    try:
        return read()
    except MinitronError as error:
        run.absent.append(one_line(error))
        return None


def _recipe(run: Run) -> dict[str, Any]:
    path = run.folder / "recipe.yaml"
    return parse_yaml(run.files.read(path, YAML_LIMIT), str(path)) if path in run.files.files else {}


def _metrics(run: Run) -> dict[str, dict[str, float]]:
    """One entry per model: its own evaluation, or else what ``metrics.json`` gathered earlier."""
    known = _part(run, lambda: _json(run, run.folder / "metrics.json")) or {}
    found: dict[str, dict[str, float]] = {}
    for role in ROLES:
        evaluation = _part(run, partial(_json, run, run.folder / "evaluation" / f"{role}.json"))
        if found_tasks := task_scores(evaluation or known.get(role)):
            run.tasks[role] = found_tasks
        values = numbers(evaluation or known.get(role))
        if "val_loss" in values:
            found[role] = values
        else:
            run.absent.append(f"The {role} model has no evaluation: its results are left out.")
    return found


def _plan(run: Run) -> Plan | None:
    plans = [path for path in run.files.files if path.parent == run.folder and path.name.endswith(".plan.yaml")]
    path = _only(run, plans, "pruned.plan.yaml", "plan of what was kept")
    if path is None:
        run.absent.append("There is no plan (*.plan.yaml): what was removed where is left out.")
        return None
    plan = Plan.load(path)
    _check_drawable(plan.source, path)
    return plan


def _scores(run: Run) -> Scores | None:
    folders = [path for path in run.files.files if path.parent.parent == run.folder and path.name == JSON]
    path = _only(run, folders, f"scores/{JSON}", "scores folder")
    if path is None:
        run.absent.append("There are no scores: maps of importance and Block Influence are left out.")
        return None
    if path.with_name(NPZ) not in run.files.files:
        raise MinitronError(f"'{path.parent}': expected a plain file {NPZ} beside {JSON}, found none")
    scores = Scores.load(path.parent)
    _check_drawable(scores.shape, path)
    drawn = (*scores.published.values(), scores.block_influence)
    if any(abs(array).max() > _LARGEST_SCORE for array in drawn):
        raise MinitronError(f"'{path.parent}': expected scores of at most {_LARGEST_SCORE:g}, found larger ones")
    if run.plan is not None and scores.source_fingerprint != run.plan.source_fingerprint:
        raise MinitronError(
            f"'{path.parent}' scores weights {scores.source_fingerprint[:16]}, but the plan prunes "
            f"{run.plan.source_fingerprint[:16]}: these scores are left out."
        )
    return scores


def _check_drawable(shape: ModelShape, path: Path) -> None:
    """Refuse what would take minutes or gigabytes to draw."""
    layers, widest = shape.num_layers, max(shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads)
    if layers > _MOST_LAYERS or layers * widest > _MOST_UNITS or shape.num_parameters() > LARGEST:
        raise MinitronError(
            f"'{path}': expected at most {_MOST_LAYERS:,} layers and {_MOST_UNITS:,} units in all of them to show, "
            f"found {layers:,} layers of up to {widest:,}"
        )


def _only(run: Run, paths: list[Path], usual: str, what: str) -> Path | None:
    """The file that a recipe writes, or else the one that is there."""
    if run.folder / usual in paths:
        return run.folder / usual
    if len(paths) > 1:
        raise MinitronError(f"'{run.folder}' holds {len(paths)} candidates for its {what} and no {usual}: left out.")
    return paths[0] if paths else None


def _trainings(run: Run) -> list[Training]:
    """Every folder with a training's log in it, in the order in which they were begun."""
    logs: dict[str, list[Path]] = {}
    for path in run.files.files:
        first, *more = path.relative_to(run.folder).parts
        if more and first != ".stages" and is_log(path):
            logs.setdefault(first, []).append(path)
    found = []
    for name in list(logs)[:_MOST_TRAININGS]:
        training = _part(run, partial(read_log, name, run.files, logs[name]))
        if training is not None:
            found.append(training)
    if len(logs) > _MOST_TRAININGS:
        run.absent.append(f"Logs of {len(logs):,} trainings are there: the first {_MOST_TRAININGS} are shown.")
    if not any(training.is_distillation for training in found):
        run.absent.append("There is no log of a distillation (event files or metrics.csv): its curves are left out.")
    if all(training.is_distillation for training in found):
        run.absent.append("There is no log of a teacher correction (finetune): this run had none, or it is gone.")
    return sorted(found, key=lambda training: training.is_distillation)


def _stages(run: Run, recipe: Mapping[str, Any]) -> list[StageRecord]:
    folder = run.folder / ".stages"
    paths = {path.stem: path for path in run.files.files if path.parent == folder and path.suffix == ".yaml"}
    if not paths:
        run.absent.append("There are no records of stages (.stages/): commands and versions are left out.")
    named = recipe.get("order")
    order = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    order = [name for name in dict.fromkeys(order) if name in paths]
    order += sorted(paths.keys() - set(order), key=lambda name: (run.files.files[paths[name]], name))
    if len(order) > _MOST_STAGES:
        run.absent.append(f"Records of {len(order):,} stages are there: the first {_MOST_STAGES} are shown.")
    known = recipe.get("stages")
    stages = []
    for name in order[:_MOST_STAGES]:
        node = known.get(name) if isinstance(known, dict) else None
        command = node.get("command") if isinstance(node, dict) else name.partition("_")[0]
        command = command if command in _COMMANDS else None
        if command == "report":
            continue
        config = _part(run, partial(run.files.read, paths[name], _LONGEST_CONFIG, cut=True)) or b""
        record = _part(run, partial(_json, run, folder / f"{name}.json")) or {}
        versions = record.get("versions")
        versions = list(versions.items())[:_MOST_VERSIONS] if isinstance(versions, dict) else []
        stages.append(
            StageRecord(
                name,
                command,
                config.decode("utf-8", "replace"),
                state=short(record.get("state")),
                seconds=number(record.get("seconds")),
                fingerprint=short(record.get("fingerprint")),
                versions={short(k) or "": short(v) or "–" for k, v in versions},
            )
        )
    return stages


def _json(run: Run, path: Path) -> dict[str, Any]:
    return parse_json(run.files.read(path, _LONGEST_JSON), str(path)) if path in run.files.files else {}
