"""Which of a job's processes this one is, as torchrun or Slurm says it in the environment, and what it tells."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One process of a job.

    Attributes:
        rank: of this process in the job, from 0; ``local_rank``: on its machine.
        world_size: processes in the job; ``local_world_size``: on each machine, None where the launcher left it out.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int | None


def place(environment: Mapping[str, str] | None = None) -> Place | None:
    """Where a launcher put this process; None when it runs alone.

    torchrun's variables come first: it may itself run inside a Slurm job. Of Slurm only a step of several tasks counts
    (``SLURM_STEP_NUM_TASKS``, which srun sets): in the shell of an allocation and in a batch script ``SLURM_NTASKS`` is
    the number of tasks that could be started, and this process is none of them.
    """
    env = os.environ if environment is None else environment
    if "LOCAL_RANK" in env:
        local = env.get("LOCAL_WORLD_SIZE")
        rank, world = int(env.get("RANK", env["LOCAL_RANK"])), int(env.get("WORLD_SIZE", "1"))
        return Place(rank, int(env["LOCAL_RANK"]), world, int(local) if local else None)
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        nodes = int(env.get("SLURM_STEP_NUM_NODES", "0"))
        return Place(int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), tasks, tasks // nodes if nodes else None)
    return None


@functools.cache
def notice(line: str) -> None:
    """Say one line on stderr, once, by the job's first process: what a user should know and need not mend."""
    here = place()
    if here is None or here.rank == 0:
        print(f"minitron: {line}", file=sys.stderr)


def quiet() -> None:
    """Silence what torchao says of its kernels for other GPUs and of how it registers its classes; before its import,
    which is NeMo's and transformers'."""
    for logger in ("torchao", "torch.utils._pytree"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def slurm_rendezvous(environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Address and port at which the tasks of a Slurm step meet: its first machine, a port made of the job's id.

    The port lies between 15000 and 25000, below the range from which Linux gives out ports of its own accord.
    """
    env = os.environ if environment is None else environment
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    head, bracket, numbers = nodes.partition("[")
    if not bracket or "," in head:
        host = head.split(",")[0]
    else:  # node[003-007,012],other
        host = head + numbers.split("]")[0].split(",")[0].split("-")[0]
    return host, 15000 + int(env.get("SLURM_JOB_ID", "0")) % 10000
