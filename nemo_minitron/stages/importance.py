"""``minitron importance``: what each neuron, head, group, channel and layer of a ``.nemo`` is worth."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.config.schema import ImportanceConfig
from nemo_minitron.errors import required
from nemo_minitron.importance.scores import Scores


def run(cfg: ImportanceConfig) -> Scores:
    """Score ``model.restore_from_path`` on ``calibration`` and write the folder ``output_path``."""
    from nemo_minitron import runtime
    from nemo_minitron.nemo.scoring import measure_and_save

    runtime.keep_freed_memory()
    source, output = Path(required(cfg, "model.restore_from_path")), Path(required(cfg, "output_path"))
    stream, metrics = cfg.importance.stream, cfg.importance.metrics
    return measure_and_save(source, output, cfg.calibration, stream, cfg.model, cfg.trainer, metrics)
