"""Files that a stage's configuration names as what it reads, beside those that the recipe declares.

A recipe's ``inputs`` are its author's; a text that a user puts into a setting, or a tokenizer of another folder, is in
none of them. Its content decides the result all the same.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from nemo_minitron.data.masks import mask_prefix
from nemo_minitron.recipe.stage import Stage

_PATHS = (
    "input",
    "input_name_or_path",
    "tokenizer.type",
    "tokenizer.model",
    "model.restore_from_path",
    "model.kd_teacher_restore_from_path",
    "model.tokenizer.type",
    "model.tokenizer.model",
    "calibration.path",
    "prune.calib_dataset",
    "prune.plan",
    "prune.scores",
    "scores",
    "evaluate.lm_eval.include_path",
    "evaluate.lm_eval.tasks",
    "prompts",
)
"""Keys of all commands that name what is read: a file, a folder, or a name that is neither."""
_PREFIXES = ("model.data.data_prefix", "calibration.data_prefix", "evaluate.data_prefix", "prune.calib_dataset")
"""Keys that name token files by what their names have in common."""


def named_inputs(stage: Stage) -> list[str]:
    """Files and folders that ``stage`` reads by its configuration, that are there, and that its inputs do not cover.

    What it writes itself is none of them.
    """
    own = [os.path.abspath(path) for path in (*stage.outputs, *([str(stage.work)] if stage.work else []))]
    declared = [os.path.abspath(pattern) for pattern in stage.inputs]
    found: dict[str, None] = {}
    for path in _there(stage.config):
        place = os.path.abspath(path)
        if not any(_lies_in(place, home) for home in own) and not any(_covers(one, place) for one in declared):
            found[path] = None
    return list(found)


def _there(config: DictConfig) -> Iterator[str]:
    for key in _PATHS:
        for text in _texts(OmegaConf.select(config, key)):
            path = Path(text).expanduser()
            if text and path.exists():
                yield str(path)
    for key in _PREFIXES:
        for prefix in _texts(OmegaConf.select(config, key)):
            for stem in (prefix, mask_prefix(prefix)):
                yield from (file for suffix in (".bin", ".idx") if os.path.isfile(file := f"{stem}{suffix}"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, ListConfig | DictConfig) and not value._is_none():
        for item in value.values() if isinstance(value, DictConfig) else value:
            yield from _texts(item)


def _covers(pattern: str, path: str) -> bool:
    return path in glob.glob(pattern) if glob.has_magic(pattern) else _lies_in(path, pattern)


def _lies_in(path: str, home: str) -> bool:
    return path == home or path.startswith(home.rstrip(os.sep) + os.sep)
