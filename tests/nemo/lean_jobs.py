"""What a rank of ``test_lean.py`` does; the optimizer's update is not compiled."""

from __future__ import annotations

import gc
import hashlib
from typing import Any

import torch
import torch._dynamo

from tests.nemo import grid_jobs


def train(*args: Any) -> str:
    """:func:`grid_jobs.train`; digest of the weights that this rank ends with.

    Raises:
        AssertionError: bf16 weights have gradients of another kind, or something of a weight's shape is float32.
    """
    from nemo_minitron.nemo.lean import LeanAdamW

    digests = [""]
    step = LeanAdamW.step

    def seen(self: LeanAdamW, closure: Any = None) -> Any:
        loss = step(self, closure)
        parts = [p.detach().view(torch.uint8).numpy().tobytes() for group in self.param_groups for p in group["params"]]
        digests[0] = hashlib.sha256(b"".join(parts)).hexdigest()
        weights = [p for p in self.param_groups[0]["params"] if p.dtype == torch.bfloat16]
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in weights)
        shapes = {p.shape for p in weights}
        found = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.shape in shapes]
        assert len(found) >= len(weights) and all(x.dtype != torch.float32 for x in found)
        return loss

    LeanAdamW.step = seen  # type: ignore[method-assign]  # this process is the test's own
    torch._dynamo.config.disable = True  # compiling would take longer than the training
    grid_jobs.train(*args)
    return digests[0]
