"""Stand-ins for Slurm's programs, which note what they were called with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

RECORD = """\
#!{python}
import json, os, sys
with open({log!r}, "a") as log:
    names = ("MASTER_ADDR", "MASTER_PORT", "GREETING")
    env = {{name: os.environ.get(name) for name in names}}
    log.write(json.dumps({{"argv": [{name!r}, *sys.argv[1:]], "env": env}}) + "\\n")
{then}
"""


class Slurm:
    """Programs in ``folder``, for PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "calls"
        folder.mkdir()
        self.install("sbatch", "print('4217;main')")
        self.install("scontrol", "print('node07\\nnode08')")
        self.install("srun", "")

    def install(self, name: str, then: str) -> None:
        path = self.folder / name
        path.write_text(RECORD.format(python=sys.executable, log=str(self.log), name=name, then=then))
        path.chmod(0o755)

    def number_jobs(self, refused_from: int = 10**9) -> None:
        """Have sbatch number its jobs from 101, and refuse as soon as it has made so many."""
        self.install(
            "sbatch",
            f"made = sum(json.loads(line)['argv'][0] == 'sbatch' for line in open({str(self.log)!r}))\n"
            f"if made > {refused_from}: sys.exit('sbatch: error: QOSMaxSubmitJobPerUserLimit')\n"
            "print(100 + made)",
        )
        self.install("scancel", "")
        self.install("squeue", "")

    def calls(self, name: str) -> list[dict]:
        if not self.log.exists():
            return []
        return [call for call in map(json.loads, self.log.read_text().splitlines()) if call["argv"][0] == name]


def on_path(folder: Path, monkeypatch: Any, numbered: bool = True) -> Slurm:
    """Programs in ``folder``, first on PATH; ``numbered``: as :meth:`Slurm.number_jobs`."""
    fake = Slurm(folder)
    if numbered:
        fake.number_jobs()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return fake
