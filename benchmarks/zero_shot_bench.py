"""The teacher of ``zero_shot.py``, the tokens that all methods see, and the students that they make of it.

``ours`` goes through ``minitron importance`` and ``minitron prune`` with their defaults, but for the two settings that
:meth:`Bench.scores` and :meth:`Bench.prune` name.
"""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from provenance import provenance
from zero_shot_texts import LENGTH, SETTINGS, texts_of, write_blocks

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
"""Of SmolLM2-135M."""
QWEN_TARGETS: dict[str, dict[str, int]] = {
    "ffn 4864→3648": {"ffn_hidden_size": 3648},
    "ffn 4864→2432": {"ffn_hidden_size": 2432},
    "groups 2→1": {"num_query_groups": 1},
    "hidden 896→768": {"hidden_size": 768},
    "layers 24→20": {"num_layers": 20},
}
SAMPLES = 64
"""Of calibration, at most."""
METHODS = ("random", "magnitude", "plain", "ours", "ours_unscaled", "ours_greedy", "oscar", "replaceme")


@dataclass(frozen=True)
class Model:
    """One that is pruned: its targets by their rows' names, and the kind of text that it is calibrated on."""

    targets: Mapping[str, Mapping[str, int]]
    own: str


MODELS = {"smollm2": Model(TARGETS, "brown"), "qwen2_5_coder": Model(QWEN_TARGETS, "python")}


