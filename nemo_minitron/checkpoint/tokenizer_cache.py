"""The tokenizer of a hub's name that a checkpoint has, where ``huggingface_hub``'s cache holds it already.

The name comes from a file, not from the user: nothing is asked of any network for it.
"""

from __future__ import annotations

import re
from pathlib import Path

from nemo_minitron.checkpoint.tokenizer_files import tokenizer_files

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def in_cache(name: str) -> Path | None:
    """Folder of the cache with a repository's tokenizer; None where the cache has none of this name.

    Raises:
        MinitronError: the tokenizer's files are not what :func:`tokenizer_files` allows.
    """
    from huggingface_hub import snapshot_download

    if not _NAME.fullmatch(name):
        return None
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except Exception:  # of its own by version: no such repository, a cache that is cut short
        return None
    return folder if tokenizer_files(folder) else None
