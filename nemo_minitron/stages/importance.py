"""``minitron importance``: what each neuron, head, group, channel and layer of a ``.nemo`` is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_minitron.config.sections import Calibration
from nemo_minitron.errors import required
from nemo_minitron.importance.scores import Scores


def run(cfg: DictConfig) -> Scores:
    """Score ``model.restore_from_path`` on ``calibration`` and write the folder ``output_path``."""
    from nemo_minitron.nemo.scoring import measure_and_save

    source, output = Path(required(cfg, "model.restore_from_path")), Path(required(cfg, "output_path"))
    keys: Any = OmegaConf.to_container(cfg.calibration, resolve=True)
    stream = bool(cfg.importance.stream)
    return measure_and_save(source, output, Calibration(**keys), stream, cfg.model, cfg.get("trainer") or {})
