"""What a pruned model keeps: indices per axis, frozen, written as a small deterministic YAML file.

A plan says nothing about ranks, files or time: the same plan gives the same bytes. How one is chosen is
:mod:`nemo_minitron.prune.choose`.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import write_file
from nemo_minitron.files.text import one_line, parse_plain_yaml, read_file
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.measured import Measured, from_section, to_section
from nemo_minitron.registry import check_name

FORMAT = "nemo_minitron.plan/1"
PLAN_LIMIT, MOST_INDICES = 32 << 20, 1 << 23
"""Bytes of a plan file, and indices of all its axes together: Llama-3.1-405B whole has 6.7 million."""

MOST_SAMPLES = 1 << 20
"""Calibration samples that a plan may number."""

TARGETS = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "num_layers")
SELECTED = ("layers", "groups")
"""What may be chosen in another way than by a ranking of units."""

Indices = tuple[int, ...]


@dataclass(frozen=True)
class Compensation:
    """How the kept weights are re-solved (:mod:`nemo_minitron.prune.resolve`); the same values give the same student.

    Attributes:
        tokens: fingerprint of the calibration tokens, which the scores folder holds.
        ffn, attention, read: pull towards the cut weights of ``linear_fc2``, of ``linear_proj``, and of what reads the
            normed stream, in units of the inputs' mean square. Chosen on SmolLM2-135M among 0.01 to 1, at
            32,768 tokens; fewer tokens want stronger ones.
        rotate: whether a narrower residual stream is turned first (:mod:`nemo_minitron.prune.rotation`), from the
            scores' ``stream_moment``; the student's channels are then mixtures, and ``keep.hidden`` is what
            would be cut to.
        rescale: whether the final norm is scaled by the number under which the calibration tokens are likeliest.
        regain: whether each channel's weight of the final norm is then moved to where calibration tokens are likelier
            (:mod:`nemo_minitron.prune.gain`); false in plans of earlier versions, which say nothing.
        held_out: samples that nothing is solved on, ascending, 0-based, on which the student is compared with a cut one
            (:mod:`nemo_minitron.prune.guard`); none in plans of earlier versions.
        weighting: exponent of the sensitivity by which each token's error counts. Chosen on SmolLM2-135M among 0.25 to
            1.5 by the loss of held-out calibration and own text; plans of earlier versions, which say nothing, have 1.
    """

    tokens: str
    ffn: float = 0.17
    attention: float = 0.4
    read: float = 0.03
    rotate: bool = False
    rescale: bool = False
    weighting: float = 1.0
    held_out: Indices = ()
    regain: bool = False

    def to_section(self) -> dict[str, str | float | bool]:
        """The section of a plan file; what earlier versions do not know is left out where it says what they do."""
        section = dataclasses.asdict(self) | {"held_out": format_ranges(self.held_out)}
        neutral = {"held_out": "", "weighting": 1.0, "regain": False}
        return {name: value for name, value in section.items() if value != neutral.get(name)}


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
        ranking: of the scores, by which channels, neurons, groups and heads were chosen; None where none of them were,
            or where a plan of an earlier version does not say. It explains the plan and changes nothing that it makes.
        selection: how ``layers`` and ``groups`` were chosen, by name: a value of ``prune.layer_selection``, or
            ``drop_layers`` where they were named; ``loss`` where groups do not follow ``ranking``. What is missing
            was not chosen, is ``ranking``'s, or is not said by an earlier version. It explains, as ``ranking`` does.
        measured: what the student was found to lose on held-out samples, cut and re-solved, by kind; empty where that
            was not measured. With it and without ``compensation``, the student was cut because re-solving lost more.

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
    ranking: str | None = None
    selection: Mapping[str, str] = dataclasses.field(default_factory=dict)
    measured: Mapping[str, Measured] = dataclasses.field(default_factory=dict)

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

    def chosen(self, layers: str, groups: str) -> Plan:
        """The same plan, which says how layers and query groups were chosen, where it removes any.

        Args:
            layers: ``drop_layers`` where they were named, else ``prune.layer_selection``.
            groups: ``prune.group_selection``; of ``ranking`` nothing is said, since ``Plan.ranking`` says it.
        """
        source, target = self.source, self.target
        said = {"layers": layers} if target.num_layers < source.num_layers else {}
        if target.num_query_groups < source.num_query_groups and groups != "ranking":
            said["groups"] = groups
        return dataclasses.replace(self, selection=said)

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
        if self.ranking is not None:
            check_name(self.ranking, "plan: ranking")
        for axis, how in self.selection.items():
            if axis not in SELECTED:
                raise MinitronError(f"plan: selection: expected {' or '.join(SELECTED)}, found {axis!r:.80}")
            check_name(how, f"plan: selection.{axis}")
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
            per_layer = getattr(self, name)
            if len(per_layer) != len(self.layers):
                raise MinitronError(
                    f"plan: '{name}' must have one row per kept layer ({len(self.layers)}), found {len(per_layer)}"
                )
            for layer, indices in zip(self.layers, per_layer, strict=True):
                _check_indices(f"{name} of layer {layer}", indices, getattr(target, size), getattr(source, size))
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
            "source": {"fingerprint": self.source_fingerprint, "shape": self.source.to_dict()},
            "target": {name: getattr(self.target, name) for name in TARGETS},
            **({} if self.ranking is None else {"ranking": self.ranking}),
            **({"selection": dict(sorted(self.selection.items(), reverse=True))} if self.selection else {}),
            **({"measured": to_section(self.measured)} if self.measured else {}),
            "keep": {
                "layers": format_ranges(self.layers),
                "hidden": format_ranges(self.hidden),
                **{
                    name: {
                        layer: format_ranges(indices)
                        for layer, indices in zip(self.layers, getattr(self, name), strict=True)
                    }
                    for name in ("ffn", "groups", "heads")
                },
            },
        }
        if self.compensation is not None:
            document["compensation"] = self.compensation.to_section()
        return yaml.safe_dump(document, sort_keys=False, width=120, default_flow_style=False, allow_unicode=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the YAML file.

        Raises:
            MinitronError: where it cannot be written.
        """
        write_file(Path(path), self.to_yaml())

    @classmethod
    def load(cls, path: str | os.PathLike[str], shape: ModelShape | None = None) -> Plan:
        """Read and check a plan file; nothing is expanded before its sizes are known to fit.

        Args:
            shape: of the model that the plan is for, where that is known.

        Raises:
            MinitronError: naming the file and what is wrong with it.
        """
        try:
            document = parse_plain_yaml(read_file(Path(path), PLAN_LIMIT), f"'{path}' is not a plan", PLAN_LIMIT)
            if document.get("format") != FORMAT:
                raise MinitronError(f"'{path}' is not a plan (expected format '{FORMAT}')")
            return cls._from_document(document, shape)
        except LookupError as error:
            raise MinitronError(f"prune.plan: '{path}' lacks {error!s:.80}") from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise MinitronError(f"prune.plan: '{path}': {one_line(error)}") from None
        except MinitronError as error:
            where = "" if str(path) in str(error) else f"'{path}': "
            raise MinitronError(f"prune.plan: {where}{error}") from None

    @classmethod
    def _from_document(cls, document: Mapping[str, Any], shape: ModelShape | None) -> Plan:
        keep = document["keep"]
        source = ModelShape.from_dict(document["source"]["shape"])
        if shape is not None:
            source.check_same(shape, "the plan is for")
        target = source.replace(**{name: document["target"][name] for name in TARGETS})
        layers, hidden, ffn = target.num_layers, target.hidden_size, target.ffn_hidden_size
        groups, heads = target.num_query_groups, target.num_attention_heads
        if layers + hidden + layers * (ffn + groups + heads) > MOST_INDICES:
            raise MinitronError(f"expected at most {MOST_INDICES} kept indices in all, found more")
        kept = parse_ranges(keep["layers"], source.num_layers, layers)
        return cls(
            source_fingerprint=str(document["source"]["fingerprint"]),
            source=source,
            target=target,
            layers=kept,
            hidden=parse_ranges(keep["hidden"], source.hidden_size, hidden),
            ffn=tuple(parse_ranges(keep["ffn"][layer], source.ffn_hidden_size, ffn) for layer in kept),
            groups=tuple(parse_ranges(keep["groups"][layer], source.num_query_groups, groups) for layer in kept),
            heads=tuple(parse_ranges(keep["heads"][layer], source.num_attention_heads, heads) for layer in kept),
            compensation=_compensation(document.get("compensation")),
            ranking=document.get("ranking"),
            selection=_selection(document.get("selection")),
            measured=from_section(document.get("measured")),
        )


