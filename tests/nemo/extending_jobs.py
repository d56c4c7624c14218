"""What a process of ``test_extending_family.py`` does: everything in it knows the family from the user's file alone."""

from __future__ import annotations

import torch

from nemo_minitron import cli, runtime
from nemo_minitron.registry import load_extensions
from tests.nemo.conftest import nemo_logits


def commands(*lines: list[str]) -> list[int]:
    """Exit statuses of command lines, one after the other."""
    return [cli.main(line) for line in lines]


def logits(extension: str | None, source: str, tokens: torch.Tensor) -> torch.Tensor:
    """NeMo's logits ``[b, s, V]`` of a ``.nemo``."""
    from nemo_minitron.nemo.restore import load_model
    from nemo_minitron.nemo.trainer import inference_trainer

    load_extensions([] if extension is None else [extension])
    runtime.init_distributed()
    return nemo_logits(load_model(source, inference_trainer()), tokens)
