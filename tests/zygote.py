"""Grids of gloo processes forked from one process that has imported NeMo once.

Importing NeMo takes some nine seconds of a core; a test matrix of ten grids on four ranks would pay it forty times.
``Zygote().run("module:function", world, *args)`` calls the function on ``world`` ranks and returns their results.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

TIMEOUT_S = int(os.environ.get("MINITRON_TEST_TIMEOUT_S", "240"))
"""Of one job; a machine that is busy with other work needs more."""


class Zygote:
    """Handle of the importing process; one job at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, function: str, world: int, *args: Any) -> list[Any]:
        """Results of ``module:function(*args)`` in rank order; raises with the first rank's traceback on failure."""
        pickle.dump((function, world, args), self._process.stdin)  # type: ignore[arg-type]
        self._process.stdin.flush()  # type: ignore[union-attr]
        ok, result = pickle.load(self._process.stdout)  # type: ignore[arg-type]
        if not ok:
            raise RuntimeError(result)
        return result

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


def _serve() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the ranks print must not mix with results
    from nemo_minitron import runtime

    runtime.prepare()
    import nemo_minitron.nemo.distillation
    import nemo_minitron.nemo.training  # noqa: F401

    while True:
        try:
            function, world, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_job(function, world, args), out)
        out.flush()


def _job(function: str, world: int, args: tuple[Any, ...]) -> tuple[bool, Any]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = {}
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _rank(rank, world, port, function, args, Path(folder))
            children[pid] = rank
        deadline = time.monotonic() + TIMEOUT_S
        failed = False
        while children and not failed:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                children.pop(pid)
                failed = status != 0
            elif time.monotonic() > deadline:
                failed = True
            else:
                time.sleep(0.02)
        for pid in children:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        if failed or errors:
            return False, errors[0] if errors else f"{function} on {world} ranks: a rank died or hung"
        return True, [pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(world)]


def end_children() -> None:
    """End what saving a checkpoint left running: Megatron-Core's process for queues outlives a rank that just exits."""
    for child in multiprocessing.active_children():
        child.terminate()
        child.join()


def _rank(rank: int, world: int, port: int, function: str, args: tuple[Any, ...], folder: Path) -> None:
    code = 1
    try:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GROUP_RANK="0", TORCHELASTIC_RUN_ID="test",
        )  # fmt: skip
        import torch

        torch.set_num_threads(1)
        module, name = function.split(":")
        result = getattr(importlib.import_module(module), name)(*args)
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        end_children()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
