"""The files of one GGUF: one, or the parts ``NAME-00001-of-0000N.gguf`` into which llama.cpp splits it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.errors import MinitronError

if TYPE_CHECKING:
    from gguf import GGUFReader

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_PART = re.compile(r"(.+-)(\d{5})(-of-)(\d{5})(\.gguf)", re.IGNORECASE)
_MAX_PARTS = 10_000


def is_gguf(path: Path) -> bool:
    """Whether a path has the suffix of a GGUF, in capitals or not, or is a file that begins as one."""
    if path.suffix.lower() == SUFFIX or not path.is_file():
        return path.suffix.lower() == SUFFIX
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def inside(folder: Path) -> list[Path]:
    """The models, as the first part or the only file of each, that lie in a folder."""
    ggufs = sorted(path for path in folder.iterdir() if path.suffix.lower() == SUFFIX)
    first: dict[str, Path] = {}
    for path in ggufs:
        match = _PART.fullmatch(path.name)
        first.setdefault(f"{match[1]}{match[4]}" if match else path.name, path)
    return list(first.values())


def files_of(path: Path) -> list[Path]:
    """All files of the model of which ``path`` is a part, in order; the file alone where its name says no part.

    Raises:
        MinitronError: a part that is missing, by name, or a name that counts wrongly.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    number, count = int(match[2]), int(match[4])
    if not 1 <= number <= count <= _MAX_PARTS:
        raise MinitronError(f"{path}: expected a part of 1 to {min(count, _MAX_PARTS)}, found part {number} of {count}")
    files = [path.with_name(f"{match[1]}{part:05d}{match[3]}{match[4]}{match[5]}") for part in range(1, count + 1)]
    for file in files:
        if not file.is_file():
            raise MinitronError(f"{file}: expected all {count} parts of {path.name}, found none of this name")
    return files


def check_parts(files: Sequence[Path], readers: Sequence[GGUFReader]) -> None:
    """Refuse parts that do not say of themselves what their names and number say; the metadata is the first one's.

    Raises:
        MinitronError: naming the part and its key.
    """
    for number, (file, reader) in enumerate(zip(files, readers, strict=True)):
        _check(file, reader, {"split.count": len(files), "split.no": number}, alone=len(files) == 1)
    tensors = sum(len(reader.tensors) for reader in readers)
    for file, reader in zip(files, readers, strict=True):
        _check(file, reader, {"split.tensors.count": tensors}, alone=True)


def _check(file: Path, reader: GGUFReader, expected: Mapping[str, int], alone: bool) -> None:
    """Refuse keys with other values; where the file is ``alone`` they may be absent, and a count of 0 means none."""
    for key, value in expected.items():
        field = reader.get_field(key)
        found = None if field is None else field.contents()
        if alone and (found is None or (key == "split.count" and found == 0)):
            continue
        if found != value:
            whole = alone and key != "split.tensors.count"
            where = " in a file whose name is not that of a part, NAME-00001-of-0000N.gguf" if whole else ""
            raise MinitronError(f"{file}: {key} must be {value}{where}, found {found!r:.80}")
