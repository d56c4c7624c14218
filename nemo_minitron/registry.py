"""What can be extended by a file: model families, importance metrics, distillation losses.

Each registry takes its entries from three places, and loads one when it is asked for by name:

1. the files of its package: ``distill/losses/jsd.py`` is the loss ``jsd``, by its attribute ``LOSS``;
2. installed packages, by entry points: ``[project.entry-points."minitron.losses"]`` with ``jsd2 = "mine:LOSS"``;
3. files that a config names, ``extensions=[./mine.py]``: what their attributes ``FAMILY``, ``METRIC`` and ``LOSS``
   hold, by its ``name``.

Listing names imports none of them. This module needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from nemo_minitron.errors import MinitronError, did_you_mean

ROOT = Path(__file__).parent
_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]{0,63}")


def check_name(name: object, what: str) -> str:
    """A name that files and keys may hold: up to 64 letters, digits and underscores, no digit first.

    Args:
        what: begins the message.

    Raises:
        MinitronError: any other.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise MinitronError(f"{what}: expected up to 64 letters, digits and underscores, found {name!r:.80}")
    return name


class Registry:
    """Entries of one kind by name.

    Args:
        kind: what an entry is, for messages. attribute: name by which a file holds its entry.
        room: package of the entries that are ours, dots for folders, below ``nemo_minitron``; a file that begins with
            an underscore is none. group: entry points of other packages.
        first: name that is listed first; the others follow by the alphabet, and then those of others.
    """

    def __init__(self, kind: str, attribute: str, room: str, group: str, first: str) -> None:
        self.kind, self.attribute, self.group = kind, attribute, group
        self._room, self._first = room, first
        self._loaded: dict[str, Any] = {}
        self._files: dict[str, Path] = {}

    def names(self) -> tuple[str, ...]:
        """Every name that :meth:`get` knows; nothing is imported."""
        return tuple(dict.fromkeys([*self._own(), *sorted(self._entry_points), *self._files]))

    def get(self, name: str) -> Any:
        """The entry of this name, imported when it is first asked for.

        Raises:
            MinitronError: a name that is not known; a module without the entry, or whose entry has another name.
        """
        if name not in self._loaded:
            self._loaded[name] = self._checked(name, self._import(name))
        return self._loaded[name]

    def every(self) -> Iterable[Any]:
        """All entries, in the order of their names."""
        return (self.get(name) for name in self.names())

    def add(self, entry: Any, file: Path) -> None:
        """Take what an extension file holds, by its ``name``.

        Raises:
            MinitronError: an entry without a name, or with one that is taken by another file.
        """
        name = getattr(entry, "name", None)
        if not isinstance(name, str) or not name:
            raise MinitronError(f"extensions: {file}: {self.attribute} must have a name, found {name!r}")
        check_name(name, f"extensions: {file}: {self.attribute}.name")
        taken = self._files.get(name)
        if taken is not None and taken != file:
            raise MinitronError(f"extensions: {file}: the {self.kind} '{name}' is already in {taken}")
        if taken is None and name in self.names():
            raise MinitronError(f"extensions: {file}: there is a {self.kind} '{name}' already; give it another name")
        self._files[name], self._loaded[name] = file, entry

    def file_of(self, name: str) -> Path | None:
        """The extension file that holds this entry; None for those of packages, whose version tells them apart."""
        return self._files.get(name)

    def _own(self) -> tuple[str, ...]:
        folder = ROOT.joinpath(*self._room.split("."))
        names = sorted(path.stem for path in folder.glob("[!_]*.py"))
        return tuple(sorted(names, key=lambda name: name != self._first))

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        """Those of all installed packages, which takes ten milliseconds to list: once in a process."""
        return {point.name: point for point in entry_points(group=self.group)}

    def _import(self, name: str) -> Any:
        if name in self._own():
            return getattr(importlib.import_module(f"nemo_minitron.{self._room}.{name}"), self.attribute)
        point = self._entry_points.get(name)
        if point is None:
            known = self.names()
            raise MinitronError(f"no {self.kind} '{name}'; known are {', '.join(known)}." + did_you_mean(name, known))
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise MinitronError(f"entry point {self.group} '{name}': cannot load {point.value}: {error}") from error

    def _checked(self, name: str, entry: Any) -> Any:
        found = getattr(entry, "name", None)
        if found != name:
            raise MinitronError(f"the {self.kind} '{name}' must have this name, found {found!r}")
        return entry


FAMILIES = Registry("model family", "FAMILY", "model.families", "minitron.families", "llama")
METRICS = Registry("importance metric", "METRIC", "importance.metrics", "minitron.metrics", "minitron")
LOSSES = Registry("distillation loss", "LOSS", "distill.losses", "minitron.losses", "forward_kl")

_EXTENSIBLE = (FAMILIES, METRICS, LOSSES)


def load_extensions(files: Iterable[str]) -> list[Path]:
    """Run extension files, each once in a process, and register what they hold.

    They are code of the user, run with the user's rights: only a config or a command line can name one, never a
    checkpoint.

    Returns:
        Their absolute paths.

    Raises:
        MinitronError: a file that is missing, fails when it is run, or holds nothing to register.
    """
    paths = [Path(file).absolute() for file in files]
    for path in paths:
        if not path.is_file() or path.suffix != ".py":
            raise MinitronError(f"extensions: expected a file that ends in .py, found '{path}'")
        module_name = f"minitron_extension_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
        if module_name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None  # it ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses look their module up while it runs
        try:
            spec.loader.exec_module(module)
            held = [registry for registry in _EXTENSIBLE if getattr(module, registry.attribute, None) is not None]
            if not held:
                names = ", ".join(registry.attribute for registry in _EXTENSIBLE)
                raise MinitronError(f"extensions: {path}: expected one of {names} in it, found none")
            for registry in held:
                registry.add(getattr(module, registry.attribute), path)
        except MinitronError:
            del sys.modules[module_name]
            raise
        except Exception as error:
            del sys.modules[module_name]
            raise MinitronError(f"extensions: {path}: {type(error).__name__}: {error}") from error
    return paths
