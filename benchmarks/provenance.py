"""Where the numbers of a table come from."""

from __future__ import annotations

import platform
import sys
from pathlib import Path


def provenance() -> dict[str, str]:
    """``command`` and ``machine`` of a table."""
    names = []
    if (file := Path("/proc/cpuinfo")).is_file():
        names = [line.split(":")[1].strip() for line in file.read_text().splitlines() if line.startswith("model name")]
    processor = f"{names[0]}, {len(names)} cores" if names else platform.processor()
    return {
        "command": "python " + " ".join(sys.argv),
        "machine": f"{processor}, {platform.system()}, Python {platform.python_version()}",
    }
