"""The processor, the cores of it that this process may use, and the memory."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.doctor.line import Line, gib

CPU, MEMORY = Path("/proc/cpuinfo"), Path("/proc/meminfo")
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container's limit stands, in version 2 and 1 of control groups."""


def processor() -> Iterator[Line]:
    """Lines on name, cores and memory."""
    named = re.search(r"^model name\s*: *(.+)$", text_of(CPU), re.M)
    yield Line("ok", "processor", f"{named[1].strip() if named else platform.machine() or 'unknown'}")
    usable, all_of_them = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    less = f" of {all_of_them}; the others are kept from this process" if usable < all_of_them else ""
    yield Line("ok", "cores", f"{usable}{less}")
    yield _memory()


def _memory() -> Line:
    sizes = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+): +(\d+) kB$", text_of(MEMORY), re.M)}
    total, free = sizes.get("MemTotal"), sizes.get("MemAvailable")
    if not total:
        return Line("note", "memory", "unknown: the system does not say")
    said = f"{gib(total)}, {gib(free)} available" if free is not None else gib(total)
    limits = [int(limit) for path in LIMITS if (limit := text_of(path).strip()).isdigit()]
    if limits and min(limits) < total:
        return Line("note", "memory", f"{said}, but this container gets {gib(min(limits))} at most")
    return Line("ok", "memory", said)


def text_of(path: Path) -> str:
    """A file of the system's, or nothing."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
