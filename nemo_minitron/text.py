"""JSON and YAML of untrusted files: sizes, depths and counts are limited before anything is built from them."""

from __future__ import annotations

import json
from typing import Any

from nemo_minitron.errors import MinitronError

YAML_LIMIT = 1 << 20
JSON_LIMIT = 32 << 20
_MAX_EVENTS, _MAX_DEPTH, _MAX_NUMBER = 20_000, 64, 400
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")}


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        MinitronError: anything else, too long, or a name given twice.
    """
    if len(data) > JSON_LIMIT:
        raise MinitronError(f"{where}: expected at most {JSON_LIMIT} bytes of JSON, found {len(data)}")
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise MinitronError(f"{where}: expected JSON, found: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise MinitronError(f"{where}: expected a JSON object, found {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} given twice")
    return content


def parse_yaml(data: bytes, where: str) -> dict[str, Any]:
    """A mapping as OmegaConf reads it, of plain values.

    NeMo resolves a config before it packs it and builds the model from it with Hydra, so interpolations (which can
    read the environment) and ``_target_`` (which can name any function) are refused; so are tags and aliases.

    Raises:
        MinitronError: anything but a mapping of plain values, or too much of it.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    check_yaml(data, where)
    try:
        content = OmegaConf.to_container(OmegaConf.create(data.decode("utf-8")), resolve=False)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise MinitronError(f"{where}: expected YAML of plain values, found: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise MinitronError(f"{where}: expected a mapping, found {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def check_yaml(data: bytes, where: str) -> None:
    """The checks of :func:`parse_yaml` that need no object: for what is about to be written, too."""
    from yaml import YAMLError

    if len(data) > YAML_LIMIT:
        raise MinitronError(f"{where}: expected at most {YAML_LIMIT} bytes of YAML, found {len(data)}")
    try:
        _check_events(data.decode("utf-8"))
    except (YAMLError, ValueError, RecursionError) as error:
        raise MinitronError(f"{where}: expected YAML of plain values, found: {one_line(error)}") from None


def _check_events(text: str) -> None:
    import yaml

    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if count > _MAX_EVENTS:
            raise ValueError(f"more than {_MAX_EVENTS} values")
        if count == 2 and isinstance(event, yaml.ScalarEvent):
            raise ValueError("a single value")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"an alias, *{event.anchor}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError(f"values nested more than {_MAX_DEPTH} deep")
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", *_TAGS):
            raise ValueError(f"the tag {tag}")
        if isinstance(event, yaml.ScalarEvent):
            if "${" in event.value:
                raise ValueError(f"the interpolation {event.value[:80]!r}")
            if event.value == "_target_":
                raise ValueError("the key '_target_', which would run code")
            if len(event.value) > _MAX_NUMBER and event.value[0] in "+-.0123456789":
                raise ValueError(f"a number of {len(event.value)} characters")


def one_line(error: BaseException) -> str:
    """The message of an error of another library, on one line and of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__
