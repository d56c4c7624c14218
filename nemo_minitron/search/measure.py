"""Measured losses of shapes: each is a plan file, a student, and JSON, made by the commands that a user would call.

A measurement is a chain of stages as :mod:`nemo_minitron.recipe` runs them, each in its own process and with its own
fingerprint; of a chain only the loss at its end must stay. What is done and unchanged is never run again, so that a
search that was killed goes on where it was, and a wider one measures only what is new.
"""

from __future__ import annotations

import dataclasses
import glob
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.config.schema import SearchConfig
from nemo_minitron.config.sections import Prune
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.files.text import read_json
from nemo_minitron.importance.scores import Scores
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.choose import plan_from_scores
from nemo_minitron.prune.plan import TARGETS, Plan
from nemo_minitron.recipe import Compose, Records, Stage, run_stage, settled
from nemo_minitron.report.measures import duration
from nemo_minitron.search.request import last_stage
from nemo_minitron.search.space import count, key_of

RUNNING = ("devices", "num_nodes", "accelerator", "precision")
"""Keys of ``trainer`` that every stage takes; the rest is about training."""
GRID = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel")


class Bench:
    """Makes and measures students of one source.

    Args:
        cfg: with ``model.restore_from_path``; folder: its ``output_path``.
        scores: that students are made from, ``scores_path`` where they lie. removed: layers to drop (0-based) by
            number of layers dropped, where they are chosen by loss.

    Raises:
        MinitronError: a stage's configuration is wrong.
    """

    def __init__(
        self,
        cfg: SearchConfig,
        compose: Compose,
        folder: Path,
        records: Records,
        scores: Scores,
        scores_path: Path,
        removed: Sequence[Sequence[int]] = (),
    ) -> None:
        self.cfg, self.compose, self.folder, self.records = cfg, compose, folder, records
        self.scores, self.scores_path, self.removed = scores, scores_path, removed
        self.teacher = required(cfg, "model.restore_from_path")
        self._running = {name: cfg.trainer[name] for name in RUNNING if name in cfg.trainer}
        self._grid = {name: cfg.model.get(name) for name in GRID}
        if cfg.model.get("tokenizer") is not None:  # of a teacher that carries none
            self._grid["tokenizer"] = cfg.model["tokenizer"]
        self._stages: dict[str, Stage] = {}
        self._plans: dict[str, Plan] = {}

    def plan(self, shape: ModelShape) -> tuple[Path, Plan]:
        """The plan of a shape and its file, written unless it is there and the same."""
        key = key_of(shape)
        path = self.folder / "plans" / f"{key}.yaml"
        if key not in self._plans:
            self._plans[key] = plan_of(self.cfg, self.scores, shape, self.removed)
            write_plan(self._plans[key], path)
        return path, self._plans[key]

    def check(self, shape: ModelShape, distil: bool) -> None:
        """Refuse settings that a later stage would refuse, before the first one runs.

        Raises:
            MinitronError: a stage's configuration is wrong, an input is absent, the scores are of another shape.
        """
        made: set[str] = set()
        for stage in self._distilled(shape, [1]) if distil else self._zero_shot(shape):
            for pattern in set(stage.inputs) - made:
                if not glob.glob(pattern):
                    raise MinitronError(f"stage '{stage.name}': input {pattern} does not exist")
            made |= set(stage.outputs)
        with NemoReader(self.teacher) as reader:
            self.scores.check_matches(self.scores.source_fingerprint, reader.shape)  # weights are checked with the plan

    def source_loss(self) -> float:
        """Loss of the source itself, nats/token."""
        return self._loss([self._evaluation("source", self.teacher, self.folder / "evaluation" / "source.json")])[0]

    def zero_shot(self, shape: ModelShape) -> tuple[float, bool]:
        """Loss of the student before any training, nats/token, and whether it was known already."""
        return self._loss(self._zero_shot(shape))

    def distilled(self, shape: ModelShape, steps: Sequence[int]) -> tuple[float, bool]:
        """The same after training for each of ``steps`` in turn; the last is measured."""
        return self._loss(self._distilled(shape, steps))

    def distilled_path(self, shape: ModelShape, steps: Sequence[int]) -> Path:
        """The student after these rounds."""
        return self.folder / "distilled" / f"{key_of(shape)}-{'-'.join(map(str, steps))}.nemo"

    def forget_student(self, shape: ModelShape) -> None:
        """Delete the student; it can be made again from its plan."""
        self._student(shape).unlink(missing_ok=True)

    def _student(self, shape: ModelShape) -> Path:
        return self.folder / "students" / f"{key_of(shape)}.nemo"

    def _loss(self, stages: Sequence[Stage]) -> tuple[float, bool]:
        known = settled(stages, self.records)
        for stage in () if known else stages:
            run_stage(stage, self.records, stage.name, quiet=True)
        path = Path(stages[-1].outputs[0])
        loss = read_json(path).get("val_loss")
        if not isinstance(loss, int | float):
            raise MinitronError(f"{path}: expected a val_loss, found {loss!s:.80}")
        return float(loss), known

    def _zero_shot(self, shape: ModelShape) -> list[Stage]:
        key, student = key_of(shape), self._student(shape)
        path, plan = self.plan(shape)
        prune: dict[str, Any] = {"plan": str(path)}
        if plan.compensation is not None:
            prune["scores"] = str(self.scores_path)
        config = {
            "model": {"restore_from_path": self.teacher, **self._grid},
            "prune": prune,
            "export": {"save_path": str(student), "plan_path": str(student.with_suffix(".plan.yaml"))},
            "trainer": self._running,
            "seed": self.cfg.seed,
        }
        inputs = (self.teacher, str(path), *([str(self.scores_path)] if "scores" in prune else []))
        return [
            self._stage(f"prune-{key}", "prune", config, inputs, (str(student),)),
            self._evaluation(key, str(student), self.folder / "evaluation" / f"{key}.json"),
        ]

    def _distilled(self, shape: ModelShape, steps: Sequence[int]) -> list[Stage]:
        source = self._student(shape) if len(steps) == 1 else self.distilled_path(shape, steps[:-1])
        target = self.distilled_path(shape, steps)
        name = f"distill-{target.stem}"
        work = self.folder / "work" / name
        cfg = dataclasses.asdict(self.cfg)
        config = {
            "model": {
                **cfg["model"],
                "restore_from_path": str(source),
                "kd_teacher_restore_from_path": self.teacher,
                "nemo_path": str(target),
                "seed": self._seed(len(steps)),
            },
            "distill": cfg["distill"],
            "trainer": {**cfg["trainer"], "max_steps": steps[-1], "val_check_interval": steps[-1]},
            "exp_manager": {**cfg["exp_manager"], "exp_dir": str(work), "use_datetime_version": False},
            "seed": self._seed(len(steps)),
        }
        data = config["model"]["data"] = dict(config["model"]["data"])
        if data.get("index_mapping_dir") is None:
            data["index_mapping_dir"] = str(work / "index")
        files = tuple(f"{prefix}.*" for prefix in _prefixes(data.get("data_prefix")))
        stage = self._stage(name, "distill", config, (self.teacher, str(source), *files), (str(target),), work)
        path = self.folder / "evaluation" / f"{target.stem}.json"
        before = self._zero_shot(shape)[:1] if len(steps) == 1 else self._distilled(shape, steps[:-1])[:-1]
        return [*before, stage, self._evaluation(target.stem, str(target), path)]

    def _seed(self, part: int) -> int:
        """Every round sees other text; all students of a round see the same."""
        return self.cfg.seed + part - 1

    def _evaluation(self, key: str, model: str, output: Path) -> Stage:
        evaluate = dataclasses.asdict(self.cfg.evaluate)
        config = {
            "model": {"restore_from_path": model, **self._grid},
            "evaluate": evaluate,
            "output_path": str(output),
            "trainer": self._running,
            "seed": self.cfg.seed,
        }
        inputs = (model, f"{evaluate['data_prefix']}.*")
        return self._stage(f"evaluate-{key}", "evaluate", config, inputs, (str(output),))

    def _stage(
        self,
        name: str,
        command: str,
        config: Any,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        work: Path | None = None,
    ) -> Stage:
        if name not in self._stages:  # composing takes longer than all else that is done to see what is known
            try:
                config = self.compose(command, config={**config, "extensions": self.cfg.extensions})
            except MinitronError as error:
                raise MinitronError(f"stage '{name}': {error}") from None
            inputs += tuple(config.get("extensions") or ())
            self._stages[name] = Stage(name, command, config, inputs, outputs, work)
        return self._stages[name]


