"""What the cells of ``recovery_scale.py`` share: teacher, tokens, students, and what they are judged by."""

from __future__ import annotations

import argparse
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from recovery_arms import WEIGHTS
from recovery_curves import KINDS
from zero_shot_bench import locked, stage

TARGETS: dict[str, dict[str, dict[str, int]]] = {
    "smollm2": {
        "96M": {"hidden_size": 512, "ffn_hidden_size": 1024},
        "70M": {"hidden_size": 448, "ffn_hidden_size": 672},
    },
    "qwen2_5_coder": {"331M": {"hidden_size": 768, "ffn_hidden_size": 3200}},
}
"""By their parameters; of SmolLM2-135M and of Qwen2.5-Coder-0.5B."""


@dataclass
class Blocks:
    """Training tokens of both kinds in blocks of ``length`` + 1, memory-mapped; a batch has rows of each in turn."""

    streams: Mapping[str, np.ndarray]
    length: int
    _orders: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        """Blocks of which none is seen twice."""
        return len(self.streams) * min(len(one) // (self.length + 1) for one in self.streams.values())

    def batch(self, seed: int, step: int, size: int) -> np.ndarray:
        """``[size, length + 1]`` int64 of a step; after the last block of a kind come the first again."""
        kinds, rows = list(self.streams), []
        for row in range(step * size, (step + 1) * size):
            kind = kinds[row % len(kinds)]
            order = self._order(kind, seed)
            start = int(order[(row // len(kinds)) % len(order)]) * (self.length + 1)
            rows.append(self.streams[kind][start : start + self.length + 1])
        return np.stack(rows).astype(np.int64)

    def _order(self, kind: str, seed: int) -> np.ndarray:
        if (kind, seed) not in self._orders:
            count = len(self.streams[kind]) // (self.length + 1)
            drawn = np.random.default_rng([seed, *kind.encode()]).permutation(count)
            self._orders[kind, seed] = drawn.astype(np.int32)
        return self._orders[kind, seed]


class Bench:
    """Teacher, tokens and students of one model, made once under a folder."""

    def __init__(self, given: argparse.Namespace) -> None:
        from nemo_minitron.convert import convert
        from nemo_minitron.data.tokens import open_tokens

        self.given, self.work = given, given.work
        self.targets = TARGETS[given.model]
        self.teacher = given.source if given.source.suffix == ".nemo" else self.work / "teacher.nemo"
        with locked(self.work / "prepare"):
            if not self.teacher.exists():
                convert(given.source, self.teacher)
            prefixes = {(kind, split): self._tokens(kind, split) for kind in KINDS for split in ("train", "validation")}
        self.prefixes = {kind: prefixes[kind, "train"] for kind in KINDS}
        self.blocks = Blocks({k: open_tokens(prefix).tokens for k, prefix in self.prefixes.items()}, given.length)
        self.validation = {kind: self._held_out(prefixes[kind, "validation"]) for kind in KINDS}
        self._starts: dict[tuple[str, str], dict[str, float]] = {}

    def _tokens(self, kind: str, split: str) -> Path:
        from nemo_minitron.data.preprocess import preprocess

        prefix = self.work / f"{kind}_{split}_text_document"
        if not prefix.with_name(f"{prefix.name}.idx").is_file():
            path = self.given.texts / f"{kind}_{split}.jsonl"
            preprocess(path, self.work / f"{kind}_{split}", tokenizer_type=str(self.teacher), progress=True)
        return prefix

    def _held_out(self, prefix: Path) -> Any:
        from nemo_minitron.data.blocks import token_blocks

        return token_blocks(prefix, self.given.length, num_samples=self.given.blocks, seed=0)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What the cells of one table have in common."""
        from nemo_minitron.data.tokens import data_fingerprint

        training = {kind: data_fingerprint(prefix)[:12] for kind, prefix in self.prefixes.items()}
        digest = {kind: hashlib.sha256(one.numpy().tobytes()).hexdigest()[:12] for kind, one in self.validation.items()}
        names = ("model", "length", "batch", "samples")
        cloze = self.given.cloze and hashlib.sha256(self.given.cloze.read_bytes()).hexdigest()[:12]
        return {name: getattr(self.given, name) for name in names} | {
            "training": training,
            "validation": digest,
            "cloze": cloze,
        }

    @property
    def scores(self) -> Path:
        """Folder of ``minitron importance`` on both training texts alike."""
        path = self.work / f"scores_{self.given.samples}"
        with locked(self.work / "scores"):
            if not path.is_dir():
                blend = [part for prefix in self.prefixes.values() for part in (1 / len(KINDS), str(prefix))]
                calibration = {"data_prefix": blend, "num_samples": self.given.samples, "seq_length": self.given.length}
                sections = {"calibration": calibration, "importance": {"stream": True}, "output_path": str(path)}
                stage("importance", [], sections | {"model": {"restore_from_path": str(self.teacher)}})
        return path

    def student(self, target: str, weights: str) -> Path:
        """``.nemo`` of a target whose weights were cut or re-solved."""
        path = self.work / f"{target}_{weights}_{self.given.samples}.nemo"
        scores = self.scores
        with locked(path):
            if not path.exists():
                prune = {**self.targets[target], **WEIGHTS[weights], "scores": str(scores)}
                model = {"restore_from_path": str(self.teacher)}
                stage("prune", [], {"model": model, "prune": prune, "export": {"save_path": str(path)}})
        return path

    def losses(self, model: Any) -> dict[str, float]:
        """On held-out text of both kinds, nats/token."""
        from loop import loss_of

        return {kind: loss_of(model, blocks) for kind, blocks in self.validation.items()}

    def start(self, target: str, weights: str, model: Any) -> dict[str, float]:
        """Losses of a student before its first step, measured once in a call."""
        if (target, weights) not in self._starts:
            self._starts[target, weights] = self.losses(model)
        return self._starts[target, weights]

    def cloze(self, model: Any) -> float | None:
        """Share of the passages whose last word a model finds; None without passages."""
        if self.given.cloze is None:
            return None
        from cloze import accuracy, read
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.teacher.with_name(f"{self.teacher.stem}-hf"))
        return accuracy(model, tokenizer, read(self.given.cloze))
