"""``minitron finetune``: teacher correction, next-token training of a ``.nemo`` on the distillation data."""

from __future__ import annotations

from nemo_minitron.config.schema import FinetuneConfig


def run(cfg: FinetuneConfig) -> None:
    """Fine-tune ``model.restore_from_path`` into ``model.nemo_path`` (Minitron, arXiv 2408.11796, section 3.1)."""
    from nemo_minitron import runtime

    runtime.prepare()
    from nemo_minitron.nemo.model import MinitronGPTModel
    from nemo_minitron.nemo.training import train

    train(cfg, MinitronGPTModel)