class Table:
    """What is being measured, as rows that appear one by one, with the time that is left.

    Args:
        title: of this part of the search. count: rows to come.
    """

    def __init__(self, title: str, count: int) -> None:
        self._count, self._done, self._began, self._slow = count, 0, time.monotonic(), 0
        print(f"\n{title}\n{'':>9} {'layers':>6} {'hidden':>6} {'ffn':>6} {'heads':>9} {'size':>8}", end="")
        print(f" {'predicted':>9} {'measured':>9}  {'time':>12}", flush=True)

    def row(self, shape: ModelShape, predicted: float, measured: float, note: str = "", cached: bool = False) -> None:
        """One line; ``cached`` rows took no time and tell nothing about those to come."""
        self._done += 1
        self._slow += not cached
        spent = time.monotonic() - self._began
        left = self._count - self._done
        eta = f"{duration(spent / self._slow * left)} left" if left and self._slow else ""
        heads = f"{shape.num_attention_heads}/{shape.num_query_groups}"
        number = f"[{self._done}/{self._count}]"
        print(
            f"{number:>9} {shape.num_layers:>6} {shape.hidden_size:>6} {shape.ffn_hidden_size:>6} {heads:>9} "
            f"{count(shape.num_parameters()):>8} {predicted:>9.4f} {measured:>9.4f}  "
            f"{'known' if cached else duration(spent):>12}  {note}{'  ' if note and eta else ''}{eta}".rstrip(),
            flush=True,
        )


