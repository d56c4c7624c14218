"""``minitron search … +cluster=slurm``: the whole search as one job, which starts the processes of its stages itself.

What a search runs depends on what it has measured, so that it cannot be a chain of jobs. A job that Slurm requeues, or
that ran out of time and is submitted again, goes on from the records in ``output_path``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from nemo_minitron.config.schema import SearchConfig
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.files.staging import write_file
from nemo_minitron.jobs import slurm
from nemo_minitron.jobs.slurm_chain import cancel, waiting
from nemo_minitron.recipe import Records
from nemo_minitron.recipe.records import read_record
from nemo_minitron.recipe.submit import JOBS
from nemo_minitron.search.request import last_stage


def submit(cfg: SearchConfig, composed: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Submit a search; with ``cluster.dry_run`` print its script instead.

    Args:
        composed: what ``cfg`` was made of, with the ``cluster`` section. overrides: those that it was composed from.

    Raises:
        MinitronError: a key that the search needs is absent or wrong, a job of this search still waits or runs,
            ``output_path`` cannot be written, or as :func:`nemo_minitron.jobs.slurm.submit`.
    """
    last_stage(cfg)
    path = Path(required(cfg, "output_path")) / ".stages" / JOBS
    for job, state in waiting(map(str, read_record(path).values())).items():
        raise MinitronError(
            f"output_path: the search in {cfg.output_path} is job {job}, {state}; wait for it, or scancel {job}"
        )
    number = slurm.submit("search", composed, overrides)
    if number is None:
        return
    try:
        Records(path.parent)
    except MinitronError:
        raise MinitronError(f"output_path: expected a folder, cannot write {path.parent}; {cancel([number])}") from None
    write_file(path, json.dumps({"search": number}) + "\n")
