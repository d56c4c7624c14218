"""Which of the models that were validated is kept as the best; how it is saved is judged in ``test_training.py``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch import LightningModule, Trainer

from nemo_minitron.nemo.keep_best import KeepBest

VALUES = [0.5, 0.7, 0.6, 0.4, 0.7]


def validated(keep: KeepBest, monkeypatch: pytest.MonkeyPatch, values: list[float]) -> list[float]:
    """Values of the models that are saved when these are measured one after the other."""
    saved: list[float] = []
    monkeypatch.setattr(keep, "_save_best", lambda module: saved.append(keep.best))
    for step, value in enumerate(values, start=1):
        trainer = SimpleNamespace(sanity_checking=False, global_step=step, callback_metrics={keep.monitor: value})
        keep.on_validation_end(cast(Trainer, trainer), cast(LightningModule, cast(Any, None)))
    return saved


@pytest.mark.parametrize(
    "monitor, kept, best", [("val_kd_loss", [0.5, 0.4], 0.4), ("val_top1_agreement", [0.5, 0.7], 0.7)]
)
def test_less_of_a_loss_is_better_and_more_of_an_agreement(monkeypatch, monitor, kept, best):
    keep = KeepBest(Path("student.nemo"), monitor)
    assert validated(keep, monkeypatch, VALUES) == kept and keep.best == best


def test_the_best_by_another_value_is_none(monkeypatch):
    """A run that is resumed by another monitor would compare a loss with a distance, and keep nothing any more."""
    before = KeepBest(Path("student.nemo"), "val_kd_loss")
    assert validated(before, monkeypatch, [0.3]) == [0.3]
    for monitor, kept in (("val_kd_loss", []), ("val_loss", [2.5]), ("val_top1_agreement", [2.5])):
        after = KeepBest(Path("student.nemo"), monitor)
        after.load_state_dict(before.state_dict())
        assert validated(after, monkeypatch, [2.5]) == kept
    earlier = KeepBest(Path("student.nemo"), "val_loss")
    earlier.load_state_dict({"best": 2.0})  # of a version that did not say by what
    assert earlier.best == 2.0