def plan_of(cfg: SearchConfig, scores: Scores, shape: ModelShape, removed: Sequence[Sequence[int]] = ()) -> Plan:
    """The plan that ``minitron prune`` would make of these scores for a shape."""
    source = scores.shape
    sizes = {name: getattr(shape, name) for name in TARGETS if getattr(shape, name) != getattr(source, name)}
    if "num_query_groups" in sizes:
        sizes["num_attention_heads"] = shape.num_attention_heads
    prune = Prune(**sizes, compensate=cfg.search.compensate)
    count = source.num_layers - shape.num_layers
    if count and removed:
        prune.drop_layers = [layer + 1 for layer in removed[count]]
    else:
        prune.layer_selection = cfg.search.layer_selection
    plan = plan_from_scores(source, scores.source_fingerprint, prune, scores)
    predicted = last_stage(cfg) == "predict"  # which runs no model: groups go by their ranking then
    return plan.chosen(cfg.search.layer_selection, "ranking" if predicted else cfg.search.group_selection)


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan file unless it is there and the same."""
    if not (path.is_file() and path.read_text(encoding="utf-8") == plan.to_yaml()):
        plan.save(path)


def fewer_tokens(scores: Scores, tokens: int) -> Scores:
    """The same scores with whole samples of calibration, as many as have ``tokens``; at least one.

    The model's own samples keep their share of them.

    Raises:
        MinitronError: the scores hold none.
    """
    if scores.tokens is None or scores.sensitivity is None:
        raise MinitronError(
            "search.tokens: the scores hold no calibration tokens; "
            "run `minitron importance calibration.reconstruction=true`"
        )
    samples = max(1, tokens // scores.tokens.shape[1])
    if samples >= len(scores.tokens):
        return scores
    total, first_own = len(scores.tokens), len(scores.tokens) - scores.own_samples
    own = samples * scores.own_samples // total
    some = [*range(samples - own), *range(first_own, first_own + own)]
    return dataclasses.replace(
        scores,
        calibration={**scores.calibration, **({"own_samples": own} if scores.own_samples else {})},
        tokens=scores.tokens[some],
        sensitivity=scores.sensitivity[:, some],
        counted=None if scores.counted is None else scores.counted[some],
    )


def _prefixes(given: Any) -> list[str]:
    """Every ``.bin/.idx`` prefix in NeMo's ``data_prefix``."""
    if isinstance(given, Mapping):
        return [prefix for part in given.values() for prefix in _prefixes(part)]
    if isinstance(given, list | tuple):
        return [str(item) for item in given if not isinstance(item, int | float)]
    return [] if given is None else [str(given)]
