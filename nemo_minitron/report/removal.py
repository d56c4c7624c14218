"""What was removed where: scores and plan side by side, one axis at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nemo_minitron.importance.scores import RANKINGS, Scores
from nemo_minitron.prune.choose import keep_top
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
            for ``hidden``; None without scores. Ranks by reconstruction are not shown: they are places in an order.
        kept: bool, sized like ``worth``, False in the rows of dropped layers; None without a plan.
        ranking: which of the scores' rankings the plan follows; None where it follows neither, or nothing was cut.
    """

    name: str
    before: int
    after: int
    worth: np.ndarray | None
    kept: np.ndarray | None
    ranking: str | None

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
        ranking = None if plan is None or scores is None or after == before else _ranking(plan, scores, name)
        worth = None if scores is None else _worth(scores, "minitron", name)
        found.append(Axis(name, before, after, worth, kept, ranking))
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


def _worth(scores: Scores, ranking: str, name: str) -> np.ndarray:
    return np.atleast_2d(getattr(scores.ranked_by(ranking), name))


def _ranking(plan: Plan, scores: Scores, name: str) -> str | None:
    """The ranking whose best units are those of the plan, which does not say what it was made by."""
    for ranking in reversed(RANKINGS):
        if ranking == "reconstruction" and not scores.ranks:
            continue
        worth = _worth(scores, ranking, name)
        if name == "hidden":
            rows = [(plan.hidden, worth[0])]
        else:
            rows = [(kept, worth[layer]) for layer, kept in zip(plan.layers, getattr(plan, name), strict=True)]
        if name == "heads":  # heads are chosen within their groups
            per_group = plan.source.heads_per_group
            if all(_best_of_groups(kept, row, per_group) for kept, row in rows):
                return ranking
        elif all(keep_top(row, len(kept)) == kept for kept, row in rows):
            return ranking
    return None


def _best_of_groups(kept: tuple[int, ...], worth: np.ndarray, per_group: int) -> bool:
    for group in {head // per_group for head in kept}:
        mine = tuple(head % per_group for head in kept if head // per_group == group)
        if keep_top(worth[group * per_group : (group + 1) * per_group], len(mine)) != mine:
            return False
    return True
