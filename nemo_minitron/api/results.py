"""What calls return: files by name, with what is in them read when it is asked for.

All are paths to functions that take one (``os.fspath``), so that what one call returns another takes.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_minitron.model.shape import ModelShape
    from nemo_minitron.prune.plan import Plan

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, repr=False)
class _File(os.PathLike[str]):
    """A file or folder that a call wrote.

    Attributes:
        path: where it is.
    """

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}('{self.path}')"


@dataclass(frozen=True, repr=False)
class Checkpoint(_File):
    """A model: a ``.nemo`` file, or what ``convert`` wrote."""

    @cached_property
    def shape(self) -> ModelShape:
        """Sizes of the model, read from its config.

        Raises:
            MinitronError: no ``.nemo`` of a model that is supported.
        """
        from nemo_minitron.checkpoint import NemoReader

        with NemoReader(self.path) as reader:
            return reader.shape

    @property
    def num_parameters(self) -> int:
        """Number of parameters; a tied table counts once."""
        return self.shape.num_parameters()


@dataclass(frozen=True, repr=False)
class Student(Checkpoint):
    """A pruned model.

    Attributes:
        plan_path: the plan that made it, which says what was kept and what was measured.
    """

    plan_path: Path

    @cached_property
    def plan(self) -> Plan:
        """What was kept, and the losses of cut and re-solved weights on text that was held back."""
        from nemo_minitron.prune.plan import Plan

        return Plan.load(self.plan_path)


@dataclass(frozen=True, repr=False)
class Scores(_File):
    """A scores folder: what each unit of a model is worth, and the calibration tokens."""


@dataclass(frozen=True, repr=False)
class SearchResult(_File):
    """What a search found: a folder of candidates, with a plan for each that was measured."""

    @cached_property
    def candidates(self) -> list[dict[str, Any]]:
        """Candidates, best first, as ``candidates.yaml`` has them.

        Each has a ``name``, a ``role``, sizes, costs and a ``predicted`` loss; those that came so far also
        ``zero_shot``, ``distilled`` (a loss for each round) and ``plan``, relative to the folder.
        """
        return list(self._file["candidates"])

    @property
    def teacher_loss(self) -> float | None:
        """Loss of the model that is pruned, in nats per token; None where it was not measured."""
        return self._file["source"]["loss"]

    @property
    def plan(self) -> Path | None:
        """Plan of the winner, which ``prune(…, plan=…)`` applies; None where the search ended before there was one."""
        name = self._file["winner"]
        found = [candidate for candidate in self.candidates if candidate["name"] == name and "plan" in candidate]
        return self.path / found[0]["plan"] if found else None

    @property
    def scores(self) -> Path | None:
        """Scores that the plan is for, of the fewer tokens of ``search.tokens``; None: those that were given."""
        found = self.path / "scores"
        return found if found.is_dir() else None

    @cached_property
    def _file(self) -> dict[str, Any]:
        import yaml

        return yaml.safe_load((self.path / "candidates.yaml").read_text())


@dataclass(frozen=True, repr=False)
class Tokens(_File):
    """Token files of one text; ``path`` is their prefix, that of ``PREFIX.bin`` and ``PREFIX.idx``."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model.

    Attributes:
        values: all of it, as ``minitron evaluate`` writes it: ``num_parameters``,
            ``peak_memory_bytes``, and sections such as ``lm_eval``.
    """

    values: dict[str, Any]

    @property
    def loss(self) -> float:
        """Validation loss in nats per token."""
        return float(self.values["val_loss"])

    @property
    def perplexity(self) -> float:
        """Exponential of :attr:`loss`."""
        return float(self.values["perplexity"])

    @classmethod
    def read(cls, path: PathLike) -> Evaluation:
        """Read a JSON file that ``minitron evaluate`` wrote."""
        return cls(json.loads(Path(path).read_text()))


@dataclass(frozen=True)
class Run:
    """A run of a recipe.

    Attributes:
        folder: of the run.
        evaluations: by role: ``teacher``, ``pruned``, ``distilled``, those that the recipe has.
    """

    folder: Path
    evaluations: dict[str, Evaluation]

    @property
    def student(self) -> Checkpoint:
        """The distilled model, where the recipe's stages have written it."""
        return Checkpoint(self.folder / "distilled.nemo")

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.folder / "report.html"
