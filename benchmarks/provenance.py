"""Where the numbers of a table come from."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

NAMES = ("command", "machine", "date", "commit")
"""What every file in ``results`` says of itself; ``recovered`` names those that were filled in later."""


def provenance() -> dict[str, str]:
    """``command``, without the folders of absolute paths, ``machine``, ``date`` and ``commit`` of a measurement."""
    names = []
    if (file := Path("/proc/cpuinfo")).is_file():
        names = [line.split(":")[1].strip() for line in file.read_text().splitlines() if line.startswith("model name")]
    processor = f"{names[0]}, {len(names)} cores" if names else platform.processor()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        processor += f", {torch.cuda.get_device_name()}"
    script, here = Path(sys.argv[0]).resolve(), Path(__file__).parent.resolve()
    script = script.relative_to(here) if script.is_relative_to(here) else Path(script.name)
    words = [f"benchmarks/{script}", *sys.argv[1:]]
    return {
        "command": "python " + re.sub(r"(?<![^ =])/[^ ]*/", "", " ".join(words)),
        "machine": f"{processor}, {platform.system()}, Python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def _commit() -> str:
    """Of this checkout, with ``+`` where files differ from it; of a copy without git, ``COMMIT`` has to say it."""
    if given := os.environ.get("COMMIT"):
        return given
    call = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not recorded: no git checkout"


def commands(table: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
    """That a table came from which keeps parts of an earlier one."""
    return [*earlier.get("commands", [earlier["command"]]), table["command"]]
