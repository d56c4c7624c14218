"""A training's line of progress, in place of Lightning's bar: steps, losses as they are logged, speed, time left."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from megatron.core.num_microbatches_calculator import get_num_microbatches

from nemo_minitron.jobs.line import LOSS, RATE, VALIDATION, Part
from nemo_minitron.jobs.progress import Progress

TRAIN_LOSS = "reduced_train_loss"
"""NeMo's name for the loss that is trained on; the line calls it ``loss``."""


class TrainingProgress(ProgressBar):
    """One line from the first step to the last, validations within it; the job's first process alone shows it.

    A ``ProgressBar`` of Lightning's, which makes none of its own beside one. A run that resumes begins at its step.

    Args:
        command: what is running. monitor: the validation loss by which the best model is kept.
    """

    def __init__(self, command: str, monitor: str) -> None:
        super().__init__()
        self._command, self._monitor, self._enabled = command, monitor, True
        self._line: Progress | None = None
        self._validated = 0

    def disable(self) -> None:
        """Called by Lightning on all processes but the first, and by whoever wants silence."""
        self._enabled = False

    def enable(self) -> None:
        """Undo :meth:`disable`."""
        self._enabled = True

    def on_sanity_check_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._begin(trainer)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._begin(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Called once for each step: a batch of the loader is a global one."""
        self._tell(trainer, trainer.global_step)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._validated = 0

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:  # type: ignore[override]
        self._validated += 1
        if self._line is not None:
            batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            # Lightning is told micro-batches, and a batch of it is a global one
            micro_batches = int(sum(batches) if isinstance(batches, list) else batches)
            self._line.now = f"validating {self._validated}/{-(-micro_batches // get_num_microbatches())}"
            self._line.update(0)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._line is not None:
            self._line.now = ""
            self._tell(trainer, trainer.global_step)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._end(failed=False)

    def on_exception(self, trainer: Trainer, module: LightningModule, error: BaseException) -> None:
        """Called for whatever ends a training early, before anything is said of it."""
        self._end(failed=True)

    def _begin(self, trainer: Trainer) -> None:
        if self._line is None and self._enabled:
            self._line = Progress(trainer.max_steps, self._command, "step", done=trainer.global_step)
            self._line.start()

    def _tell(self, trainer: Trainer, step: int) -> None:
        if self._line is None:
            return
        found = trainer.callback_metrics
        shown = (("loss", TRAIN_LOSS, LOSS), (self._monitor, self._monitor, VALIDATION))
        figures = [Part(f"{label} {float(found[name]):.4f}", rank) for label, name, rank in shown if name in found]
        if "tokens_per_second" in found:
            figures.append(Part(f"{float(found['tokens_per_second']):,.0f} tokens/s", RATE))
        self._line.figures = figures
        self._line.update(step - self._line.done)

    def _end(self, failed: bool) -> None:
        if self._line is not None:
            self._line.stop(failed)
            self._line = None
