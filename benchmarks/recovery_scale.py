"""Does the lead of re-solved weights last at scale? Runs of several budgets, each with its own schedule, cell by cell.

    python benchmarks/texts.py TEXTS --source PATH/SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/cloze.py TEXTS/prose_validation.jsonl TEXTS/cloze
    python benchmarks/recovery.py --scale --source PATH/SmolLM2-135M-Instruct.Q4_1.gguf --texts TEXTS \
        --cloze TEXTS/cloze/cloze.jsonl --work WORK --json recovery_scale.json --device cuda --minutes 14

A cell is a student (target and weights), an arm, a budget and a seed. Students learn on blocks of both training texts
in turn, drawn by the seed, no block twice as long as there are enough; a larger budget of a seed sees the blocks of a
smaller one first, but each budget is a run of its own with its own decay. The teacher answers online, so that memory
does not grow with the budget. Arms:

* ``nvidia``: cut weights and the published recipe (arXiv 2407.14679, 2408.11796): forward KL alone, 1e-4 down to 1e-5
  by a cosine, 100 steps of warm-up, or a tenth of the run where that is less;
* ``cut``: cut weights and the defaults of ``minitron distill``, read from its configuration;
* ``ours``: the same with re-solved weights;
* ``--arm NAME=cut|resolved,KEY=VALUE…``: one more, with keys of ``minitron distill``.

What differs from those recipes is the size of a step, ``--batch`` x ``--length`` tokens for all arms, and the texts.
Weights and AdamW's moments are float32, products bfloat16. Both kinds of weights are made by ``minitron prune`` of one
``minitron importance`` on the training texts.

A cell is in ``--json`` at once; what is there is not run again. ``--minutes`` stops in time: weights, moments, position
and curve lie under ``--work``, and the next call goes on with the same bits (on a CPU). ``--prepare`` does only what
comes before the first step. :mod:`recovery_curves` makes the table and the plot; ``--show`` those alone.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provenance import commands, provenance
from recovery_arms import ARMS, Arm, arms_of
from recovery_bench import TARGETS, Bench
from recovery_curves import KINDS, plot, show
from zero_shot_bench import locked, write_atomically

POINTS = (0.0, 0.125, 0.25, 0.5, 1.0)
"""Of a run, at which it is evaluated."""
SEEDS_ABOVE = 10_000_000
"""Tokens above which a budget has one seed."""


class Stopped(Exception):
    """The time is up; what was reached is kept."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    target: str
    arm: str
    budget: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.target}|{self.arm}|{self.budget}|{self.seed}"

    def kept(self, work: Path) -> Path:
        """Where it is put down."""
        return work / "cells" / (re.sub(r"[^\w.-]", "_", self.key) + ".pt")


