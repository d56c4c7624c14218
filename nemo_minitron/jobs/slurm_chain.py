"""Jobs that wait for one another: submitted all, or none."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.slurm import sbatch

_SIGNALS = {signal.SIGINT, signal.SIGTERM}


@dataclass(frozen=True)
class Link:
    """A job's script, and the names of earlier links that must end well before it starts."""

    name: str
    script: Path
    after: tuple[str, ...] = ()


def submit_chain(
    links: Sequence[Link], dependency: str | None = None, tell: Callable[[dict[str, str]], None] = lambda numbers: None
) -> dict[str, str]:
    """Hand all of ``links`` to sbatch, each with ``--dependency=afterok:…`` of those before it; return their numbers.

    Args:
        dependency: what a job that waits for none of the chain waits for.
        tell: called after each job with the numbers so far, by name.

    Raises:
        MinitronError: sbatch refused one of them, in its own words. What was submitted before is then cancelled, as
            after an interruption, and the error says whether that was done.
    """
    numbers: dict[str, str] = {}
    try:
        for link in links:
            before = [numbers[name] for name in link.after]
            waits = f"afterok:{':'.join(before)}" if before else dependency
            mask = signal.pthread_sigmask(
                signal.SIG_BLOCK, _SIGNALS
            )  # a job whose number is lost could not be cancelled
            try:
                numbers[link.name] = sbatch(link.script, *([f"--dependency={waits}"] if waits else []))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            tell(numbers)
    except BaseException as error:
        said = cancel(numbers.values())
        if isinstance(error, MinitronError):
            raise MinitronError(f"{error}{said and '; '}{said}") from None
        if said:
            print(f"minitron: {said}", file=sys.stderr)
        raise
    return numbers


def cancel(numbers: Iterable[str]) -> str:
    """Cancel jobs; say that it was done, or how to do it. Nothing for none."""
    jobs = list(numbers)
    if not jobs:
        return ""
    command = ["scancel", *jobs]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wrong = done.stderr.strip().splitlines() if done.returncode else []
        failed = bool(done.returncode)
    except OSError as error:
        wrong, failed = [str(error)], True
    what = f"the {len(jobs)} jobs" if len(jobs) > 1 else "the job"
    if failed:
        why = wrong[-1] if wrong else "it failed"
        return f"{what} submitted before could not be cancelled ({why}): run {' '.join(command)}"
    return f"{what} submitted before ({', '.join(jobs)}) {'were' if len(jobs) > 1 else 'was'} cancelled"


def waiting(numbers: Iterable[str]) -> dict[str, str]:
    """State of those jobs that Slurm still has in its queue, or runs, by number; none where it cannot be asked."""
    jobs = list(numbers)
    if not jobs:
        return {}
    command = ["squeue", "--noheader", "--format=%i %T", f"--jobs={','.join(jobs)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return {}
    rows = [line.split() for line in done.stdout.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2 and row[0] in jobs}