def _selection(section: object) -> dict[str, str]:
    """The optional section of a plan file."""
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise MinitronError(f"expected keys below 'selection', found {section!r:.80}")
    return section


def _compensation(section: object) -> Compensation | None:
    """The optional section of a plan file."""
    if section is None:
        return None
    if not isinstance(section, dict):
        raise MinitronError(f"expected keys below 'compensation', found {section!r:.80}")
    choices = {name: section.get(name, False) for name in ("rotate", "rescale", "regain")}
    for name, value in choices.items():
        if not isinstance(value, bool):
            raise MinitronError(f"compensation.{name}: expected true or false, found {value!r:.80}")
    numbers = {name: value for name, value in section.items() if name not in ("tokens", "held_out", *choices)}
    strengths = {name: float(value) for name, value in numbers.items()}
    if not all(0 < value < float("inf") for value in strengths.values()):
        raise MinitronError(f"compensation: expected positive numbers, found {strengths}")
    held_out = parse_ranges(section.get("held_out", ""), MOST_SAMPLES)
    if any(one >= other for one, other in itertools.pairwise(held_out)):
        raise MinitronError(f"compensation.held_out: expected ascending samples, found {section['held_out']!r:.80}")
    rotate, rescale, regain = choices.values()
    tokens = str(section["tokens"])
    return Compensation(tokens, rotate=rotate, rescale=rescale, held_out=held_out, regain=regain, **strengths)