class Bench:
    """The teacher as ``.nemo``, the tokens that every row sees, and what is known of its units.

    Attributes:
        teacher: path; weights: its fingerprint; num_layers: its depth.
        texts: blocks ``[n, 512]`` to evaluate on, by name.
        heads: ``[n, 512]`` of all documents of the calibration's kind; others: numbers of those not evaluated on.
        draw: number of the calibration's draw. calibration: ``[samples, 512]`` of it.
        seconds: what scores, ranks and the order of layers took, where they are asked for.
    """

    def __init__(
        self,
        source: Path,
        brown: Path,
        folder: Path,
        *,
        samples: int = SAMPLES,
        setting: str = "lines",
        model: str = "smollm2",
        texts: Mapping[str, Path] | None = None,
        overrides: Mapping[str, Sequence[str]] | None = None,
        fmchisel: Path | None = None,
        update_iter: int = 1,
    ) -> None:
        """Convert and tokenize.

        Args:
            overrides: further ``KEY=VALUE`` of ``importance`` and ``prune`` for ``ours``.
            fmchisel, update_iter: wheel and a setting of ``oscar``.
        """
        from nemo_minitron.checkpoint import NemoReader
        from nemo_minitron.convert import convert

        self.folder, self.model, self.setting, self.samples = folder, MODELS[model], setting, samples
        self.overrides = {"importance": [], "prune": []} | dict(overrides or {})
        self.fmchisel, self.update_iter = fmchisel, update_iter
        self.teacher = source if source.suffix == ".nemo" else folder / "teacher.nemo"
        if not self.teacher.exists():
            convert(source, self.teacher)
        with NemoReader(self.teacher) as reader:
            self.weights, self.num_layers = reader.fingerprint(), reader.shape.num_layers
        found = texts_of(self.model.own, SETTINGS[setting].lines, brown, texts or {}, self.teacher, folder)
        self.heads, self.others = found.heads, found.others
        self.texts, self.fingerprints = found.blocks, found.fingerprints()
        self._take(0)

    def at(self, draw: int) -> Bench:
        """The same with the calibration of another draw."""
        other = copy.copy(self)
        for name in ("ways", "scores", "hf_teacher"):
            other.__dict__.pop(name, None)
        other._take(draw)
        return other

    def _take(self, draw: int) -> None:
        self.draw = draw
        self.calibration = self.heads[SETTINGS[self.setting].calibration(self.others, draw)[: self.samples]]
        self.kept = self.folder / f"draw{draw}_{self.setting}_{self.samples}"
        self.kept.mkdir(exist_ok=True)
        self.seconds: dict[str, float] = {}

    @functools.cached_property
    def trainer(self) -> Any:
        from nemo_minitron.nemo.trainer import inference_trainer

        return inference_trainer()

    def load(self, path: Path) -> Any:
        """The model on one process."""
        trainer = self.trainer
        from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

        from nemo_minitron.nemo.restore import load_model

        destroy_num_microbatches_calculator()
        return load_model(path, trainer)

    def losses(self, path: Path) -> dict[str, float]:
        """Of a ``.nemo`` on every text, nats/token."""
        return self.losses_of(self.load(path))

    def losses_of(self, model: Any) -> dict[str, float]:
        """Of a loaded model."""
        from nemo_minitron.evaluate import evaluate

        return {name: evaluate(model, blocks, micro_batch_size=4)["val_loss"] for name, blocks in self.texts.items()}

    @functools.cached_property
    def ways(self) -> dict[str, dict[str, np.ndarray]]:
        """What each unit is worth by the methods that cut."""
        from nemo_minitron.checkpoint import NemoReader

        scores = self._timed("scores_s", self.kept / "plain.npz", self._plain_scores)
        generator = np.random.default_rng(0)
        with NemoReader(self.teacher) as reader:
            return {
                "random": {name: generator.random(array.shape) for name, array in scores.items()},
                "magnitude": scores | magnitudes(reader),
                "plain": scores,
            }

    def _plain_scores(self, path: Path) -> None:
        from tqdm import tqdm

        from nemo_minitron import runtime
        from nemo_minitron.importance.collect import collect
        from nemo_minitron.importance.reductions import Aggregation

        model, device = self.load(self.teacher), runtime.device()
        batches = tqdm(self.calibration.to(device).split(4), desc="importance", unit="batch", disable=None)
        how = Aggregation(unit=SETTINGS[self.setting].unit)
        scores, _ = collect(model.model.to(device), batches, model.shape, aggregation=how)
        np.savez(path, **scores)

    @functools.cached_property
    def scores(self) -> Path:
        """Folder of ``minitron importance`` on the calibration, all of whose tokens serve for ranks and re-solving."""
        given = self.overrides["importance"]
        name = "scores" + (f"_{hashlib.sha256(repr(given).encode()).hexdigest()[:8]}" if given else "")

        def measure(path: Path) -> None:
            prefix = write_blocks(self.calibration, self.kept / "calibration")
            calibration = {
                "data_prefix": [str(prefix)],
                "num_samples": len(self.calibration),
                "seq_length": LENGTH,
                "seed": self.draw,
            }
            tokens = self.calibration.numel()
            if tokens > 65536:
                calibration["reconstruction_tokens"] = tokens
            sections = {"calibration": calibration, "importance": {"stream": True}, "output_path": str(path)}
            stage("importance", given, sections | {"model": {"restore_from_path": str(self.teacher)}})

        self._timed("ranks_s", self.kept / name, measure)
        return self.kept / name

    def layers_to_drop(self, count: int) -> list[int]:
        """1-indexed, chosen one by one by the loss without them; one greedy search serves all smaller counts."""
        from nemo_minitron.checkpoint import NemoReader
        from nemo_minitron.config.sections import Prune
        from nemo_minitron.importance.scores import Scores
        from nemo_minitron.prune.layers import layers_by_loss

        scores = self.scores
        file = self.kept / f"layers_{scores.name}.json"
        most = max([count, *self._removals()])

        def measure(path: Path) -> None:
            with NemoReader(self.teacher) as reader:
                _, steps = layers_by_loss(reader, "greedy", most, Scores.load(scores), tokens=Prune.layer_tokens)
            path.write_text(json.dumps([[layer + 1 for layer in step.removed] for step in steps]))

        if file.is_file() and len(json.loads(file.read_text())) < count:
            file.unlink()
        self._timed("layers_s", file, measure)
        return json.loads(file.read_text())[count - 1]

    def _removals(self) -> list[int]:
        kept = (target["num_layers"] for target in self.model.targets.values() if "num_layers" in target)
        return [self.num_layers - layers for layers in kept]

    def prepare(self, target: Mapping[str, int], greedy: bool) -> None:
        """Measure what ``ours`` needs for a target and all others share."""
        self.scores  # noqa: B018
        if "num_layers" in target and greedy:
            self.layers_to_drop(self.num_layers - target["num_layers"])

    def prune(self, method: str, target: Mapping[str, int], path: Path) -> None:
        """Write the student that a method makes of a target.

        Raises:
            peers.CannotPrune: a peer that does not do such a target.
        """
        if method.startswith("ours"):
            self._ours(target, path, rescale=method != "ours_unscaled", greedy=method == "ours_greedy")
        elif method in ("oscar", "replaceme"):
            from peers import student_of

            student_of(self, method, target, path)
        else:
            self._cut(method, target, path)

    def _ours(self, target: Mapping[str, int], path: Path, rescale: bool, greedy: bool) -> None:
        """``minitron prune``, layers by Block Influence, as it does when nothing is said, or greedily."""
        prune: dict[str, Any] = dict(target) | {"scores": str(self.scores)}
        if "num_layers" in target and greedy:
            prune["drop_layers"] = self.layers_to_drop(self.num_layers - target["num_layers"])
        plan = path.with_suffix(".plan.yaml")
        if not rescale:
            plan.write_text(self._unscaled(prune))
            prune = {"scores": prune["scores"], "plan": str(plan)}
            plan = path.with_suffix(".applied.yaml")
        files = {"save_path": str(path), "plan_path": str(plan)}
        model = {"restore_from_path": str(self.teacher)}
        stage("prune", self.overrides["prune"], {"model": model, "prune": prune, "export": files})

    def _unscaled(self, prune: Mapping[str, Any]) -> str:
        """The plan of a ``prune`` section, as YAML, under which the final norm follows no loss."""
        from nemo_minitron.checkpoint import NemoReader
        from nemo_minitron.config.sections import Prune
        from nemo_minitron.importance.scores import Scores
        from nemo_minitron.prune.request import make_requested_plan

        with NemoReader(self.teacher) as reader:
            plan = make_requested_plan(reader, Prune(**prune), Scores.load(self.scores), half=True)
        compensation = dataclasses.replace(plan.compensation, rescale=False, regain=False)
        return dataclasses.replace(plan, compensation=compensation).to_yaml()

    def _cut(self, method: str, target: Mapping[str, int], path: Path) -> None:
        from nemo_minitron.checkpoint import NemoReader
        from nemo_minitron.prune.choose import make_plan
        from nemo_minitron.prune.student import write_student

        worth = SimpleNamespace(**self.ways[method])
        with NemoReader(self.teacher) as reader:
            plan = make_plan(reader.shape, worth, target, source_fingerprint=reader.fingerprint())
            write_student(reader, plan, path, path.with_suffix(".plan.yaml"), None, reader.tokenizer_folder())

    def _timed(self, name: str, path: Path, make: Callable[[Path], None]) -> Any:
        """What ``make`` writes to a path, made once; how long it took and of which commit it is are kept beside it."""
        file, commit = self.kept / "made.json", provenance()["commit"]
        with locked(file):  # another run of the same draw waits, and finds it
            known = json.loads(file.read_text()) if file.is_file() else {}
            if not path.exists():
                start = time.perf_counter()
                make(path)
                known[path.name] = {"seconds": time.perf_counter() - start, "commit": commit}
                write_atomically(file, known)
        of = known.get(path.name, {"seconds": 0.0, "commit": "not known"})
        if of["commit"] != commit and name not in self.seconds:
            print(f"note: {path} is of commit {of['commit']}; remove it to have it measured anew", flush=True)
        self.seconds[name] = of["seconds"]
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return dict(arrays)
        return path


def stage(command: str, overrides: Sequence[str], config: Mapping[str, Any]) -> None:
    """Run ``minitron COMMAND`` in this process."""
    from nemo_minitron.config.check import instance
    from nemo_minitron.config.compose import compose
    from nemo_minitron.config.schema import COMMANDS

    cfg = compose(command, list(overrides), config=config)
    importlib.import_module(f"nemo_minitron.stages.{command}").run(instance(COMMANDS[command], cfg))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time works on what is at a path."""
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, content: Any) -> None:
    """JSON that appears at once or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    temporary.replace(path)


def magnitudes(reader: Any) -> dict[str, np.ndarray]:
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
