"""The two models that a training leaves: the best by validation, and the last."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop

from nemo_minitron import parallel
from nemo_minitron.config.sections import Distill
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import Staging
from nemo_minitron.nemo import weights
from nemo_minitron.nemo.run_record import RunRecord, content_of
from nemo_minitron.values.trainer import AGREEMENT

if TYPE_CHECKING:
    from nemo_minitron.nemo.anywhere import AnywhereGPTModel


class KeepBest(Callback):
    """Save the best model so far after each validation, and the last one when training ends.

    ``path`` receives the best by ``monitor``, a loss or the share of tokens on which both models agree, of which more
    is better; ``NAME.last.nemo`` beside it the last; both in the dtype of the checkpoint that the run started from. A
    run without validation has its last model in both. A resumed run that is to write elsewhere takes the best so far
    along.

    Args:
        record: of a run with checkpoints: told what was written, before the next checkpoint knows of it.
    """

    def __init__(self, path: Path, monitor: str = Distill.monitor, record: RunRecord | None = None) -> None:
        self.path, self.monitor, self.best, self.record = path, monitor, math.inf, record
        self._saved: dict[str, Any] | None = None

    @property
    def last_path(self) -> Path:
        return self.path.with_name(self.path.name.removesuffix(".nemo") + ".last.nemo")

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "best": self.best, "saved": self._saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the best so far from a checkpoint; by another ``monitor`` there is none yet."""
        if state.get("monitor", self.monitor) == self.monitor:
            self.best, self._saved = state["best"], state.get("saved")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Have the best model of a resumed run at its place.

        Raises:
            MinitronError: it is gone, or another model lies there.
        """
        if not math.isinf(self.best):
            parallel.from_first(self._take_over)

    def _take_over(self) -> None:
        if self._saved is None:  # a checkpoint from before this was kept
            return
        before, here = Path(self._saved["path"]), Path(os.path.abspath(self.path))
        if before == here and here.exists():
            return
        known = {self._saved["content"], *(self.record.best_contents() if self.record else ())}
        if not before.exists() or content_of(before) not in known:
            raise MinitronError(
                f"model.nemo_path: the best model so far ({self.monitor} {self.best:.4f}) was written to '{before}', "
                f"where {'another one' if before.exists() else 'nothing'} lies now; put it back, or begin anew with "
                "exp_manager.resume_if_exists=false"
            )
        with Staging(here, folder=before.is_dir()) as staging:
            if before.is_dir():
                shutil.copytree(before, staging.path, dirs_exist_ok=True)
            else:
                shutil.copyfile(before, staging.path)
        self._saved = {"path": str(here), "content": self._saved["content"]}

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.global_step == 0:
            return
        if self.monitor not in trainer.callback_metrics:
            raise MinitronError(
                f"distill.monitor={self.monitor!r} is not logged; known: {sorted(trainer.callback_metrics)}"
            )
        value = float(trainer.callback_metrics[self.monitor])
        if math.isinf(self.best) or (value > self.best if self.monitor.endswith(AGREEMENT) else value < self.best):
            self.best = value
            self._save_best(module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(module, self.last_path)
        if math.isinf(self.best):
            self._save(module, self.path)

    def _save_best(self, module: LightningModule) -> None:
        self._save(module, self.path)
        if self.record is not None and parallel.is_first():
            self._saved = {"path": os.path.abspath(self.path), "content": content_of(self.path)}
            self.record.add_best(self._saved["content"])

    @staticmethod
    def _save(module: LightningModule, path: Path) -> None:
        model = cast("AnywhereGPTModel", module)  # no others are trained here
        weights.save(model, path, model.storage_dtype)


class FinishLoop(_FitLoop):
    """The loop of a run that took all its steps before: ``fit`` restores it, and what is asked for is written.

    Lightning's own would do nothing at all.
    """

    def __init__(self, trainer: Trainer, keep: KeepBest) -> None:
        before = trainer.fit_loop
        super().__init__(trainer, before.min_epochs, before.max_epochs)
        self.epoch_loop, self.epoch_progress = before.epoch_loop, before.epoch_progress
        self._data_source = before._data_source
        self._keep = keep

    def run(self) -> None:
        """Called by ``fit`` once the checkpoint is restored."""
        self.setup_data()
        self._keep.on_train_start(self.trainer, self.trainer.lightning_module)
        self._keep.on_train_end(self.trainer, self.trainer.lightning_module)