def format_ranges(indices: Iterable[int]) -> str:
    """Write ascending indices compactly: ``0-5 7 9-12``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_ranges(text: object, size: int, count: int | None = None) -> Indices:
    """Read :func:`format_ranges`; ``size`` and ``count`` bound the indices before anything is expanded.

    Raises:
        MinitronError: where a piece is not ``n`` or ``n-m``, an index is not below ``size``, or there are more than
            ``count`` indices (by default ``size``).
    """
    indices: list[int] = []
    for piece in str(text).split():  # YAML reads a single index as a number
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", piece)
        if not match:
            raise MinitronError(f"expected indices such as '0-5 7', found '{piece:.80}'")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= size or last < first:
            raise MinitronError(f"index range '{piece}' does not fit an axis of {size}")
        if len(indices) + last + 1 - first > (size if count is None else count):
            raise MinitronError(f"expected {count} indices, found more, up to '{piece}'")
        indices.extend(range(first, last + 1))
    return tuple(indices)


def _check_indices(name: str, indices: Indices, count: int, size: int) -> None:
    """``count`` ascending indices below ``size``."""
    if len(indices) != count:
        raise MinitronError(f"plan: {name}: expected {count} indices, found {len(indices)}")
    ascending = all(one < other for one, other in itertools.pairwise(indices))
    if not ascending or indices[0] < 0 or indices[-1] >= size:
        raise MinitronError(
            f"plan: {name}: expected ascending indices from 0 to {size - 1}, found {format_ranges(indices)[:80]}"
        )
