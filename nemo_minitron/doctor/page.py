"""The page: its sections, as text and as JSON."""

from __future__ import annotations

import getpass
import json
import platform
import re

from nemo_minitron.doctor.disk import disk
from nemo_minitron.doctor.gpus import gpus
from nemo_minitron.doctor.launcher import launcher
from nemo_minitron.doctor.line import Line
from nemo_minitron.doctor.optional import optional
from nemo_minitron.doctor.probe import probe
from nemo_minitron.doctor.processor import processor
from nemo_minitron.doctor.versions import present, versions
from nemo_minitron.files.plain import short

Page = dict[str, list[Line]]
"""Section → its lines."""
_PATH = re.compile(r"(?<![\w.])~?(?:/[^\s/'\"():,;]+)+/?")


def examine() -> Page:
    """Look at this machine. Nothing that is found, or fails, raises."""
    torch = probe("torch", "nemo_minitron.doctor.torch_facts:facts")
    return {
        "versions": list(versions()),
        "processor": list(processor()),
        "GPUs": list(gpus(torch, present("torch"))),
        "optional": list(optional(bool(torch.facts.get("gpus")))),
        "disk": list(disk()),
        "launcher": list(launcher()),
    }


def problems(page: Page) -> list[str]:
    """What stops every command, a few words each."""
    return [f"{line.name}: {_said(line.text)}" for lines in page.values() for line in lines if line.level == "problem"]


def text(page: Page) -> str:
    """A line each, which begins with its level; then section, name, and what was found."""
    rows = [(line.level, section, line.name, _said(line.text)) for section, lines in page.items() for line in lines]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "".join(
        "  ".join([*(word.ljust(width) for word, width in zip(row, widths, strict=False)), row[3]]) + "\n"
        for row in rows
    )


def as_json(page: Page) -> str:
    """The same for a bug report, without paths, names of a user or of a machine."""
    sections = {
        section: [{"level": line.level, "name": line.name, "text": anonymous(_said(line.text))} for line in lines]
        for section, lines in page.items()
    }
    found = {"system": f"{platform.system()} {platform.release()} {platform.machine()}", **sections}
    return json.dumps({**found, "problems": [anonymous(one) for one in problems(page)]}, indent=2) + "\n"


def anonymous(said: str) -> str:
    """Text without the folders of its paths, the user's name and the machine's."""
    said = _PATH.sub(_file, said)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run as nobody that it knows
        user = ""
    for name in (user, platform.node()):
        if len(name) > 2:
            said = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", said)
    return said


def _file(path: re.Match[str]) -> str:
    """The name of a file; nothing of a folder, which may be a user's."""
    name = path[0].rstrip("/").rpartition("/")[2]
    return f"…/{name}" if "." in name[1:] else "…"


def _said(text: str) -> str:
    return short(text, 300) or ""
