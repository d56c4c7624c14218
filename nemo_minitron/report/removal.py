"""What was removed where: scores and plan side by side, one axis at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nemo_minitron.prune.plan import Plan
from nemo_minitron.report.run_folder import Run

_SIZES = {
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "heads": "num_attention_heads",
    "groups": "num_query_groups",
}


@dataclass(frozen=True)
class Axis:
    """One kind of unit.

    Attributes:
        name: ``hidden``, ``ffn``, ``heads`` or ``groups``; before, after: how many each layer has.
        worth: ``[rows, before]``, the published importance (size of activations); one row per source layer, one in all
            for ``hidden``; None without scores. Other rankings are not shown: those by reconstruction are places in an
            order, and of an unknown one nobody can tell.
        kept: bool, sized like ``worth``, False in the rows of dropped layers; None without a plan.
        ranking: by which ranking the plan says that it chose; None where it does not say, or nothing was cut.
        by_loss: whether the plan says that it chose by the loss without each unit, whatever ranks other units.
    """

    name: str
    before: int
    after: int
    worth: np.ndarray | None
    kept: np.ndarray | None
    ranking: str | None
    by_loss: bool = False

    @property
    def is_cut(self) -> bool:
        return self.after < self.before

    def worth_kept(self) -> np.ndarray | None:
        """Share of each row's summed importance that stays, ``[rows]``; None where that is unknown or negative."""
        if self.worth is None or self.kept is None or (self.worth < 0).any():
            return None
        total = self.worth.sum(1)
        return np.divide((self.worth * self.kept).sum(1), total, out=np.ones_like(total), where=total > 0)


def axes(run: Run) -> list[Axis]:
    """Every axis that plan or scores know, the widest units first."""
    plan, scores = run.plan, run.scores
    shape = plan.source if plan is not None else scores.shape if scores is not None else None
    if shape is None:
        return []
    found = []
    for name, size in _SIZES.items():
        before = getattr(shape, size)
        after = before if plan is None else getattr(plan.target, size)
        kept = None if plan is None else _kept(plan, name, before)
        ranking = None if plan is None or after == before else plan.ranking
        by_loss = plan is not None and plan.selection.get(name) == "loss"
        worth = None if scores is None else np.atleast_2d(scores.published[name])
        found.append(Axis(name, before, after, worth, kept, ranking, by_loss))
    return found


def dropped_layers(plan: Plan | None) -> tuple[int, ...]:
    """Layers of the source that are gone, 0-based."""
    return () if plan is None else tuple(sorted(set(range(plan.source.num_layers)) - set(plan.layers)))


def _kept(plan: Plan, name: str, before: int) -> np.ndarray:
    if name == "hidden":
        mask = np.zeros((1, before), dtype=bool)
        mask[0, list(plan.hidden)] = True
        return mask
    mask = np.zeros((plan.source.num_layers, before), dtype=bool)
    for layer, row in zip(plan.layers, getattr(plan, name), strict=True):
        mask[layer, list(row)] = True
    return mask
