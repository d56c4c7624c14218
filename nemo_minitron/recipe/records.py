"""What is known of a run's stages: fingerprints of what decides their results, digests of what they wrote."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_minitron import __version__
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import write_file
from nemo_minitron.files.text import read_json
from nemo_minitron.recipe.named import named_inputs
from nemo_minitron.recipe.stage import Stage

PACKAGES = (
    "torch",
    "nemo_toolkit",
    "megatron-core",
    "lightning",
    "transformers",
    "numpy",
    "hydra-core",
    "omegaconf",
    "transformer_engine",
    "apex",
)
"""What a stage's result may depend on; the last two are optional."""


class Records:
    """What is known of the stages of one run folder: ``FOLDER/NAME.json``, and digests of files already read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MinitronError(f"run_dir {folder.parent} cannot be written: {error.strerror}") from None
        self._digests: dict[str, list] = read_record(folder / "digests.json")

    def read(self, name: str) -> dict[str, Any]:
        """The record of a stage, empty when there is none."""
        return read_record(self.folder / f"{name}.json")

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Replace the record of a stage."""
        write_file(self.folder / f"{name}.json", json.dumps(record, indent=2) + "\n")

    def fingerprint(self, stage: Stage, known: Mapping[str, str] | None = None) -> str:
        """sha256 over the command, its resolved config, this package's version, and the content of its inputs and of
        what its config names beside them.

        Args:
            known: content of inputs that need not be there any more, by path.

        Raises:
            MinitronError: an input is absent.
        """
        inputs: dict[str, str] = {}
        for pattern in stage.inputs:
            if known and pattern in known:
                inputs[pattern] = known[pattern]
                continue
            paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
            if not paths or not all(os.path.exists(path) for path in paths):
                raise MinitronError(f"stage '{stage.name}': input {pattern} does not exist")
            inputs |= {path: self.content(path) for path in paths}
        inputs |= {path: self.content(path) for path in named_inputs(stage)}
        what = [stage.command, OmegaConf.to_container(stage.config), inputs, __version__]
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()

    def outputs(self, stage: Stage) -> dict[str, str] | None:
        """Content of each declared output, or None when one is absent."""
        if not all(os.path.exists(path) for path in stage.outputs):
            return None
        return {path: self.content(path) for path in stage.outputs}

    def content(self, path: str) -> str:
        """sha256 of a file, or of the names and contents in a folder."""
        root = Path(path)
        if root.is_file():
            digest = self._file(root)
        else:
            files = sorted(file for file in root.rglob("*") if file.is_file())
            lines = (f"{file.relative_to(root)} {self._file(file)}\n" for file in files)
            digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        write_file(self.folder / "digests.json", json.dumps(self._digests))
        return digest

    def _file(self, file: Path) -> str:
        stat = file.stat()
        name = str(file.resolve())
        # the time of change, unlike that of modification, is nobody's to set
        known = [stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]
        if self._digests.get(name, [])[:-1] == known:
            return self._digests[name][-1]
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        self._digests[name] = [*known, digest.hexdigest()]
        return digest.hexdigest()


def outdated(stages: Sequence[Stage], reads: Mapping[str, Sequence[str]], records: Records) -> dict[str, str]:
    """Stages that have run, and whose outputs are not what the recipe as it is now would make of them.

    A stage that was never run here, whose outputs somebody may have put there, is none of them, and neither is one
    whose inputs are gone.

    Args:
        reads: as :func:`nemo_minitron.recipe.order.readers` gives it.

    Returns:
        The name of each with that of the first stage that is to run again: itself, or one that it reads from.
    """
    found: dict[str, str] = {}
    known: dict[str, str] = {}
    for stage in stages:
        record = records.read(stage.name)
        if not record:
            continue
        first = next((found[name] for name in reads[stage.name] if name in found), None)
        if first is None:
            with contextlib.suppress(MinitronError):  # an input is gone
                same = record.get("fingerprint") == records.fingerprint(stage, known)
                first = None if same and record.get("state") == "done" else stage.name
        if first is not None:
            found[stage.name] = first
        known |= {path: what for path, what in (record.get("outputs") or {}).items() if not os.path.exists(path)}
    return found


def settled(stages: Sequence[Stage], records: Records) -> bool:
    """Whether a chain, of which only the last output is wanted, need not run: all done, unchanged, that output there.

    What the earlier ones wrote may have been deleted since; its recorded content stands in for it.
    """
    known: dict[str, str] = {}
    record: dict[str, Any] = {}
    for stage in stages:
        record = records.read(stage.name)
        if record.get("state") != "done" or record.get("fingerprint") != records.fingerprint(stage, known):
            return False
        known |= record["outputs"]
    return records.outputs(stages[-1]) == record["outputs"]


def versions() -> dict[str, str]:
    """Version of this package, of Python, and of what stages compute with, as far as installed."""
    found = {"nemo_minitron": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def read_record(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except MinitronError:
        return {}  # a record cut short is no record
