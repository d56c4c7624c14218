"""What torch says of this machine's GPUs. :mod:`~nemo_minitron.doctor.probe` calls it in a process of its own."""

from __future__ import annotations

import importlib
from typing import Any


def facts() -> dict[str, Any]:
    """CUDA that torch was built with, NCCL, and each visible GPU: ``name``, ``memory`` in bytes, ``bf16``, ``arch``."""
    torch: Any = importlib.import_module("torch")
    found: dict[str, Any] = {"cuda": torch.version.cuda, "nccl": None, "gpus": []}
    if not torch.cuda.is_available():
        return found
    try:
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception:  # a build without it raises what it likes
        found["nccl"] = None
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found["gpus"].append(
            {
                "name": card.name,
                "memory": card.total_memory,
                "bf16": card.major >= 8,
                "arch": f"{card.major}.{card.minor}",
            }
        )
    return found