class Deadline:
    """When to stop, and when to put down what was reached."""

    def __init__(self, minutes: float | None, save_minutes: float) -> None:
        now = time.monotonic()
        self.end = None if minutes is None else now + 60 * minutes
        self.every, self._saved = 60 * save_minutes, now

    def passed(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end

    def save_is_due(self) -> bool:
        if time.monotonic() - self._saved < self.every:
            return False
        self._saved = time.monotonic()
        return True


def run_cell(bench: Bench, teacher: Any, cell: Cell, arm: Arm, deadline: Deadline) -> dict[str, Any]:
    """Train one student to the end of its budget, from where an earlier call left it; its curve and what it is then.

    Raises:
        Stopped: the time is up.
        SystemExit: what an earlier call left is of other settings.
    """
    import torch
    from loop import Learner, answer, load
    from tqdm import tqdm

    from nemo_minitron.distill.loss import Mix

    given, device = bench.given, bench.given.device
    step_tokens = given.batch * given.length
    steps = max(1, round(cell.budget / step_tokens))
    points = sorted({round(point * steps) for point in POINTS})
    settings = {**arm.settings(), **bench.facts, "steps": steps}
    student = load(bench.student(cell.target, arm.weights), device)
    learner = Learner(student, Mix(**arm.mix), betas=arm.betas, weight_decay=arm.weight_decay)
    kept = cell.kept(bench.work)
    curve: list[dict[str, Any]] = []
    seconds = 0.0
    if kept.is_file():
        found = torch.load(kept, map_location=device, weights_only=True)
        if found["settings"] != settings:
            raise SystemExit(f"{kept}: is of other settings; remove it to begin anew")
        learner.take_up(found)
        curve, seconds = found["curve"], found["seconds"]
    else:
        curve.append({"tokens": 0, **bench.start(cell.target, arm.weights, student)})
    rates, weights = arm.rates(steps), torch.ones(given.batch, given.length, device=device)
    begun = time.perf_counter()

    def put_down() -> None:
        kept.parent.mkdir(exist_ok=True)
        temporary = kept.with_suffix(".tmp")
        spent = seconds + time.perf_counter() - begun
        torch.save({**learner.state(), "curve": curve, "seconds": spent, "settings": settings}, temporary)
        temporary.replace(kept)

    with tqdm(total=steps, initial=learner.steps, desc=cell.key, unit="step", disable=None) as bar:
        while learner.steps < steps:
            if deadline.passed():
                put_down()
                raise Stopped(f"{cell.key}: at step {learner.steps} of {steps}")
            rows = torch.from_numpy(bench.blocks.batch(cell.seed, learner.steps, given.batch)).to(device)
            tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
            learner.learn(tokens, labels, weights, rates[learner.steps], answer(teacher, tokens))
            bar.update()
            if learner.steps in points:
                curve.append({"tokens": learner.steps * step_tokens, **bench.losses(student)})
            if deadline.save_is_due():
                put_down()
    seconds += time.perf_counter() - begun
    return {
        "curve": curve,
        "loss": {kind: curve[-1][kind] for kind in KINDS},
        "cloze": bench.cloze(student),
        "parameters": sum(one.numel() for one in student.parameters()),
        "seconds": seconds,
        "settings": settings,
        "device": device,
    }


class Cells:
    """The file of cells, which several runs may fill.

    Attributes:
        content: what is in it: ``facts``, ``teacher``, ``cells``.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Open it; a new one appears with its first cell.

        Raises:
            SystemExit: a table of another model, text or size of steps.
        """
        self.path, self.facts = path, dict(facts)
        self._read()

    def _read(self) -> None:
        found = json.loads(self.path.read_text()) if self.path.is_file() else {}
        if found.get("facts", self.facts) != self.facts:
            raise SystemExit(f"{self.path}: expected a table of {self.facts}, found {found['facts']}")
        self.content = {"facts": self.facts, "teacher": {}, "cells": {}} | found

    def has(self, cell: Cell, arm: Arm) -> bool:
        """Whether a cell is there.

        Raises:
            SystemExit: it is, but its arm was another one.
        """
        if cell.key not in self.content["cells"]:
            return False
        found = self.content["cells"][cell.key]["settings"]
        for name, wanted in arm.settings().items():
            if found[name] != wanted:
                raise SystemExit(f"{self.path}: {cell.key} has {name}={found[name]}, not {wanted}; take another --json")
        return True

    def add(self, part: str, values: Mapping[str, Any]) -> None:
        """Write a cell or what the teacher is, with what other runs have written meanwhile."""
        with locked(self.path):
            self._read()
            self.content[part].update(values)
            now = provenance()
            earlier = self.content.get("command", now["command"])
            if earlier != now["command"]:
                self.content["commands"] = list(dict.fromkeys(commands(now, self.content)))
            self.content |= now
            write_atomically(self.path, self.content)


def cells_of(given: argparse.Namespace, arms: Sequence[str], targets: Sequence[str]) -> Iterator[Cell]:
    """Small budgets first, so that a stopped run has whole comparisons."""
    budgets = sorted(int(float(one) * 1e6) for one in given.budgets.split(","))
    for budget in budgets:
        for seed in range(given.seeds if budget <= SEEDS_ABOVE else 1):
            for target in targets:
                yield from (Cell(target, arm, budget, seed) for arm in arms)


def main(words: Sequence[str]) -> None:
    given = arguments(words)
    if given.show:
        return report(json.loads(given.json.read_text()), given.json)
    from loop import check_device, load

    check_device(given.device)
    given.work.mkdir(parents=True, exist_ok=True)
    deadline = Deadline(given.minutes, given.save_minutes)
    arms = arms_of(given.arms.split(","), given.arm)
    targets = given.targets.split(",") if given.targets else list(TARGETS[given.model])
    bench = Bench(given)
    table = Cells(given.json, bench.facts)
    asked = list(cells_of(given, list(arms), targets))
    left = [cell for cell in asked if not table.has(cell, arms[cell.arm])]
    most = max(cell.budget for cell in asked)
    print(f"{len(left)} of {len(asked)} cells to run", flush=True)
    if most > (seen := len(bench.blocks) * given.length):
        print(f"note: {most:,} tokens need blocks of {seen:,} more than once", flush=True)
    for target in targets:
        for arm in arms.values():
            bench.student(target, arm.weights)
    if given.prepare or not left:
        return
    teacher = load(bench.teacher, given.device).eval().requires_grad_(False)
    if not table.content["teacher"]:
        table.add("teacher", {"loss": bench.losses(teacher), "cloze": bench.cloze(teacher)})
    for cell in left:
        try:
            found = run_cell(bench, teacher, cell, arms[cell.arm], deadline)
        except Stopped as stopped:
            print(f"stopped in {stopped}; the same command goes on", flush=True)
            break
        table.add("cells", {cell.key: {**vars(cell), **found, "commit": provenance()["commit"]}})
        cell.kept(bench.work).unlink(missing_ok=True)
        print(f"{cell.key}: {found['loss']}, cloze {found['cloze']}, {found['seconds']:.0f} s", flush=True)
    if table.content["cells"]:
        report(table.content, given.json)


def report(content: Mapping[str, Any], path: Path) -> None:
    """Print the table, and plot beside the file where matplotlib is."""
    print(show(content))
    try:
        plot(content, path.with_suffix(".png"))
    except ImportError:
        print("note: no plot without matplotlib")


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("recovery.py --scale", description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="GGUF, HF folder or .nemo of the model")
    parser.add_argument("--texts", type=Path, help="folder of texts.py")
    parser.add_argument("--work", type=Path, help="folder of tokens, scores, students and what was put down")
    parser.add_argument("--json", type=Path, required=True, help="table that is filled; a plot beside it")
    parser.add_argument("--model", choices=TARGETS, default="smollm2", help="whose targets")
    parser.add_argument("--targets", help="some of them, comma-separated")
    parser.add_argument("--arms", default=",".join(ARMS), help="some of them, comma-separated")
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=WEIGHTS,KEY=VALUE…", help="one more")
    parser.add_argument("--budgets", default="0.1,1,10,30", help="million tokens, comma-separated")
    parser.add_argument("--seeds", type=int, default=2, help="of budgets up to 10 million tokens; beyond, one")
    parser.add_argument("--batch", type=int, default=8, help="blocks of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a block")
    parser.add_argument("--blocks", type=int, default=64, help="of validation, of each kind")
    parser.add_argument("--samples", type=int, default=128, help="of calibration, --length tokens each")
    parser.add_argument("--cloze", type=Path, help="passages of cloze.py")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where students learn")
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="between two puttings down within a cell")
    parser.add_argument("--prepare", action="store_true", help="make tokens, scores and students, and stop")
    parser.add_argument("--show", action="store_true", help="table and plot of --json alone")
    given = parser.parse_args(words)
    if not given.show and not (given.source and given.texts and given.work):
        parser.error("--source, --texts and --work are needed to run cells")
    unknown = {one for one in given.arms.split(",") if one} - set(ARMS)
    unknown |= set(given.targets.split(",") if given.targets else []) - set(TARGETS[given.model])
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join([*ARMS, *TARGETS[given.model]])}")
    return given
