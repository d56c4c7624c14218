"""Residual streams of many depths, kept where there is room: on the GPU, in the machine's memory, or in a file.

All depths of an 8B on 128 samples of 2,048 tokens are 142 GB. On a GPU the streams that have no room are made again:
every ``step``-th depth is kept, and those between two of them only while the walk back is there (one forward pass more;
Chen et al. 2016, arXiv 1604.06174). On a CPU, where that pass is the larger part of the time, they lie in a temporary
file instead.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from nemo_minitron.jobs.processes import place

DEVICE_SHARE = 0.5
"""Share of a GPU's memory that streams may take."""
MEMORY_SHARE = 0.5
"""Share of the memory that the machine has left which the streams of all its processes may take; half of it beside a
GPU, where weights are read through it."""


class Streams:
    """Streams ``[n, s, H]`` float32 of depths 0 to L, by depth; each is made when it is first asked for.

    A context: what lies in a file is gone at the end.

    Args:
        layers: L. size: of one stream, three numbers in any order.
        device: that the work is done on. workspace: bytes that the work needs there beside the streams.
        final: whether the last stream is needed to the end.

    Attributes:
        step: depths from one kept stream to the next; ``layers`` where all are kept.
    """

    def __init__(
        self,
        layers: int,
        size: tuple[int, int, int],
        device: torch.device,
        workspace: int = 0,
        final: bool = False,
    ) -> None:
        self._size, self._layers, self._device = size, layers, device
        stream = 4 * prod(size)
        self._rooms = {device: room(device, workspace) // stream} if device.type == "cuda" else {}
        self._rooms[torch.device("cpu")] = room(torch.device("cpu"), on_gpu=device.type == "cuda") // stream
        self._held: dict[int, Tensor] = {}
        self._free: list[Tensor] = []
        self._file: _File | None = None
        self.step = self._steps(final)

    def _steps(self, final: bool) -> int:
        """The step whose streams have room with the fewest of them; the file where none has."""
        layers, slots = self._layers, sum(self._rooms.values())
        if slots > layers:
            return layers
        if self._device.type == "cuda":
            needs = {step: _most_at_once(layers, step, final) for step in range(2, layers)}
            best = min(needs, key=needs.__getitem__, default=None)
            if best is not None and needs[best] <= slots:
                return best
        self._file = _File((layers + 1, *self._size))
        return layers

    def __enter__(self) -> Streams:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        self._free.clear()
        if self._file is not None:
            self._file.close()

    def __contains__(self, depth: int) -> bool:
        return depth in self._held

    def __getitem__(self, depth: int) -> Tensor:
        """The stream of a depth, on any device; what is in a new one is undefined."""
        if depth not in self._held:
            self._held[depth] = self._new(depth)
        return self._held[depth]

    def _new(self, depth: int) -> Tensor:
        if self._file is not None:
            return self._file.tensor[depth]
        order = list(self._rooms)  # the device first
        if self.step < self._layers and depth % self.step == 0:
            order.reverse()  # kept long and read twice
        for device in order:
            for number, tensor in enumerate(self._free):
                if tensor.device == device:
                    return self._free.pop(number)
            if self._rooms[device]:
                self._rooms[device] -= 1
                return torch.empty(self._size, device=device)
        return torch.empty(self._size)  # one more than was counted: the machine has it, or says that it has not

    def drop(self, depth: int) -> None:
        """Let go of a stream; its room serves another."""
        tensor = self._held.pop(depth, None)
        if tensor is not None and self._file is None:
            self._free.append(tensor)

    def kept(self, depth: int) -> bool:
        """Whether the walk forward leaves this stream for the walk back."""
        return depth % self.step == 0 or depth > (self._layers - 1) // self.step * self.step

    def release(self) -> None:
        """Hand pages of the file back to the system's cache."""
        if self._file is not None:
            self._file.release()


def _most_at_once(layers: int, step: int, final: bool) -> int:
    """Streams alive at the worst moment of a walk forward and back: at its turn, within a part that is made again, or
    at the end of the part before the last."""
    parts = (layers - 1) // step  # before the last one
    turn = parts + 1 + layers - parts * step
    return max(turn, parts + step - 1 + final, parts + 2) if parts else turn


class _File:
    """A float32 tensor of any size in a temporary file that is mapped into memory.

    Pages that were touched count as this process's memory until :meth:`release`; the system writes them to the disk
    when it needs the room.
    """

    def __init__(self, size: tuple[int, ...]) -> None:
        length = 4 * prod(size)
        self._folder = tempfile.TemporaryDirectory(prefix="minitron-streams-")
        with (Path(self._folder.name) / "streams").open("w+b") as file:
            file.truncate(length)
            self._map = mmap.mmap(file.fileno(), length)
        self.tensor = torch.frombuffer(self._map, dtype=torch.float32).view(size)

    def release(self) -> None:
        """Hand the pages back to the system's cache; their content stays, and comes back when it is read."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on every system; without it they are only counted as ours
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._folder.cleanup()


def room(device: torch.device, workspace: int = 0, on_gpu: bool = False) -> int:
    """Bytes of a device that streams of this process may take.

    Args:
        workspace: bytes that the work needs on that device beside the streams.
        on_gpu: whether the work is done on another device than this machine's memory.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, min(free - workspace, int(DEVICE_SHARE * total)))
    here = place()
    sharing = (here.local_world_size or here.world_size) if here is not None else 1
    share = MEMORY_SHARE / 2 if on_gpu else MEMORY_SHARE
    return max(0, int(share * _memory_left() / sharing) - workspace)


def _memory_left() -> int:
    """Bytes of memory that can be taken without swapping: of the machine, or of the container that this runs in."""
    left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    told = Path("/proc/meminfo")
    if told.is_file():
        lines = dict(line.split(":", 1) for line in told.read_text().splitlines() if ":" in line)
        left = int(lines["MemAvailable"].split()[0]) << 10 if "MemAvailable" in lines else left
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        left = min(left, max(0, int(limit.read_text()) - int(used.read_text())))
    return left
