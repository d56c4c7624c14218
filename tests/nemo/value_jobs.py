"""What a rank of ``test_values.py`` does: one training under the values given, and what was seen of it."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from typing import Any

from nemo_minitron.config.compose import configure
from nemo_minitron.errors import MinitronError
from nemo_minitron.nemo import training
from nemo_minitron.nemo.model import MinitronGPTModel


def observed(command: str, keys: list[str], folder: str) -> dict[str, Any]:
    """Run ``command`` and return what happened: ``refused`` with the message, or ``rates``, ``steps``, the steps that
    ``validated`` and the batches of each, ``tokens`` of a step, the ``weights`` read, ``logged`` columns, ``files``."""
    seen: dict[str, Any] = {"rates": [], "validated": {}, "tokens": [], "losses": [], "refused": None, "read": False}
    ours, load = MinitronGPTModel.fwd_bwd_step, training.load_model

    def fwd_bwd_step(self: Any, iterator: Any, forward_only: bool, *args: Any) -> Any:
        before = self.consumed_tokens
        loss = ours(self, iterator, forward_only, *args)
        if forward_only:
            step = -1 if self.trainer.sanity_checking else self.trainer.global_step
            seen["validated"][step] = seen["validated"].get(step, 0) + 1
        else:
            seen["rates"].append(self._optimizer.param_groups[0]["lr"])
            seen["tokens"].append(self.consumed_tokens - before)
            seen["losses"].append(float(loss))
        return loss

    def load_model(*args: Any) -> Any:
        seen["read"] = True
        return load(*args)

    MinitronGPTModel.fwd_bwd_step, training.load_model = fwd_bwd_step, load_model  # type: ignore[assignment]
    try:
        importlib.import_module(f"nemo_minitron.stages.{command}").run(configure(command, keys))
    except MinitronError as error:
        seen["refused"] = str(error)
    finally:
        MinitronGPTModel.fwd_bwd_step, training.load_model = ours, load
    if "wandb" in sys.modules:  # a rank just exits: W&B's own process would end with it before it has written
        sys.modules["wandb"].teardown()
    seen["files"] = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))
    tables = list(Path(folder).rglob("csv/metrics.csv"))
    seen["logged"] = sorted(csv.DictReader(tables[0].open()).fieldnames or []) if tables else []
    return seen
