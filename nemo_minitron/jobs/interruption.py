"""Ctrl-C and SIGTERM: a command unwinds, ends with 128 + the signal's number, and says how to go on."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

TRAININGS = ("finetune", "distill")
_AGAIN_S = 0.1


class Interrupted(SystemExit):
    """Ctrl-C. No KeyboardInterrupt: of these Lightning makes an exit status of 1 and a message of its own."""


@contextmanager
def orderly_end() -> Iterator[None]:
    """Let the first SIGINT or SIGTERM unwind what runs within, so that what it was writing is removed.

    A second SIGINT ends the process where it stands. SIGINT stays ignored where it is, as in a shell's background.
    Where Python drops what is raised (in what runs at a fork, in a destructor), the signal comes again a moment later.

    Raises:
        Interrupted: on SIGINT.
        SystemExit: on SIGTERM, by which launchers and Slurm end a process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> NoReturn:
        sys.exit(128 + number)

    def interrupt(number: int, frame: Any) -> NoReturn:
        signal.signal(signal.SIGINT, give_up)
        raise Interrupted(128 + number)

    def give_up(number: int, frame: Any) -> NoReturn:
        os.write(2, b"minitron: interrupted again, ended at once; the next run clears what this one was writing\n")
        os._exit(128 + number)

    handlers: dict[int, Any] = {signal.SIGTERM: end}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = interrupt
    tell = sys.unraisablehook

    def dropped(what: Any) -> None:
        code = what.exc_value.code if isinstance(what.exc_value, SystemExit) else None
        number = code - 128 if isinstance(code, int) else 0
        if number not in handlers:
            tell(what)
        elif threading.current_thread() is threading.main_thread():
            signal.signal(number, handlers[number])
            threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number)).start()

    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = tell
        for number, handler in before.items():
            signal.signal(number, handler)


def how_to_go_on(command: str, cfg: Any, since: float) -> str:
    """What to do after ``command`` was interrupted, from the files that it left.

    Args:
        since: when it started; a training that was not to be resumed may find the checkpoints of earlier ones.
    """
    from nemo_minitron.config.schema import COMPOSITE

    if command in COMPOSITE:
        return "the same command goes on from the stage that it was in"
    if command not in TRAININGS:
        return "what it was to write is as it was before; the same command starts again"
    manager = cfg.get("exp_manager") or {}
    resumes = bool(manager.get("resume_if_exists"))
    found = last_checkpoint(manager, 0.0 if resumes else since)
    if found is None:
        return "no checkpoint was saved; the same command starts anew"
    folder, step = found
    where = f"from step {step} of {folder}"
    if resumes:
        return f"the same command goes on {where}"
    return f"add exp_manager.resume_if_exists=true exp_manager.explicit_log_dir={folder} to go on {where}"


def last_checkpoint(manager: Any, since: float) -> tuple[Path, str] | None:
    """(experiment's folder, step) of the newest checkpoint that a training with this ``exp_manager`` goes on from."""
    parameters = manager.get("checkpoint_callback_params") or {}
    root = Path(manager.get("explicit_log_dir") or "")
    if not manager.get("explicit_log_dir"):
        root = Path(manager.get("exp_dir") or "nemo_experiments") / str(manager.get("name") or "default")
    pattern = "checkpoints/*-last*"  # below the root or, in a run that was not to be resumed, below its date
    places = [Path(parameters["dirpath"]).glob("*-last*")] if parameters.get("dirpath") else []
    places += [] if places else [root.glob(pattern), root.glob(f"*/{pattern}")]
    saved = [
        path
        for place in places
        for path in place
        if not path.name.endswith("-unfinished")
        and not path.with_name(path.name.removesuffix(".ckpt") + "-unfinished").exists()
        and path.stat().st_mtime >= since
    ]
    if not saved:
        return None
    newest = max(saved, key=lambda path: path.stat().st_mtime)
    step = re.search(r"step=(\d+)", newest.name)
    return (root if parameters.get("dirpath") else newest.parents[1]), step[1] if step else "?"
