"""Inputs that a command names and that are not there, told before torch or NeMo is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_minitron.errors import MinitronError

NEMO = "a .nemo file or folder"
INPUTS = {
    "model.restore_from_path": NEMO,
    "model.kd_teacher_restore_from_path": NEMO,
    "prune.scores": "a scores folder",
    "prune.plan": "a plan file",
    "scores": "a scores folder",
    "run_dir": "the folder of a run",
}
"""Key → what it names."""
ELSEWHERE = {"run": ("run_dir",), "generate": ("model.restore_from_path",)}
"""Command → keys of the above that it makes itself, or that may name something else and that it checks as early."""


def refuse_absent(command: str, cfg: DictConfig) -> None:
    """Check that paths to read exist; what they hold is for the command itself to say.

    Args:
        cfg: composed and resolved.

    Raises:
        MinitronError: the first of :data:`INPUTS` that does not exist; or a path, not a name on the hub, in convert's
            ``input_name_or_path``.
    """
    for key, what in INPUTS.items():
        value: Any = OmegaConf.select(cfg, key)
        if isinstance(value, str) and key not in ELSEWHERE.get(command, ()) and not Path(value).exists():
            raise MinitronError(f"{key}: expected {what}, found nothing at {value}")
    source = cfg.get("input_name_or_path")
    if command == "convert" and isinstance(source, str) and Path(source).is_absolute() and not Path(source).exists():
        raise MinitronError(f"input_name_or_path: expected a HF folder, a .gguf or a .nemo, found nothing at {source}")
