"""Where in a folder of Megatron's the weights lie: which of three dresses it wears, and which iteration is meant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import read_file

NEMO2, BRIDGE, MEGATRON = "nemo2", "bridge", "megatron"
TRACKER, TRAIN_STATE = "latest_checkpointed_iteration.txt", "latest_train_state.pt"
RUN_CONFIG, MODEL_CONFIG = "run_config.yaml", "context/model.yaml"
_ITERATION = re.compile(r"iter_\d{7,12}")
_NUMBER = re.compile(r"\d{1,12}|release")


@dataclass(frozen=True)
class MegatronPlace:
    """A checkpoint of one iteration.

    Attributes:
        dress: ``nemo2``, ``bridge`` or ``megatron``.
        root: the folder of the one iteration, or the one with ``context`` and ``weights``.
        weights: beginning of the names of what Megatron-Core wrote, within ``root``.
    """

    dress: str
    root: Path
    weights: str = ""


def dress_of(path: Path) -> str | None:
    """The dress that a folder wears, by its files' names alone; None for what is none of Megatron's."""
    if not path.is_dir():
        return None
    root = path.parent if path.name == "weights" else path
    if (root / "context").is_dir() and (root / "weights").is_dir():
        return NEMO2
    iterations = [item for item in path.iterdir() if _ITERATION.fullmatch(item.name) or item.name == "release"]
    if any((place / RUN_CONFIG).exists() for place in (path, *iterations)) or (path / TRAIN_STATE).exists():
        return BRIDGE
    if iterations or any((path / name).exists() for name in (TRACKER, ".metadata", "common.pt", "mp_rank_00")):
        return MEGATRON
    return None


def locate(path: Path) -> MegatronPlace:
    """The checkpoint that a folder means: itself, or the iteration that its tracker names.

    Raises:
        MinitronError: a tracker that names no iteration here, several iterations without one, or a folder of another
            kind (see :func:`nemo_minitron.checkpoint.kinds.refuse_other_kinds`).
    """
    if path.name == "weights" and (path.parent / "context").is_dir():
        path = path.parent
    if (path / "context").is_dir() and (path / "weights").is_dir():
        return MegatronPlace(NEMO2, path, "weights/")
    root = path if (path / ".metadata").is_file() or (path / RUN_CONFIG).is_file() else _iteration(path)
    return MegatronPlace(BRIDGE if (root / RUN_CONFIG).is_file() else MEGATRON, root)


def _iteration(path: Path) -> Path:
    """The folder of the latest iteration."""
    if (path / TRACKER).exists():
        text = read_file(path / TRACKER, 64).decode("ascii", "replace").strip()
        if not _NUMBER.fullmatch(text):
            raise MinitronError(f"{path / TRACKER}: expected an iteration's number or 'release', found {text!r:.80}")
        found = path / (text if text == "release" else f"iter_{int(text):07d}")
        if not found.is_dir():
            raise MinitronError(f"{path / TRACKER}: it names {text}, expected the folder {found.name}, found none")
    else:
        folders = sorted(item for item in path.iterdir() if _ITERATION.fullmatch(item.name) or item.name == "release")
        if len(folders) != 1:
            names = ", ".join(item.name for item in folders[:8])
            raise MinitronError(
                f"{path}: expected {TRACKER} or one folder iter_*, found {names or 'neither'}; name the iteration"
            )
        found = folders[0]
    if not found.resolve().is_relative_to(path.resolve()):
        raise MinitronError(f"{found}: expected a folder, found a link out of {path}; name what it points to")
    return found
