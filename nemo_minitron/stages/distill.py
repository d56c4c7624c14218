"""``minitron distill``: teach a pruned student by the logits of the original."""

from __future__ import annotations

from omegaconf import DictConfig


def run(cfg: DictConfig) -> None:
    """Distil ``model.kd_teacher_restore_from_path`` into ``model.restore_from_path``, write ``model.nemo_path``."""
    from nemo_minitron.nemo.distillation import MinitronDistillModel
    from nemo_minitron.nemo.training import train

    train(cfg, MinitronDistillModel, monitor=cfg.distill.get("monitor", "val_loss"))
