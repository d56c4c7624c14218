"""Several processes on one machine: torch's elastic agent, and one line on why a job ended.

What torchrun would start, without its report: a user's error comes out as the one line that it is, and a rank that
dies is named with what killed it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_minitron.jobs import lifeline
from nemo_minitron.jobs.terminal import clear_line

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_REPORTING = "MINITRON_AGENT_REPORTS"
"""Set for the ranks that :func:`launch` starts: what they hand to :func:`hand_over` will be printed."""


def launch(processes: int, argv: Sequence[str]) -> int:
    """Run ``python -m nemo_minitron ARGV`` on ``processes`` ranks of this machine; return the job's exit status.

    When a rank ends otherwise than well, the others are stopped (SIGTERM, after half a minute SIGKILL) and one line on
    stderr says which rank it was and why.

    Returns:
        0; 2 after a user's error; 128 + n when this process got signal n; else 1.

    Raises:
        KeyboardInterrupt: the ranks were stopped by SIGINT.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for part in ("", ".agent.server.api"):  # they tell every failure three times, and a signal in the midst of a line
        logging.getLogger(f"torch.distributed.elastic{part}").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ[_REPORTING] = "1"
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",  # a host name may not resolve
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            with lifeline.starting(hears_interrupts=True):  # from the agent alone: they have sessions of their own
                elastic_launch(config, sys.executable)("-u", "-m", "nemo_minitron", *argv)
        except ChildFailedError as error:
            line, status = explain(error)
            clear_line()
            print(f"minitron: {line}", file=sys.stderr)
            return status
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            clear_line()
            print(f"minitron: stopped by {signal.Signals(error.sigval).name}", file=sys.stderr)
            return 128 + int(error.sigval)
        finally:
            del os.environ[_REPORTING]
    return 0


def has_reporter() -> bool:
    """Whether the agent that started this rank says how the job ended."""
    return _REPORTING in os.environ


def hand_over(message: str) -> bool:
    """Give a user's error to the agent that started this rank; False when nobody would print it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or not has_reporter():
        return False
    with open(path, "w") as file:
        json.dump({"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}, file)
    return True


def explain(error: ChildFailedError) -> tuple[str, int]:
    """(line, exit status) for a failed job, from the rank whose end was seen first; the agent ended the others."""
    rank, failure = next(iter(error.failures.items()))
    message = failure.error_file_data.get("message")
    if failure.exitcode == 2 and isinstance(message, dict):
        return str(message["message"]), 2
    who = f"rank {rank} (pid {failure.pid})"
    if failure.exitcode < 0:
        return f"{who} died by {failure.signal_name()}; the job was stopped", 1
    return f"{who} failed with exit status {failure.exitcode}, see its output above; the job was stopped", 1
