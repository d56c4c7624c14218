"""A checkpoint as an HF folder for a while: for what runs transformers' model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_minitron.convert.walk import convert
from nemo_minitron.files.staging import Staging


@contextmanager
def exported(source: Path, beside: Path, tokenizer: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """The HF folder that ``minitron convert`` makes of ``source``; it is removed when the context ends.

    Args:
        beside: the folder lies where this path does, under a hidden name made of its own; what a killed process left
            there is removed first.
        tokenizer: section with ``type`` or ``model`` that names one for a source which carries none.

    Raises:
        MinitronError: as :func:`nemo_minitron.convert.convert`.
    """
    staging = Staging(beside.with_name(f"{beside.name}.hf"), folder=True)
    try:
        staging.path.chmod(0o700)  # it may lie among other users' files
        yield convert(source, staging.path / "hf", format="hf", tokenizer=tokenizer, temporary=True)
    finally:
        staging.abort()
