"""What ranks do in ``test_progress.py``: small trainings whose stderr is a terminal or a file."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_minitron import runtime
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs import progress
from tests.nemo.grid_jobs import train

SHOW = ("++trainer.enable_progress_bar=true", "trainer.val_check_interval=2", "trainer.limit_val_batches=2")


def in_terminal(columns: int, *args: Any) -> str:
    """All that a training writes into a terminal of that width."""
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    os.environ["TERM"] = "xterm"
    for name in ("COLUMNS", "NO_COLOR"):
        os.environ.pop(name, None)
    parts: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(terminal, 1 << 16):
                parts.append(part)
        except OSError:  # nobody is at the other end any more
            pass

    reader = threading.Thread(target=read)
    reader.start()
    _to(end, *args)
    reader.join()
    return b"".join(parts).decode()


def to_file(path: str, *args: Any) -> str:
    """All that a training writes into a file, which has every step."""
    progress.START_SECONDS = progress.LOG_SECONDS = 0.0
    _to(os.open(path, os.O_WRONLY | os.O_CREAT), *args)
    return Path(path).read_text()


def _to(descriptor: int, failing: bool, *args: Any) -> None:
    """Run with stdout and stderr there, and bring them back; what a user can mend is told as the command line does."""
    progress.REDRAW_SECONDS = 0.0
    before, streams = (os.dup(1), os.dup(2)), (sys.stdout, sys.stderr)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    try:
        _train(failing, *args)
    finally:
        sys.stdout, sys.stderr = streams
        for number, saved in enumerate(before, start=1):
            os.dup2(saved, number)


def _train(failing: bool, *args: Any) -> None:
    if not failing:
        return train(*args)
    from nemo_minitron.nemo.model import MinitronGPTModel

    whole: Callable[..., Any] = MinitronGPTModel._log_step

    def broken(self: Any, terms: Any, tokens: Any, started: float) -> None:
        if self.trainer.global_step == 2:
            terms = {name: value * float("nan") for name, value in terms.items()}
        whole(self, terms, tokens, started)

    MinitronGPTModel._log_step = broken  # this process is the test's own
    try:
        train(*args)
    except MinitronError as error:
        if runtime.rank() == 0:
            print(f"minitron: {error}", file=sys.stderr)
