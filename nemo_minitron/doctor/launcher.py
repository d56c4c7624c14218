"""How processes come to be here: by this tool itself, torchrun or Slurm."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from nemo_minitron.doctor.line import Line
from nemo_minitron.jobs.processes import place


def launcher() -> Iterator[Line]:
    """Lines on the launcher of this process, and on Slurm's sbatch."""
    yield _launcher()
    if shutil.which("sbatch"):
        yield Line("ok", "sbatch", "there: +cluster=slurm submits a command")
    else:
        yield Line("ok", "sbatch", "none here: +cluster=slurm only writes scripts (cluster.dry_run=true)")


def _launcher() -> Line:
    try:
        where = place()
    except (ValueError, KeyError) as error:
        return Line(
            "note", "launcher", f"the environment of torchrun or Slurm is incomplete ({error!r:.80}): start anew"
        )
    if where is not None:
        by = "torchrun" if "LOCAL_RANK" in os.environ else "Slurm"
        return Line("ok", "launcher", f"{by}: {where.world_size} processes, this is rank {where.rank}")
    if "SLURM_JOB_ID" in os.environ:
        return Line(
            "note", "launcher", "within a Slurm job, but in no step of several tasks: srun starts more than one process"
        )
    return Line("ok", "launcher", "none: trainer.devices=N starts N processes on this machine")
