"""Where the numbers of a table come from."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path
from typing import Any


def provenance() -> dict[str, str]:
    """``command``, without the folders of absolute paths, and ``machine`` of a table."""
    names = []
    if (file := Path("/proc/cpuinfo")).is_file():
        names = [line.split(":")[1].strip() for line in file.read_text().splitlines() if line.startswith("model name")]
    processor = f"{names[0]}, {len(names)} cores" if names else platform.processor()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        processor += f", {torch.cuda.get_device_name()}"
    words = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    return {
        "command": "python " + re.sub(r"(?<![^ =])/[^ ]*/", "", " ".join(words)),
        "machine": f"{processor}, {platform.system()}, Python {platform.python_version()}",
    }


def commands(table: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
    """That a table came from which keeps parts of an earlier one."""
    return [*earlier.get("commands", [earlier["command"]]), table["command"]]
