"""Heavy packages, imported in a process of its own: what they print, raise or crash on stays there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

LIMIT_S = 120
_MARK = "minitron-probe "
_CHILD = (
    "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep); "
    "from nemo_minitron.doctor.probe import answer; answer(sys.argv[2], sys.argv[3])"
)


@dataclass(frozen=True)
class Probed:
    """What came of an import.

    Attributes:
        error: why it failed, in one line; None when it worked.
        facts: what the function of the probe found.
    """

    error: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def probe(module: str, function: str = "") -> Probed:
    """Import ``module`` in another process, and call ``function`` (``package.module:name``) there for more facts."""
    command = [sys.executable, "-c", _CHILD, os.pathsep.join(sys.path), module, function]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Probed(f"no answer within {LIMIT_S} s")
    except OSError as error:
        return Probed(f"no process could be started: {error.strerror}")
    lines = [line for line in done.stdout.decode(errors="replace").splitlines() if line.startswith(_MARK)]
    if not lines:
        how = f"by signal {-done.returncode}" if done.returncode < 0 else f"with status {done.returncode}"
        return Probed(f"the process that imported it ended {how}")
    return Probed(**json.loads(lines[-1].removeprefix(_MARK)))


def answer(module: str, function: str) -> None:
    """Print, as the child, what :func:`probe` reads."""
    import importlib

    found: dict[str, Any] = {}
    try:
        importlib.import_module(module)
        if function:
            where, _, name = function.partition(":")
            found["facts"] = getattr(importlib.import_module(where), name)()
    except BaseException as error:  # a package may raise SystemExit too
        said = str(error).strip().splitlines()
        found["error"] = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
    print(f"\n{_MARK}{json.dumps(found)}", flush=True)
    os._exit(0)  # what a broken package does at the end is of no interest
