"""What a pruned model keeps: indices per axis, frozen, written as a small deterministic YAML file.

A plan says nothing about ranks, files or time: the same scores and the same target give the same bytes.

Ties. Two scores count as equal when they differ by at most ``TIE`` of the larger, and equals are chained: a run of
neighbours in the ranking, each within ``TIE`` of the next, is one class, of which the lower indices are kept. Rounding
the scores instead would let two equal units that sit on either side of a rounding border be ranked by noise; a chain
has no borders. Units that are equal in exact arithmetic (duplicates, dead neurons) are therefore ordered by index on
every grid, as long as accumulation noise stays below ``TIE``; only a true gap that happens to be ``TIE`` wide, give or
take the noise, could still be read either way.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import yaml

from nemo_minitron.errors import MinitronError, did_you_mean
from nemo_minitron.shape import ModelShape

FORMAT = "nemo_minitron.plan/1"
TIE = 1e-6
TARGETS = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "num_layers")
SELECTIONS = ("block_influence", "contiguous")
LOSS_SELECTIONS = ("leave_one_out", "contiguous_loss", "greedy", "beam")
"""Ways to choose layers from scores, and by running the model without them (nemo_minitron.importance.layer_loss)."""
Indices = tuple[int, ...]


class ScoreArrays(Protocol):
    """The arrays that planning reads, sizes as in :class:`nemo_minitron.scores.Scores`."""

    @property
    def ffn(self) -> np.ndarray: ...
    @property
    def heads(self) -> np.ndarray: ...
    @property
    def groups(self) -> np.ndarray: ...
    @property
    def hidden(self) -> np.ndarray: ...
    @property
    def block_influence(self) -> np.ndarray: ...
    @property
    def residual_cosine(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Compensation:
    """How the kept weights are re-solved (:mod:`nemo_minitron.compensation`); the same values give the same student.

    Attributes:
        tokens: fingerprint of the calibration tokens, which the scores folder holds.
        ffn, attention, read: pull towards the cut weights of ``linear_fc2``, of ``linear_proj``, and of what reads the
            normed stream, in units of the inputs' mean square. Chosen on SmolLM2-135M among 0.01 to 1, at
            32,768 tokens; fewer tokens want stronger ones.
        rotate: whether a narrower residual stream is turned first (:mod:`nemo_minitron.rotation`), from the scores'
            ``stream_moment``; the student's channels are then mixtures, and ``keep.hidden`` is what would be cut to.
    """

    tokens: str
    ffn: float = 0.17
    attention: float = 0.4
    read: float = 0.03
    rotate: bool = False


@dataclass(frozen=True)
class Plan:
    """Kept indices of every axis, ascending, 0-based, in the numbering of the source.

    Attributes:
        source_fingerprint: of the weights that the plan prunes.
        source, target: shapes before and after; they differ in the five ``TARGETS`` only (``kv_channels`` and the
            padded vocabulary never change).
        layers: kept layers. hidden: kept channels, the same in all layers.
        ffn, groups, heads: one tuple per kept layer, in the order of ``layers``. Heads are absolute group-major ids
            (head a belongs to group ``a // r``) and belong to the kept groups, equally many to each.
        compensation: how the kept weights are re-solved; None: they are cut only.

    Raises:
        MinitronError: from the constructor, where any of this does not hold.
    """

    source_fingerprint: str
    source: ModelShape
    target: ModelShape
    layers: Indices
    hidden: Indices
    ffn: tuple[Indices, ...]
    groups: tuple[Indices, ...]
    heads: tuple[Indices, ...]
    compensation: Compensation | None = None

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def identity(cls, shape: ModelShape, source_fingerprint: str) -> Plan:
        """The plan that keeps everything: applying it is bit-identical."""
        layers = shape.num_layers
        return cls(
            source_fingerprint=source_fingerprint,
            source=shape,
            target=shape,
            layers=tuple(range(layers)),
            hidden=tuple(range(shape.hidden_size)),
            ffn=(tuple(range(shape.ffn_hidden_size)),) * layers,
            groups=(tuple(range(shape.num_query_groups)),) * layers,
            heads=(tuple(range(shape.num_attention_heads)),) * layers,
        )

    def position(self, layer: int) -> int:
        """Place of source layer ``layer`` in the pruned model.

        Raises:
            MinitronError: where the layer is not kept.
        """
        try:
            return self.layers.index(layer)
        except ValueError:
            raise MinitronError(f"plan: layer {layer} is not kept; kept layers: {format_ranges(self.layers)}") from None

    def validate(self) -> None:
        """Check every index against the shapes; called by the constructor."""
        source, target = self.source, self.target
        for field in dataclasses.fields(ModelShape):
            before, after = getattr(source, field.name), getattr(target, field.name)
            if field.name in TARGETS:
                if after > before:
                    raise MinitronError(f"plan: target {field.name} ({after}) is larger than the source's ({before})")
            elif before != after:
                raise MinitronError(f"plan: {field.name} must not change, found {before} -> {after}")
        _check_indices("layers", self.layers, target.num_layers, source.num_layers)
        _check_indices("hidden", self.hidden, target.hidden_size, source.hidden_size)
        for name, size in (
            ("ffn", "ffn_hidden_size"),
            ("groups", "num_query_groups"),
            ("heads", "num_attention_heads"),
        ):
            rows = getattr(self, name)
            if len(rows) != len(self.layers):
                raise MinitronError(
                    f"plan: '{name}' must have one row per kept layer ({len(self.layers)}), found {len(rows)}"
                )
            for layer, row in zip(self.layers, rows, strict=True):
                _check_indices(f"{name} of layer {layer}", row, getattr(target, size), getattr(source, size))
        for layer, groups, heads in zip(self.layers, self.groups, self.heads, strict=True):
            owners = [head // source.heads_per_group for head in heads]
            if owners != [group for group in groups for _ in range(target.heads_per_group)]:
                raise MinitronError(
                    f"plan: layer {layer} must keep {target.heads_per_group} heads of each kept group "
                    f"{list(groups)}, found heads {list(heads)}"
                )

    def to_yaml(self) -> str:
        """The file's text: the same plan always gives the same bytes."""
        document = {
            "format": FORMAT,
            "source": {"fingerprint": self.source_fingerprint, "shape": dataclasses.asdict(self.source)},
            "target": {name: getattr(self.target, name) for name in TARGETS},
            "keep": {
                "layers": format_ranges(self.layers),
                "hidden": format_ranges(self.hidden),
                **{
                    name: {
                        layer: format_ranges(row) for layer, row in zip(self.layers, getattr(self, name), strict=True)
                    }
                    for name in ("ffn", "groups", "heads")
                },
            },
        }
        if self.compensation is not None:
            document["compensation"] = dataclasses.asdict(self.compensation)
        return yaml.safe_dump(document, sort_keys=False, width=120, default_flow_style=False, allow_unicode=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the YAML file beside ``path``, then rename.

        Raises:
            MinitronError: where it cannot be written.
        """
        path = Path(path).absolute()
        partial: str | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
                file.write(self.to_yaml())
            os.chmod(partial, 0o644)  # mkstemp is private to its owner; an output is not
            os.replace(partial, path)
            partial = None
        except OSError as error:
            raise MinitronError(f"export.plan_path: cannot write '{path}': {error.strerror or error}") from None
        finally:
            if partial is not None:
                os.unlink(partial)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read and check a plan file.

        Raises:
            MinitronError: naming the file and what is wrong with it.
        """
        try:
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise MinitronError(f"prune.plan: cannot read '{path}': {error.strerror or error}") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise MinitronError(f"prune.plan: '{path}' is not a YAML file") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise MinitronError(f"prune.plan: '{path}' is not a plan (expected format '{FORMAT}')")
        try:
            keep = document["keep"]
            source = ModelShape.from_dict(document["source"]["shape"])
            target = source.replace(**{name: document["target"][name] for name in TARGETS})
            layers = parse_ranges(keep["layers"], source.num_layers)
            return cls(
                source_fingerprint=str(document["source"]["fingerprint"]),
                source=source,
                target=target,
                layers=layers,
                hidden=parse_ranges(keep["hidden"], source.hidden_size),
                ffn=tuple(parse_ranges(keep["ffn"][layer], source.ffn_hidden_size) for layer in layers),
                groups=tuple(parse_ranges(keep["groups"][layer], source.num_query_groups) for layer in layers),
                heads=tuple(parse_ranges(keep["heads"][layer], source.num_attention_heads) for layer in layers),
                compensation=_compensation(document.get("compensation")),
            )
        except KeyError as error:
            raise MinitronError(f"prune.plan: '{path}' lacks {error}") from None
        except (TypeError, ValueError) as error:
            raise MinitronError(f"prune.plan: '{path}': {error}") from None
        except MinitronError as error:
            raise MinitronError(f"prune.plan: '{path}': {error}") from None


def _compensation(section: object) -> Compensation | None:
    """The optional section of a plan file."""
    if section is None:
        return None
    if not isinstance(section, dict):
        raise MinitronError(f"expected keys below 'compensation', found {section!r}")
    rotate = section.get("rotate", False)
    if not isinstance(rotate, bool):
        raise MinitronError(f"compensation.rotate: expected true or false, found {rotate!r}")
    strengths = {name: float(value) for name, value in section.items() if name not in ("tokens", "rotate")}
    if not all(0 < value < float("inf") for value in strengths.values()):
        raise MinitronError(f"compensation: expected positive numbers, found {strengths}")
    return Compensation(tokens=str(section["tokens"]), rotate=rotate, **strengths)


def target_shape(
    shape: ModelShape,
    target: Mapping[str, int | None],
    drop_layers: Sequence[int] | None = None,
    layer_selection: str = "block_influence",
) -> ModelShape:
    """Shape that a request leads to, refusing impossible ones; needs no scores. See :func:`make_plan`."""
    wanted = _check_target(shape, target)
    dropped = _check_drop_layers(shape, wanted, drop_layers)
    known = (*SELECTIONS, *LOSS_SELECTIONS)
    if layer_selection not in known:
        raise MinitronError(
            f"prune.layer_selection: expected one of {', '.join(known)}, found '{layer_selection}'."
            + did_you_mean(layer_selection, known)
        )
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


def make_plan(
    shape: ModelShape,
    scores: ScoreArrays | None,
    target: Mapping[str, int | None],
    *,
    drop_layers: Sequence[int] | None = None,
    layer_selection: str = "block_influence",
    source_fingerprint: str,
    compensation: Compensation | None = None,
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

    Raises:
        MinitronError: nothing requested; a size larger than there is, not positive or not divisible; an unknown
            name; layers out of range, repeated or in disagreement with ``num_layers``; missing or non-finite scores.
    """
    new = target_shape(shape, target, drop_layers, layer_selection)
    layers = tuple(range(shape.num_layers))
    if drop_layers:
        layers = tuple(layer for layer in layers if layer + 1 not in drop_layers)
    elif new.num_layers < shape.num_layers:
        if layer_selection in LOSS_SELECTIONS:
            raise ValueError(f"layer_selection={layer_selection}: the layers must be chosen before and be given")
        layers = _choose_layers(shape, scores, new.num_layers, layer_selection)
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
    return Plan(source_fingerprint, shape, new, layers, hidden, ffn, groups, heads, compensation)


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


def format_ranges(indices: Iterable[int]) -> str:
    """Write ascending indices compactly: ``0-5 7 9-12``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_ranges(text: object, size: int) -> Indices:
    """Read :func:`format_ranges`; ``size`` bounds the indices before anything is expanded.

    Raises:
        MinitronError: where a piece is not ``n`` or ``n-m``, or an index is not below ``size``.
    """
    indices: list[int] = []
    for piece in str(text).split():  # YAML reads a single index as a number
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", piece)
        if not match:
            raise MinitronError(f"expected indices such as '0-5 7', found '{piece}'")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= size or last < first:
            raise MinitronError(f"index range '{piece}' does not fit an axis of {size}")
        indices.extend(range(first, last + 1))
    return tuple(indices)


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


def _choose_layers(shape: ModelShape, scores: ScoreArrays | None, count: int, selection: str) -> Indices:
    """Kept layers when only their number was asked for."""
    total = shape.num_layers
    if selection == "block_influence":
        return keep_top(_array(scores, "block_influence", (total,)), count)
    cosine = _array(scores, "residual_cosine", (total + 1, total + 1))
    block = total - count
    distance = 1.0 - np.array([cosine[first, first + block] for first in range(count + 1)])
    (first,) = keep_top(-distance, 1)
    return tuple(layer for layer in range(total) if not first <= layer < first + block)


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


def _check_indices(name: str, indices: Indices, count: int, size: int) -> None:
    """``count`` ascending indices below ``size``."""
    if len(indices) != count:
        raise MinitronError(f"plan: {name}: expected {count} indices, found {len(indices)}")
    ascending = all(one < other for one, other in itertools.pairwise(indices))
    if not ascending or indices[0] < 0 or indices[-1] >= size:
        raise MinitronError(
            f"plan: {name}: expected ascending indices from 0 to {size - 1}, found {format_ranges(indices)[:80]}"
        )
