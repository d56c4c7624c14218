"""transformers of several versions, each in a folder of its own that goes before this environment's packages."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

VERSIONS = {
    "4.51.3": ("tokenizers==0.21.*", "huggingface_hub==0.*"),
    "4.57.6": ("tokenizers==0.22.*", "huggingface_hub==0.*"),
    "5.24.0": (
        "tokenizers==0.23.*",
        "huggingface_hub==2.4.*",
        *("httpx2", "httpcore2", "truststore", "typer", "annotated-doc", "shellingham", "click"),
    ),
}
"""Version → what it needs beside what this environment has."""


@cache
def folder(name: str) -> Path | None:
    """Packages of a version, None for those of this environment; installed once into the user's cache.

    Skips the test where no package index has them.
    """
    if version("transformers") == name:
        return None
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_minitron" / "compat"
    target = root / f"transformers-{name}"
    if not (target / "complete").is_file():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(target)]
        pip = subprocess.run([*install, f"transformers=={name}", *VERSIONS[name]], capture_output=True, text=True)
        if pip.returncode:
            pytest.skip(f"no transformers {name}: {pip.stderr.strip().splitlines()[-1]}")
        (target / "complete").touch()
    return target


def run(name: str, script: Path, *arguments: object) -> None:
    """Run a script, which must not need this package, under a version."""
    target = folder(name)
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = "" if target is None else str(target)
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]


def loaded(name: str, cases: Path, out: Path) -> dict:
    """What a version makes of the folders that ``cases`` names; see ``load.py``."""
    run(name, Path(__file__).with_name("load.py"), cases, out)
    found = torch.load(out, weights_only=True)
    assert found["version"] == name
    return found
