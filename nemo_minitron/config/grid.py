"""Sizes of a job, read once from NeMo's ``model`` and Lightning's ``trainer`` section: grid, machines, precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Grid:
    """How a model is spread over ranks: ``tensor`` × ``pipeline`` of them hold one replica."""

    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Grid:
        """The grid that a ``model`` section asks for; a key that is absent or null means 1, as in NeMo."""
        tensor, pipeline = (int(model.get(f"{kind}_model_parallel_size") or 1) for kind in ("tensor", "pipeline"))
        return cls(tensor, pipeline, bool(model.get("sequence_parallel")))

    def data_ranks(self, processes: int) -> int:
        """Replicas among the ``processes`` of a job; at least one."""
        return max(1, processes // (self.tensor * self.pipeline))


@dataclass(frozen=True)
class Machines:
    """What a ``trainer`` section says of the processes and their arithmetic.

    Attributes:
        devices: processes on each of ``num_nodes`` machines.
        precision: 32, bf16 or 16, as Lightning's Trainer takes it.
    """

    devices: int = 1
    num_nodes: int = 1
    precision: str | int = 32

    @classmethod
    def of(cls, trainer: Mapping[str, Any]) -> Machines:
        """Read a ``trainer`` section; a key that is absent or null has Lightning's default, one process in float32.

        ``devices`` is a number by the time a command runs: :func:`nemo_minitron.cli.processes_to_launch` counts
        ``auto``. Where nothing was launched (``distill plan_only=true``) what is no number counts as one.
        """
        devices = str(trainer.get("devices") or 1)
        precision = trainer.get("precision")
        return cls(
            int(devices) if devices.isdigit() else 1,
            int(trainer.get("num_nodes") or 1),
            32 if precision is None else precision,
        )

    @property
    def half(self) -> bool:
        """Whether matrix products run in bfloat16."""
        return str(self.precision).startswith("bf16")
