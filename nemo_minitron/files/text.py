"""JSON and YAML of untrusted files: sizes, depths and counts are limited before anything is built from them."""

from __future__ import annotations

import functools
import json
import os
import stat
from pathlib import Path
from typing import Any

from nemo_minitron.errors import MinitronError

YAML_LIMIT = 1 << 20
JSON_LIMIT = 32 << 20
_MAX_EVENTS, _MAX_DEPTH, _MAX_NUMBER = 20_000, 64, 400
_MAX_VALUES, _MAX_EXPANDED = 4_000_000, 100_000
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")}


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        MinitronError: anything else, too long, too many values, or a name given twice.
    """
    if len(data) > JSON_LIMIT:
        raise MinitronError(f"{where}: expected at most {JSON_LIMIT} bytes of JSON, found {len(data)}")
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > _MAX_VALUES:  # 3 bytes can take 200 of memory
        raise MinitronError(f"{where}: expected at most {_MAX_VALUES} values of JSON, found more")
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
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice!r:.80} given twice")
    return content


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The JSON object in a file: :func:`read_file`, then :func:`parse_json`."""
    return parse_json(read_file(path, limit), str(path))


def read_file(path: Path, limit: int) -> bytes:
    """A regular file of at most ``limit`` bytes, whole; a pipe or a device is not waited for.

    Raises:
        MinitronError: it is not there, not a regular file, longer, or cannot be read.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise MinitronError(f"{path}: expected a regular file")
            if facts.st_size > limit:
                raise MinitronError(f"{path}: expected at most {limit} bytes, found {facts.st_size}")
            return file.read(limit)
    except (OSError, ValueError) as error:
        raise MinitronError(
            f"{path}: expected a readable file, found: {getattr(error, 'strerror', None) or error}"
        ) from None


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


def parse_plain_yaml(data: bytes, where: str, limit: int = YAML_LIMIT) -> dict[Any, Any]:
    """A mapping as YAML has it, whose keys may be numbers, with the checks of :func:`parse_yaml`."""
    import yaml

    check_yaml(data, where, limit)
    try:
        content = yaml.load(data.decode("utf-8"), Loader=_plain_loader())
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise MinitronError(f"{where}: expected YAML of plain values, found: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise MinitronError(f"{where}: expected a mapping, found {type(content).__name__}")
    return content


def parse_object_yaml(data: bytes, where: str, limit: int = YAML_LIMIT) -> dict[str, Any]:
    """A mapping of another tool's objects as plain data: ``_target_`` and ``${…}`` are texts like others.

    Whoever reads it must not act on them. PyYAML writes an object that is there twice as an alias, so aliases are
    followed, as far as they do not make more than any config has.

    Raises:
        MinitronError: anything but a mapping of plain values, or too much of it.
    """
    import yaml

    check_aliases(data, where)
    check_yaml(data, where, limit, objects=True)
    try:
        content = yaml.load(data.decode("utf-8"), Loader=_plain_loader())
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise MinitronError(f"{where}: expected YAML of plain values, found: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise MinitronError(f"{where}: expected a mapping, found {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


@functools.cache
def _plain_loader() -> Any:
    """libyaml's parser where there is one, and no name given twice."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            content = super().construct_mapping(node, deep)
            if len(content) != len(node.value):
                raise ValueError(f"a name given twice{str(node.start_mark).partition(',')[2]}")
            return content

    return Loader


def check_yaml(data: bytes, where: str, limit: int = YAML_LIMIT, objects: bool = False) -> None:
    """The checks of :func:`parse_yaml` that need no object: for what is about to be written, too.

    Args:
        objects: whether it is of :func:`parse_object_yaml`.
    """
    from yaml import YAMLError

    if len(data) > limit:
        raise MinitronError(f"{where}: expected at most {limit} bytes of YAML, found {len(data)}")
    try:
        _check_events(data.decode("utf-8"), objects)
    except (YAMLError, ValueError, RecursionError) as error:
        raise MinitronError(f"{where}: expected YAML of plain values, found: {one_line(error)}") from None


def _check_events(text: str, objects: bool) -> None:
    import yaml

    depth = 0
    anchors: list[str | None] = []  # of what is open
    for count, event in enumerate(yaml.parse(text, Loader=_plain_loader())):
        if count > _MAX_EVENTS:
            raise ValueError(f"more than {_MAX_EVENTS} values")
        if count == 2 and isinstance(event, yaml.ScalarEvent):
            raise ValueError("a single value")
        if isinstance(event, yaml.AliasEvent) and (not objects or event.anchor in anchors):
            raise ValueError(f"an alias{' of what it is in' if objects else ''}, *{event.anchor}")
        if isinstance(event, yaml.CollectionStartEvent):
            anchors.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchors.pop()
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError(f"values nested more than {_MAX_DEPTH} deep")
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", *_TAGS):
            raise ValueError(f"the tag {tag}")
        if isinstance(event, yaml.ScalarEvent):
            if "${" in event.value and not objects:
                raise ValueError(f"the interpolation {event.value[:80]!r}")
            if event.value == "_target_" and not objects:
                raise ValueError("the key '_target_', which would run code")
            if len(event.value) > _MAX_NUMBER and event.value[0] in "+-.0123456789" and " " not in event.value:
                raise ValueError(f"a number of {len(event.value)} characters")


def check_aliases(data: bytes, where: str) -> None:
    """Refuse YAML of a user's own whose aliases, written out, are more values than any config has.

    Raises:
        MinitronError: more than that.
    """
    import yaml

    open_nodes: list[tuple[str | None, int]] = []  # anchor, and values before it began
    sizes: dict[str | None, int] = {}
    total = 0
    try:
        for event in yaml.parse(data.decode("utf-8"), Loader=_plain_loader()):
            if isinstance(event, yaml.AliasEvent):
                total += sizes.get(event.anchor, 0)
            elif isinstance(event, yaml.NodeEvent):
                total += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, total))
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = open_nodes.pop()
                sizes |= {anchor: 1 + total - before} if anchor else {}
            if total > _MAX_EXPANDED:
                raise MinitronError(f"{where}: expected at most {_MAX_EXPANDED} values, found aliases for more")
    except (yaml.YAMLError, ValueError):
        return  # whoever reads it says so


def one_line(error: BaseException) -> str:
    """The message of an error of another library, on one line and of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__
