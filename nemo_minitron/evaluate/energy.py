"""Energy that a job uses, from the machine's own counters: RAPL of the processors, NVML of NVIDIA's GPUs.

Counters are of whole processors and GPUs: what else runs there is in them, and idle power is not taken off. Where a
machine offers none, which virtual machines seldom do, the reason is told instead of a number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron import parallel, runtime
from nemo_minitron.jobs.processes import place

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """A running sum of energy.

    Attributes:
        read: joules since some moment.
        wraps_at: joules at which it starts from 0 again; None where it never does.
    """

    name: str
    read: Callable[[], float]
    wraps_at: float | None = None


class Meter:
    """This rank's share of a job's counters: its own GPU, and on the first rank of each machine the processors.

    Attributes:
        counters: those that this rank reads.
        reason: why energy cannot be told; None where it can. One rank that cannot makes it so for all.

    Without CUDA the processors are what is measured, so they must be readable. With CUDA the GPU must be, and
    processors are added where they can be read: ``counters`` says so.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self.counters: list[Counter] = []
        self.reason: str | None = None
        if runtime.has_cuda():
            self._add(*_gpu())
        where = place()
        if where is None or where.local_rank == 0:
            counters, reason = _processors(powercap)
            self._add(counters, None if runtime.has_cuda() else reason)

    def _add(self, counters: list[Counter], reason: str | None) -> None:
        self.counters += counters
        self.reason = self.reason or reason

    def read(self) -> list[float]:
        """Joules of every counter now; for :meth:`since`."""
        return [counter.read() for counter in self.counters]

    def since(self, before: list[float]) -> float:
        """Joules that this rank's counters counted since ``before``; right unless one wrapped more than once."""
        total = 0.0
        for counter, start, now in zip(self.counters, before, self.read(), strict=True):
            total += now - start + (counter.wraps_at or 0.0 if now < start else 0.0)
        return total

    def of_the_job(self, joules: list[float]) -> list[float] | None:
        """Sums of every rank's ``joules``, on all ranks; None where one of them could not measure."""
        import torch

        mine = torch.tensor([*joules, float(self.reason is not None)], dtype=torch.float64, device=runtime.device())
        *sums, failed = parallel.all_reduce(mine, parallel.world()).tolist()
        return None if failed else sums

    def report(self, joules_per_token: dict[str, float] | None) -> dict[str, Any]:
        """The ``energy`` entry of a ``metrics.json``."""
        if joules_per_token is None:
            return {"available": False, "reason": self.reason or "not available on another rank of the job"}
        names = [counter.name for counter in self.counters]
        return {"available": True, "counters": names, "joules_per_token": joules_per_token}


def _processors(powercap: Path) -> tuple[list[Counter], str | None]:
    """Counters of Linux's powercap, one for each processor package; their parts are in them and are not counted."""
    counters, reason = [], f"found no {powercap}/intel-rapl:*: no RAPL here, as in most virtual machines"
    for folder in sorted(powercap.glob("intel-rapl:*")):
        if folder.name.count(":") != 1:  # intel-rapl:0:0 is a part of intel-rapl:0
            continue
        file = folder / "energy_uj"
        try:
            name = (folder / "name").read_text().strip()
            wraps_at = float((folder / "max_energy_range_uj").read_text()) / 1e6
            float(file.read_text())
        except (OSError, ValueError) as error:
            why = f"{error.strerror} (it is root's)" if isinstance(error, PermissionError) else str(error)
            return [], f"{file} cannot be read: {why}"
        if name == "psys":  # the whole platform: the packages again, and more
            continue
        counters.append(Counter(f"rapl:{name}", functools.partial(_joules, file), wraps_at))
    return counters, None if counters else reason


def _joules(file: Path) -> float:
    return float(file.read_text()) / 1e6


def _gpu() -> tuple[list[Counter], str | None]:
    """Counter of this rank's GPU."""
    try:
        import pynvml
    except ImportError:
        return [], "the energy of GPUs is read with pynvml, which is not installed: pip install nvidia-ml-py"
    import torch

    uuid = str(torch.cuda.get_device_properties(runtime.device()).uuid)
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return [], f"NVML tells no energy of this GPU: {error}"
    name = f"nvml:{torch.cuda.get_device_name(runtime.device())}"
    return [Counter(name, lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)], None
