"""Where Megatron's data sets keep the order of their samples, by what they were made of.

Megatron names an index after the prefix, and takes whichever lies there for the current one: documents that were
preprocessed anew under the same prefix would be read in the pieces of the earlier ones. It also writes file by file, so
that a second job can read the half of one. Here an index is a folder, named after all that decides it, the content of
the token files first of all; it is built beside its place and renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import megatron.core
import numpy as np
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_minitron import parallel
from nemo_minitron.files.staging import Staging

_T = TypeVar("_T")
_OURS = ("*.npy", "*.txt")


def with_index(
    cfg: DictConfig,
    trainer: Trainer,
    tokenizer: Mapping[str, Any],
    build: Callable[[], _T],
    contents: Mapping[str, str],
) -> _T:
    """Run ``build`` with ``model.data.index_mapping_dir`` leading to an index of just these data; all ranks together.

    Rank 0 builds what is not there, the others wait and read. The index lies in ``model.data.index_mapping_dir``, or,
    where none is set, in the experiment's folder ``index``: never beside the data, which may be read-only or another's.

    Args:
        cfg: a model's config, of which ``data.index_mapping_dir`` is changed while ``build`` runs.
        tokenizer: what tells tokenizers apart for Megatron (``unique_identifiers``).
        contents: :func:`data_fingerprint` by prefix.

    Raises:
        MinitronError: the folder cannot be written.
    """
    given = cfg.data.get("index_mapping_dir")
    base = Path(given) if given else Path(trainer.default_root_dir) / "index"
    place = Path(parallel.from_first(lambda: str(base / _name(cfg, trainer, tokenizer, contents))))
    try:
        if not parallel.from_first(lambda: is_whole(place)):
            _build_at(place, cfg, build)
        _use(cfg, place)
        return build()
    finally:
        _use(cfg, given)


def is_whole(place: Path) -> bool:
    """Whether an index folder holds arrays alone, none of them cut short or pickled."""
    files = list(place.glob("*.npy"))
    try:
        for file in files:
            np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return bool(files)


def _build_at(place: Path, cfg: DictConfig, build: Callable[[], Any]) -> None:
    """Build beside ``place`` and rename; another job may have done so meanwhile."""
    staged: list[Staging] = []

    def stage() -> str:
        staged.append(Staging(place, folder=True, replaceable=_OURS))
        return str(staged[0].path)

    def commit() -> None:
        if not is_whole(place):
            staged[0].commit()

    try:
        _use(cfg, parallel.from_first(stage))
        build()
        parallel.barrier()
        parallel.from_first(commit)
    finally:
        for staging in staged:
            staging.abort()


def _use(cfg: DictConfig, place: Path | str | None) -> None:
    with open_dict(cfg):
        cfg.data.index_mapping_dir = None if place is None else str(place)


def _name(cfg: DictConfig, trainer: Any, tokenizer: Mapping[str, Any], contents: Mapping[str, str]) -> str:
    """Digest of all that the order of samples follows from; a little more than that only builds an index again."""
    data: Any = OmegaConf.to_container(cfg.data, resolve=True)
    data.pop("index_mapping_dir", None)
    what = {
        "contents": dict(contents),
        "data": data,
        "seed": cfg.seed,
        "global_batch_size": cfg.global_batch_size,
        "max_steps": trainer.max_steps,
        "val_check_interval": trainer.val_check_interval,
        "limits": [trainer.limit_val_batches, trainer.limit_test_batches],
        "tokenizer": tokenizer,
        "megatron": megatron.core.__version__,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]
