"""RoPE in a HF ``config.json``, as both generations of transformers have it.

transformers 4 writes ``rope_theta`` and ``rope_scaling``, transformers 5 one section ``rope_parameters`` with both, and
it still reads the older keys. So what is written for both has the older keys, and the newer one where it was there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import LinearScaling, RopeScaling, Scaling

Rope = tuple[float, Scaling | None]
_BASE = 10000.0  # what transformers 4 takes where nothing is said
_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_NOT_IN_MEGATRON = ("yarn", "dynamic", "longrope", "su")
_KINDS = ("default", "llama3", "linear")
_SECTIONS = ("rope_scaling", "rope_parameters")


def read_rope(config: Mapping[str, Any], where: str) -> Rope:
    """Base and scaling of a config; whatever is said twice must agree.

    Raises:
        MinitronError: another kind of RoPE than plain, linear or Llama 3's, one for each kind of layer, numbers that
            are missing or unknown, or two keys that disagree.
    """
    bases: dict[str, float] = {}
    scalings: dict[str, Scaling | None] = {}
    if config.get("rope_theta") is not None:
        bases["rope_theta"] = number(config, "rope_theta", where)
    for key in _SECTIONS:
        section = config.get(key)
        if section is None or section == {}:
            continue
        if not isinstance(section, Mapping):
            raise MinitronError(f"{where}: {key} must be a mapping, found {section!r:.80}")
        scalings[key] = _scaling(section, f"{where}: {key}")
        if section.get("rope_theta") is not None:
            bases[f"{key}.rope_theta"] = number(section, "rope_theta", f"{where}: {key}")
    _agree(bases, where)
    _agree(scalings, where)
    if not bases and "rope_parameters" in scalings:
        raise MinitronError(f"{where}: rope_parameters: expected the key rope_theta, found none")
    scaling = next(iter(scalings.values()), None)
    length = config.get("original_max_position_embeddings")
    if isinstance(scaling, RopeScaling) and length not in (None, scaling.original_max_position_embeddings):
        raise MinitronError(
            f"{where}: original_max_position_embeddings ({length!r:.80}) must be as in the RoPE scaling, found "
            f"{scaling.original_max_position_embeddings} there"
        )
    return next(iter(bases.values()), _BASE), scaling


def write_rope(config: dict[str, Any], rope: Rope, fresh: bool) -> None:
    """Make a config say ``rope`` to either generation; keys that say it already are left as they are.

    Args:
        fresh: whether to write the older keys also where transformers would assume as much.
    """
    base, scaling = rope
    if fresh or not older_reads(config, rope):
        config["rope_theta"] = base
        config["rope_scaling"] = None if scaling is None else _section(scaling)
    newer = config.get("rope_parameters")
    if newer and read_rope({"rope_parameters": {"rope_theta": base, **newer}}, "config.json") != rope:
        section = _section(scaling)
        config["rope_parameters"] = {"rope_type": section.pop("rope_type"), "rope_theta": base, **section}


def older_reads(config: Mapping[str, Any], rope: Rope) -> bool:
    """Whether transformers 4, which knows the older keys alone and passes over a base inside, reads ``rope``."""
    inner = {key: value for key, value in (config.get("rope_scaling") or {}).items() if key != "rope_theta"}
    return read_rope({"rope_theta": config.get("rope_theta"), "rope_scaling": inner}, "config.json") == rope


def _agree(found: Mapping[str, Any], where: str) -> None:
    (first, value), *others = found.items() or [("", None)]
    for name, other in others:
        if other != value:
            raise MinitronError(f"{where}: {first} and {name} must agree, found {value!r} and {other!r}")


def _scaling(section: Mapping[str, Any], where: str) -> Scaling | None:
    for key, value in section.items():
        if isinstance(value, Mapping):
            raise MinitronError(f"{where}: expected one RoPE for all layers, found one for '{key:.60}'")
    names = {key: section[key] for key in ("rope_type", "type") if section.get(key) is not None}
    _agree(names, where)
    kind = next(iter(names.values()), "default")
    if kind not in _KINDS:
        also = "; Megatron-Core's GPT has no such RoPE" if kind in _NOT_IN_MEGATRON else ""
        raise MinitronError(f"{where}: rope_type must be one of {', '.join(_KINDS)}, found {kind!r:.80}{also}")
    if section.get("partial_rotary_factor") not in (None, 1):
        raise MinitronError(f"{where}: partial_rotary_factor must be 1, found {section['partial_rotary_factor']!r:.80}")
    given = [key for key in section if section[key] is not None]
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_NUMBERS}
    for key in given:
        if key not in known:
            raise MinitronError(f"{where}: '{key:.60}' is unknown in a RoPE of type '{kind}'")
    if kind == "default":
        for key in given:
            if key in _NUMBERS[:3] and section[key] != 1:
                found = "'default'" if names else "no rope_type"
                raise MinitronError(
                    f"{where}: {key} must be absent without scaling, found {section[key]!r:.80} with {found}"
                )
        return None
    if kind == "linear":
        return _linear(section, given, where)
    missing = [key for key in _NUMBERS if key not in given]
    if missing:
        raise MinitronError(f"{where}: expected {', '.join(_NUMBERS)} for llama3; missing: {', '.join(missing)}")
    factor, low, high = (number(section, key, where) for key in _NUMBERS[:3])
    if high <= low:
        raise MinitronError(f"{where}: high_freq_factor must be larger than low_freq_factor, found {high} and {low}")
    return RopeScaling(factor, low, high, whole(section, _NUMBERS[3], where))


def _linear(section: Mapping[str, Any], given: list[str], where: str) -> LinearScaling | None:
    for key in given:
        if key in _NUMBERS[1:3]:
            raise MinitronError(f"{where}: '{key}' is unknown in a RoPE of type 'linear'")
    if section.get("factor") is None:
        raise MinitronError(f"{where}: expected factor for linear; missing: factor")
    factor = number(section, "factor", where)
    if factor < 1:
        raise MinitronError(f"{where}: factor must be at least 1 in a RoPE of type 'linear', found {factor}")
    return LinearScaling(factor) if factor != 1 else None


def _section(scaling: Scaling | None) -> dict[str, Any]:
    """A section of HF's that means ``scaling``, without a base."""
    if scaling is None:
        return {"rope_type": "default"}
    return {"rope_type": "llama3" if isinstance(scaling, RopeScaling) else "linear", **dataclasses.asdict(scaling)}


def whole(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A size: a positive integer, ``default`` where the key is absent or null."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise MinitronError(f"{where}: expected the key '{key}', found {'null' if key in config else 'none'}")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 62:
        raise MinitronError(f"{where}: {key} must be a positive integer, found {value!r:.80}")
    return value


def number(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A number above 0, ``default`` where the key is absent or null."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise MinitronError(f"{where}: {key} must be a number above 0, found {value!r:.80}")
    return float(value)
