"""What a rank of ``test_lean.py`` does; the optimizer's update is not compiled."""

from __future__ import annotations

from typing import Any

import torch._dynamo

from tests.nemo import grid_jobs


def train(*args: Any) -> None:
    """:func:`grid_jobs.train`."""
    torch._dynamo.config.disable = True  # compiling would take longer than the training
    grid_jobs.train(*args)
