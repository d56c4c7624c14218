"""The HF tokenizer that travels inside a ``.nemo`` as ``minitron/tokenizer/<file>``, which NeMo ignores."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from nemo_minitron.checkpoint.archive import Archive, ArchiveWriter, read_member
from nemo_minitron.checkpoint.staging import Staging
from nemo_minitron.errors import MinitronError

PREFIX = "minitron/tokenizer/"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""All names that are packed and unpacked: no code, no weights, no path separators."""
_LIMIT = 256 << 20


def tokenizer_files(folder: Path) -> list[Path]:
    """Tokenizer files of a HF folder, by the allow-list."""
    return [folder / name for name in FILES if (folder / name).is_file()]


def tokenizer_size(folder: Path) -> int:
    """Entries of a HF tokenizer, added tokens included, as NeMo counts them (``len(tokenizer)``)."""
    from transformers import AutoTokenizer

    try:
        return len(AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise MinitronError(f"{folder}: expected a tokenizer that transformers loads, found: {error}") from None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files of one folder into another."""
    for file in tokenizer_files(source):
        (target / file.name).write_bytes(file.read_bytes())


def pack(writer: ArchiveWriter, folder: Path) -> None:
    """Add a folder's tokenizer files to a ``.nemo`` that is being written."""
    for file in tokenizer_files(folder):
        writer.add(PREFIX + file.name, file.read_bytes())


def unpack(archive: Archive) -> Path | None:
    """Lay packed files into the user's cache, in a folder named by their content; None where none are packed.

    The cache is ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``nemo_minitron/tokenizers``.
    """
    present = set(archive.names())
    files = {name: read_member(archive, PREFIX + name, _LIMIT) for name in FILES if PREFIX + name in present}
    if not files:
        return None
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "nemo_minitron" / "tokenizers" / digest.hexdigest()[:16]
    if folder.is_dir():
        return folder
    staging = Staging(folder, folder=True)
    try:
        for name, data in files.items():
            (staging.path / name).write_bytes(data)
        staging.commit()
    except OSError as error:
        staging.abort()
        if not folder.is_dir():  # another process was faster: the content is the same by its name
            raise MinitronError(f"{folder}: expected to unpack the tokenizer here, found: {error}") from None
    return folder
