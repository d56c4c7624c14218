"""Processes that end with the one that they work for, whatever ends it, SIGKILL included.

A process that starts others does so within :func:`starting`; each of these calls :func:`hold` first of all. A thread
then waits for the parent's end. ``prctl(PR_SET_PDEATHSIG)`` would not do: it knows threads, and a pool's process may
have been started by a thread that ended long before its process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nemo_minitron.jobs.processes import place

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

_PARENT = "MINITRON_PARENT"
"""Process id of the one that started this process, in the environment until :func:`hold` takes it out."""

_INTERVAL_S = 0.5

_holder = 0
"""The process whose forks are tied to it; 0 where none are."""


@contextmanager
def starting(*, hears_interrupts: bool = False) -> Iterator[None]:
    """Start processes within this context: they learn whom to :func:`hold` on to.

    Args:
        hears_interrupts: whether Ctrl-C in a terminal reaches them too. Else this process alone hears it, and is to
            end them; what they print when they are interrupted would be noise.
    """
    os.environ[_PARENT] = str(os.getpid())
    before = None if hears_interrupts else signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited
    try:
        yield
    finally:
        os.environ.pop(_PARENT, None)
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def fork_server(preload: Sequence[str]) -> ForkServerContext:
    """Processes forked from a server that has imported ``preload``, which runs from now on and ends with this one."""
    from multiprocessing import forkserver, get_context

    context = get_context("forkserver")
    context.set_forkserver_preload(["nemo_minitron.jobs.served", *preload])
    with starting():
        forkserver.ensure_running()
    return context


def hold() -> None:
    """End this process, by SIGKILL, as soon as the one that it works for is gone; and its forks with it.

    That is whoever started a child of :mod:`multiprocessing`, a process begun within :func:`starting`, or a rank of
    torchrun or Slurm. Any other process may outlive its parent, as commands outlive a shell; its forks do not.
    """
    global _holder
    started_by = os.environ.pop(_PARENT, None)
    module: Any = sys.modules.get("multiprocessing")  # a child of it has it
    parent = module.parent_process() if module else None
    if parent is not None:
        _when(
            parent.join
        )  # the end of a pipe: the parent of a fork server's child is not the one that the system knows
    elif started_by is not None:
        _when(_end_of(int(started_by)))
    elif place() is not None:
        _when(_end_of(os.getppid()))
    if not _holder:
        os.register_at_fork(after_in_child=_hold_fork)
    _holder = os.getpid()


def end_children() -> None:
    """End the children that :mod:`multiprocessing` started and nobody has waited for."""
    module: Any = sys.modules.get("multiprocessing")
    for child in module.active_children() if module else ():
        child.kill()
        child.join()


def _hold_fork() -> None:
    global _holder
    parent, _holder = _holder, os.getpid()
    _when(_end_of(parent))


def _end_of(starter: int) -> Callable[[], None]:
    """What returns once process ``starter``, or the one between it and this one, is gone."""
    parent = os.getppid()  # a wrapper around Python may lie between

    def wait() -> None:
        while os.getppid() == parent and _exists(starter):
            time.sleep(_INTERVAL_S)

    return wait


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _when(wait: Callable[[], None]) -> None:
    def end() -> None:
        wait()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end, name="lifeline", daemon=True).start()
