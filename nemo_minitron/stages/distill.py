"""``minitron distill``: teach a pruned student by the logits of the original."""

from __future__ import annotations

from nemo_minitron.config.schema import DistillConfig
from nemo_minitron.jobs.processes import quiet


def run(cfg: DistillConfig) -> None:
    """Distil ``model.kd_teacher_restore_from_path`` into ``model.restore_from_path``, write ``model.nemo_path``; or,
    with ``plan_only``, say what memory and time that would take."""
    if cfg.plan_only:
        quiet()
        from nemo_minitron.nemo.memory import plan_memory

        print(plan_memory(cfg))
        return
    from nemo_minitron import runtime

    runtime.prepare()
    from nemo_minitron.nemo.distillation import MinitronDistillModel
    from nemo_minitron.nemo.training import train

    train(cfg, MinitronDistillModel, monitor=cfg.distill.monitor)
