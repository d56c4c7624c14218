"""Choose what a pruned model keeps: from what was asked and what each unit is worth to a :class:`Plan`.

The same scores and the same target give the same plan, byte for byte.

Ties. Two scores count as equal when they differ by at most ``TIE`` of the larger, and equals are chained: a run of
neighbours in the ranking, each within ``TIE`` of the next, is one class, of which the lower indices are kept. Rounding
the scores instead would let two equal units that sit on either side of a rounding border be ranked by noise; a chain
has no borders. Units that are equal in exact arithmetic (duplicates, dead neurons) are therefore ordered by index on
every grid, as long as accumulation noise stays below ``TIE``; only a true gap that happens to be ``TIE`` wide, give or
take the noise, could still be read either way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from nemo_minitron.config.layer_selection import LAYER_SELECTIONS
from nemo_minitron.config.sections import Prune
from nemo_minitron.errors import MinitronError, check_choice, did_you_mean
from nemo_minitron.importance.scores import Scores
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.measured import hold_out
from nemo_minitron.prune.plan import TARGETS, Compensation, Indices, Plan

TIE = 1e-6
WEIGHTING = 0.5
"""Exponent of the sensitivity in new plans, see :class:`nemo_minitron.prune.plan.Compensation`."""


class ScoreArrays(Protocol):
    """The arrays that plans are chosen from (:class:`nemo_minitron.importance.scores.Worth`)."""

    @property
    def ffn(self) -> np.ndarray | None: ...
    @property
    def heads(self) -> np.ndarray | None: ...
    @property
    def groups(self) -> np.ndarray | None: ...
    @property
    def hidden(self) -> np.ndarray | None: ...
    @property
    def block_influence(self) -> np.ndarray: ...
    @property
    def residual_cosine(self) -> np.ndarray: ...


def target_shape(
    shape: ModelShape,
    target: Mapping[str, int | None],
    drop_layers: Sequence[int] | None = None,
    layer_selection: str = Prune.layer_selection,
) -> ModelShape:
    """Shape that a request leads to, refusing impossible ones; needs no scores. See :func:`make_plan`."""
    wanted = _check_target(shape, target)
    dropped = _check_drop_layers(shape, wanted, drop_layers)
    check_choice("prune.layer_selection", layer_selection, LAYER_SELECTIONS)
    if not wanted and not dropped:
        keys = ", ".join(f"prune.{name}" for name in (*TARGETS, "drop_layers"))
        raise MinitronError(f"prune: nothing requested; set at least one of {keys}")
    groups = wanted.get("num_query_groups", shape.num_query_groups)
    heads = wanted.get("num_attention_heads", shape.heads_per_group * groups)
    if heads % groups:
        raise MinitronError(
            f"prune.num_attention_heads ({heads}) must be a multiple of the query groups kept ({groups})"
        )
    if heads // groups > shape.heads_per_group:
        raise MinitronError(
            f"prune.num_attention_heads: {heads // groups} heads per group asked ({heads} heads in {groups} groups), "
            f"{shape.heads_per_group} available"
        )
    new = shape.replace(
        hidden_size=wanted.get("hidden_size", shape.hidden_size),
        ffn_hidden_size=wanted.get("ffn_hidden_size", shape.ffn_hidden_size),
        num_attention_heads=heads,
        num_query_groups=groups,
        num_layers=wanted.get("num_layers", shape.num_layers - len(dropped)),
    )
    if new == shape:
        sizes = ", ".join(f"prune.{name}={size}" for name, size in wanted.items())
        raise MinitronError(f"prune: nothing to remove; every requested size equals the source's: {sizes}")
    return new


def needs_scores(shape: ModelShape, new: ModelShape, drop_layers: Sequence[int] | None) -> bool:
    """Whether anything is left to choose: all but the removal of named layers needs scores."""
    return new != (shape.replace(num_layers=new.num_layers) if drop_layers else shape)


def ranked_axes(shape: ModelShape, new: ModelShape) -> tuple[str, ...]:
    """Axes of which some units go and a ranking says which."""
    sizes = {
        "ffn": new.ffn_hidden_size < shape.ffn_hidden_size,
        "heads": new.heads_per_group < shape.heads_per_group,
        "groups": new.num_query_groups < shape.num_query_groups,
        "hidden": new.hidden_size < shape.hidden_size,
    }
    return tuple(axis for axis, smaller in sizes.items() if smaller)


def make_plan(
    shape: ModelShape,
    scores: ScoreArrays | None,
    target: Mapping[str, int | None],
    *,
    drop_layers: Sequence[int] | None = None,
    layer_selection: str = Prune.layer_selection,
    source_fingerprint: str,
    compensation: Compensation | None = None,
    ranking: str | None = None,
) -> Plan:
    """Choose what to keep.

    Args:
        shape: of the source.
        scores: what each unit is worth; only the arrays that the target needs are read, and ``None`` will do where
            the layers to drop are named and nothing else is asked.
        target: requested sizes by the names of ``TARGETS``; ``None`` means unchanged. ``num_query_groups`` alone
            keeps the heads per group (A' = r·G'); ``num_attention_heads`` alone keeps the groups.
        drop_layers: layers to remove, **1-indexed** as in NeMo's ``prune.drop_layers``; None or empty: none named.
        layer_selection: for ``num_layers``: ``block_influence`` drops the layers of lowest Block Influence one by one
            (arXiv 2403.03853, 2407.14679), ``contiguous`` the one block of consecutive layers whose output is nearest
            in cosine to its input (arXiv 2403.17887). Layers that are chosen by loss come in ``drop_layers``.
        ranking: name of what ``scores`` rank by; the plan says it where it decided something.

    Raises:
        MinitronError: nothing requested; a size larger than there is, not positive or not divisible; an unknown
            name; layers out of range, repeated or in disagreement with ``num_layers``; missing or non-finite scores.
    """
    new = target_shape(shape, target, drop_layers, layer_selection)
    layers = tuple(range(shape.num_layers))
    if drop_layers:
        layers = tuple(layer for layer in layers if layer + 1 not in drop_layers)
    elif new.num_layers < shape.num_layers:
        if LAYER_SELECTIONS[layer_selection].by_loss:
            raise ValueError(f"layer_selection={layer_selection}: the layers must be chosen before and be given")
        layers = BY_SCORES[layer_selection](shape, scores, new.num_layers)
    plan = Plan.identity(shape.replace(num_layers=len(layers)), source_fingerprint)
    hidden, ffn, groups, heads = plan.hidden, plan.ffn, plan.groups, plan.heads
    if new.hidden_size < shape.hidden_size:
        hidden = keep_top(_array(scores, "hidden", (shape.hidden_size,)), new.hidden_size)
    if new.ffn_hidden_size < shape.ffn_hidden_size:
        worth = _array(scores, "ffn", (shape.num_layers, shape.ffn_hidden_size))
        ffn = tuple(keep_top(worth[layer], new.ffn_hidden_size) for layer in layers)
    if new.num_query_groups < shape.num_query_groups:
        worth = _array(scores, "groups", (shape.num_layers, shape.num_query_groups))
        groups = tuple(keep_top(worth[layer], new.num_query_groups) for layer in layers)
    if new.num_attention_heads < shape.num_attention_heads:
        heads = tuple(
            _choose_heads(shape, scores, layer, kept, new.heads_per_group)
            for layer, kept in zip(layers, groups, strict=True)
        )
    made_by = ranking if ranked_axes(shape, new) else None
    return Plan(source_fingerprint, shape, new, layers, hidden, ffn, groups, heads, compensation, made_by)


def targets_of(prune: Prune) -> dict[str, int | None]:
    """Sizes that a ``prune`` section asks for, by the names of ``TARGETS``; None where nothing is said."""
    return {name: getattr(prune, name) for name in TARGETS}


def plan_from_scores(
    shape: ModelShape, fingerprint: str, prune: Prune, scores: Scores | None, groups: np.ndarray | None = None
) -> Plan:
    """The plan that a ``prune`` section asks for; no weights are needed.

    Args:
        fingerprint: of the weights of the source.
        prune: with layers named in ``drop_layers`` where they are chosen by loss.
        groups: ``[L, G]``, worth of query groups in the place of what the ranking says of them.

    Raises:
        MinitronError: as :func:`make_plan`; ``prune.rotate`` where nothing can be rotated.
    """
    tokens = None if scores is None else scores.tokens_fingerprint()
    ranked = scores is not None and "reconstruction" in scores.rankings
    turnable = scores is not None and scores.stream_moment is not None
    narrower = (prune.hidden_size or shape.hidden_size) < shape.hidden_size
    if prune.rotate and not (turnable and narrower and tokens is not None and prune.compensate is not False):
        raise MinitronError(
            "prune.rotate: needs prune.hidden_size below the source's, prune.compensate, and scores by reconstruction"
        )
    compensation = None
    if scores is not None and scores.tokens is not None and tokens is not None and prune.compensate is not False:
        held_out = hold_out(len(scores.tokens), scores.own_samples)
        turned = turnable and narrower and prune.rotate is not False
        compensation = Compensation(
            tokens, rotate=turned, rescale=True, weighting=WEIGHTING, held_out=held_out, regain=True
        )
    ranking = prune.ranking or ("reconstruction" if compensation and ranked else "minitron")
    target = targets_of(prune)
    axes = ranked_axes(shape, target_shape(shape, target, prune.drop_layers, prune.layer_selection))
    worth = None if scores is None else scores.ranked_by(ranking, axes)
    if worth is not None and groups is not None:
        worth = dataclasses.replace(worth, groups=groups)
    return make_plan(
        shape,
        worth,
        target,
        drop_layers=prune.drop_layers,
        layer_selection=prune.layer_selection,
        source_fingerprint=fingerprint,
        compensation=compensation,
        ranking=ranking,
    )


def keep_top(worth: np.ndarray, count: int) -> Indices:
    """Indices of the ``count`` largest of ``worth [n]``, ascending; ties as the module says, by lower index."""
    order = np.argsort(-worth, kind="stable")
    ranked = worth[order]
    gap = np.abs(np.diff(ranked)) > TIE * np.maximum(np.abs(ranked[:-1]), np.abs(ranked[1:]))
    tie_class = np.concatenate(([0], np.cumsum(gap)))  # number of its class, in ranking order
    at_cut = tie_class == tie_class[count - 1]
    above = order[: int(np.argmax(at_cut))]
    tied = np.sort(order[at_cut])
    return tuple(sorted(int(i) for i in (*above, *tied[: count - len(above)])))


def _check_target(shape: ModelShape, target: Mapping[str, int | None]) -> dict[str, int]:
    """The sizes that were asked for, each possible on its own."""
    wanted: dict[str, int] = {}
    for name, size in target.items():
        if name not in TARGETS:
            raise MinitronError(
                f"prune.{name}: unknown target; known: {', '.join(TARGETS)}." + did_you_mean(name, TARGETS)
            )
        if size is None:
            continue
        available = getattr(shape, name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise MinitronError(f"prune.{name}: expected a size from 1 to {available}, found {size!r}")
        if size > available:
            raise MinitronError(f"prune.{name}: {size} asked, {available} available")
        wanted[name] = size
    return wanted


def _check_drop_layers(
    shape: ModelShape, wanted: Mapping[str, int], drop_layers: Sequence[int] | None
) -> frozenset[int]:
    """Layers to drop, 1-based, each possible and named once."""
    if not drop_layers:
        return frozenset()
    total, key = shape.num_layers, "prune.drop_layers"
    for layer in drop_layers:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 1 <= layer <= total:
            raise MinitronError(f"{key}: layer {layer!r} asked, available are 1 to {total} (counted from 1)")
    dropped = frozenset(drop_layers)
    if len(dropped) < len(drop_layers):
        twice = sorted({layer for layer in drop_layers if list(drop_layers).count(layer) > 1})
        raise MinitronError(f"{key}: each layer once, found {twice} more than once")
    if len(dropped) == total:
        raise MinitronError(f"{key}: all {total} layers asked, at least one must stay")
    if wanted.get("num_layers", total - len(dropped)) != total - len(dropped):
        raise MinitronError(
            f"prune.num_layers ({wanted['num_layers']}) disagrees with {key}, "
            f"which leaves {total - len(dropped)} of {total} layers"
        )
    return dropped


def _most_influential(shape: ModelShape, scores: ScoreArrays | None, count: int) -> Indices:
    """Kept layers: all but those of lowest Block Influence."""
    return keep_top(_array(scores, "block_influence", (shape.num_layers,)), count)


def _around_one_block(shape: ModelShape, scores: ScoreArrays | None, count: int) -> Indices:
    """Kept layers: all but the one block of consecutive layers whose output is nearest in cosine to its input."""
    total = shape.num_layers
    cosine = _array(scores, "residual_cosine", (total + 1, total + 1))
    block = total - count
    distance = 1.0 - np.array([cosine[first, first + block] for first in range(count + 1)])
    (first,) = keep_top(-distance, 1)
    return tuple(layer for layer in range(total) if not first <= layer < first + block)


BY_SCORES: dict[str, Callable[[ModelShape, ScoreArrays | None, int], Indices]] = {
    "block_influence": _most_influential,
    "contiguous": _around_one_block,
}
"""What each way of ``LAYER_SELECTIONS`` that goes by scores keeps where only the number of layers was asked for."""


def _choose_heads(
    shape: ModelShape, scores: ScoreArrays | None, layer: int, groups: Indices, heads_per_group: int
) -> Indices:
    """The best ``heads_per_group`` heads of each kept group, as absolute ids."""
    before = shape.heads_per_group
    if heads_per_group == before:
        return tuple(group * before + head for group in groups for head in range(before))
    worth = _array(scores, "heads", (shape.num_layers, shape.num_attention_heads))[layer]
    return tuple(
        group * before + head
        for group in groups
        for head in keep_top(worth[group * before : (group + 1) * before], heads_per_group)
    )


def _array(scores: ScoreArrays | None, name: str, size: tuple[int, ...]) -> np.ndarray:
    """One score array, present, of the right size and finite."""
    values = getattr(scores, name, None)
    if values is None:
        raise MinitronError(f"prune.scores: '{name}' scores are needed for this target, but there are none")
    values = np.asarray(values, dtype=np.float64)
    if values.shape != size:
        raise MinitronError(f"prune.scores: '{name}' must have size {list(size)}, found {list(values.shape)}")
    if not np.isfinite(values).all():
        raise MinitronError(f"prune.scores: '{name}' holds NaN or infinite values")
    return values
