"""What a process of ``test_extending_family.py`` does: everything in it knows Qwen3 from the user's file alone."""

from __future__ import annotations

from typing import Any

import torch

from nemo_minitron import cli, runtime
from nemo_minitron.registry import load_extensions
from tests.nemo import grid_jobs
from tests.nemo.conftest import nemo_logits


def commands(*lines: list[str]) -> list[int]:
    """Exit statuses of command lines, one after the other."""
    return [cli.main(line) for line in lines]


def logits(extension: str, source: str, tokens: torch.Tensor) -> torch.Tensor:
    """NeMo's logits ``[b, s, V]`` of a ``.nemo``."""
    from nemo_minitron.nemo.restore import load_model
    from nemo_minitron.nemo.trainer import inference_trainer

    load_extensions([extension])
    runtime.init_distributed()
    return nemo_logits(load_model(source, inference_trainer()), tokens)


def gradients(extension: str, source: str, grid: tuple[int, int, bool], *step: Any) -> dict:
    """Canonical gradients of one distillation step of a model by itself."""
    load_extensions([extension])
    return grid_jobs.distillation_step(source, source, grid, *step)[2]
