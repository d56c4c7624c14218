"""GPUs as torch sees them, the driver, and what torch was built for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.doctor.line import Line, gib
from nemo_minitron.doctor.probe import Probed
from nemo_minitron.doctor.processor import text_of

DRIVER = Path("/proc/driver/nvidia/version")


def gpus(torch: Probed, there: bool) -> Iterator[Line]:
    """Lines on torch's import and on each GPU.

    Args:
        torch: what a probe of torch with :func:`nemo_minitron.doctor.torch_facts.facts` found.
        there: whether torch is installed at all; its absence has a line of its own.
    """
    if torch.error is not None:
        if there:
            yield Line("problem", "torch", f"its import fails: {torch.error}")
        else:
            yield Line("note", "GPUs", "not known without torch")
        return
    cuda, cards = torch.facts.get("cuda"), torch.facts.get("gpus") or []
    driver = re.search(r"Kernel Module.*? (\d+\.[\d.]+)", text_of(DRIVER))
    yield Line("ok", "torch", f"imports; built {f'with CUDA {cuda}' if cuda else 'without CUDA'}")
    if not cards:
        yield _none(cuda, driver[1] if driver else None)
        return
    yield Line("ok", "driver", driver[1] if driver else "its version is not said")
    for number, card in enumerate(cards):
        said = f"{card['name']}, {gib(card['memory'])}, compute capability {card['arch']}, "
        if card["bf16"]:
            yield Line("ok", f"GPU {number}", f"{said}bf16")
        else:
            yield Line("note", f"GPU {number}", f"{said}no bf16: train with trainer.precision=32 or 16-mixed")
    if torch.facts.get("nccl"):
        yield Line("ok", "NCCL", torch.facts["nccl"])
    else:
        yield Line(
            "note", "NCCL", "none in this torch: commands that train or score fail; CUDA_VISIBLE_DEVICES= takes the CPU"
        )


def _none(cuda: str | None, driver: str | None) -> Line:
    """Why there is no GPU, where that can be told."""
    said = "none: everything runs on the CPU"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver is None:
        return Line("ok", "GPUs", said)
    if not cuda:
        return Line("note", "GPUs", f"{said}. There is a driver ({driver}), but this torch was built without CUDA")
    if hidden is not None:
        return Line("note", "GPUs", f"{said}. There is a driver ({driver}); CUDA_VISIBLE_DEVICES={hidden!r:.40}")
    return Line(
        "note", "GPUs", f"{said}. There is a driver ({driver}), but torch finds no GPU; is it too old for CUDA {cuda}?"
    )
