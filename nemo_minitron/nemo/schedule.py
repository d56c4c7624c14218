"""Learning rates of a run, step by step: NeMo's schedules, none of whose steps has a rate of 0."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from nemo.core.config.schedulers import CosineAnnealingParams
from nemo.core.optim.lr_scheduler import (
    AVAILABLE_SCHEDULERS,
    CosineAnnealing,
    WarmupAnnealHoldPolicy,
    get_scheduler,
    register_scheduler,
)

from nemo_minitron.errors import MinitronError
from nemo_minitron.values.rules import shown

MOST_STEPS = 100_000
"""Steps that are looked at; of a longer run every n-th."""


class WarmCosineAnnealing(CosineAnnealing):
    """NeMo's CosineAnnealing with a constant end, whose warm-up begins above 0.

    With ``constant_steps`` NeMo's own warms up by ``step / warmup_steps``, so that the first step does nothing; without
    them by ``(step + 1) / (warmup_steps + 1)``, as here.
    """

    def _get_warmup_lr(self, step: int) -> list[float]:
        return WarmupAnnealHoldPolicy._get_warmup_lr(self, step)


def in_nemo(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule as NeMo is to be given it: :class:`WarmCosineAnnealing` where that differs."""
    name = WarmCosineAnnealing.__name__
    if name not in AVAILABLE_SCHEDULERS:
        register_scheduler(name, WarmCosineAnnealing, CosineAnnealingParams)
    constant = schedule.get("constant_steps") or schedule.get("constant_ratio")
    return {**schedule, "name": name} if schedule["name"] == "CosineAnnealing" and constant else dict(schedule)


def rates(schedule: Mapping[str, Any], lr: float, max_steps: int) -> Iterator[tuple[int, float]]:
    """(step, rate) of a run, from NeMo's own schedule; of more than :data:`MOST_STEPS` every n-th and the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    arguments = {key: value for key, value in schedule.items() if key != "name"}
    found = get_scheduler(schedule["name"], **arguments, max_steps=max_steps)(optimizer)
    found._get_lr_called_within_step = True
    for step in [*range(0, max_steps, math.ceil(max_steps / MOST_STEPS)), max_steps - 1]:
        found.last_epoch = step
        yield step, found.get_lr()[0]


def check_rates(schedule: Mapping[str, Any], lr: float, max_steps: int) -> None:
    """Refuse a schedule one of whose steps has no rate above 0, or that rises above ``model.optim.lr``.

    Raises:
        MinitronError: naming ``model.optim.sched`` and the step.
    """
    told = ", ".join(f"{key}={shown(value)}" for key, value in schedule.items() if value is not None)
    try:
        for step, rate in rates(schedule, lr, max_steps):
            if not (isinstance(rate, int | float) and 0 < rate <= lr * (1 + 1e-9)):
                raise MinitronError(
                    f"model.optim.sched: step {step} of trainer.max_steps={max_steps} would have a learning rate of "
                    f"{rate}, expected above 0 and at most model.optim.lr={lr} ({told}); set model.optim.sched.min_lr "
                    "or other lengths of its parts"
                )
    except (AssertionError, ValueError, ArithmeticError, TypeError) as error:
        raise MinitronError(
            f"model.optim.sched: {told} is no schedule for trainer.max_steps={max_steps}: {error or 'lengths clash'}"
        ) from None
