"""Arms of ``recovery_scale.py``: the weights that a student begins with, and how it learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WEIGHTS: dict[str, dict[str, Any]] = {"cut": {"compensate": False}, "resolved": {}}
"""Keys of ``prune``."""
ARMS = ("nvidia", "cut", "ours")


@dataclass(frozen=True)
class Arm:
    """Weights that a student begins with, and how it learns; ``most_warm_up`` of the run is the most for warm-up."""

    weights: str
    lr: float
    schedule: Mapping[str, Any]
    betas: tuple[float, float]
    weight_decay: float
    mix: Mapping[str, Any]
    most_warm_up: float = 1.0

    def rates(self, steps: int) -> list[float]:
        """Learning rate of every step of a run, by NeMo's own schedule."""
        from nemo_minitron.nemo.schedule import in_nemo, rates

        warm_up = min(int(self.schedule["warmup_steps"]), max(1, int(self.most_warm_up * steps)))
        schedule = in_nemo({**self.schedule, "warmup_steps": warm_up})
        return [rate for _, rate in rates(schedule, self.lr, steps)][:steps]

    def settings(self) -> dict[str, Any]:
        return {**vars(self), "schedule": dict(self.schedule), "betas": list(self.betas), "mix": dict(self.mix)}


def published() -> Arm:
    """NVIDIA's recipe."""
    schedule = {"name": "CosineAnnealing", "warmup_steps": 100, "min_lr": 1e-5}
    mix = {"loss": "forward_kl", "temperature": 1.0, "kd_weight": 1.0, "lm_weight": 0.0}
    return Arm("cut", 1e-4, schedule, (0.9, 0.95), 0.1, mix, most_warm_up=0.1)


def of_product(weights: str, overrides: Sequence[str] = ()) -> Arm:
    """What ``minitron distill`` does, with ``KEY=VALUE`` of its own.

    Raises:
        SystemExit: settings that this loop does not have.
    """
    from omegaconf import OmegaConf

    from nemo_minitron.config.compose import compose

    files = {"restore_from_path": "-", "kd_teacher_restore_from_path": "-", "nemo_path": "-"}
    found = compose("distill", list(overrides), config={"model": {**files, "data": {"data_prefix": ["-"]}}})
    cfg: Any = OmegaConf.to_container(found, resolve=True)
    distill, optim = cfg["distill"], cfg["model"]["optim"]
    if distill["hidden_pairs"] or distill["teacher_cache"] or optim["name"] != "adamw":
        raise SystemExit("arms learn from logits of a teacher at hand by adamw: no distill.hidden_pairs, no cache")
    if weights not in WEIGHTS:
        raise SystemExit(f"--arm: expected {' or '.join(WEIGHTS)} weights, found {weights!r}")
    mix = {name: distill[name] for name in ("loss", "temperature", "kd_weight", "lm_weight", "jsd_beta", "top_k")}
    betas = (float(optim["betas"][0]), float(optim["betas"][1]))
    return Arm(weights, float(optim["lr"]), optim["sched"], betas, float(optim["weight_decay"]), mix)


def arms_of(names: Sequence[str], further: Sequence[str]) -> dict[str, Arm]:
    """The asked ones, and ``NAME=WEIGHTS,KEY=VALUE…``."""
    known = {"nvidia": published, "cut": lambda: of_product("cut"), "ours": lambda: of_product("resolved")}
    arms = {name: known[name]() for name in names if name}
    for one in further:
        name, _, rest = one.partition("=")
        weights, *overrides = rest.split(",")
        arms[name] = of_product(weights, overrides)
    return arms
