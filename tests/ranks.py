"""Run a function on several real gloo processes."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Call ``function(*args)`` on ``world`` processes joined by gloo; return their results in rank order.

    ``function`` must be importable (module level). A rank's exception fails the caller with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(function, world, folder, args), nprocs=world, join=True)
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(world)]


def _rank(rank: int, function: Callable[..., Any], world: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        result = function(*args)
    except BaseException:
        traceback.print_exc()
        raise
    torch.save(result, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
