"""A training's checkpoint before NeMo resumes from it: Megatron and Lightning unpickle its files without a question."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path
from typing import IO, Any

from nemo_minitron.checkpoint.allowed import check_names
from nemo_minitron.checkpoint.distcp import METADATA_LIMIT, MetadataUnpickler
from nemo_minitron.checkpoint.record import RecordError
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.stored_zip import Read

_COMMON_LIMIT, _MAX_FILES = 256 << 20, 100_000


def check_checkpoint(checkpoint: str | Path | None) -> None:
    """Refuse code in a checkpoint that a training would go on from; None is no checkpoint.

    What is unpickled on the way: ``.metadata``, ``common.pt`` and other ``.pt`` files, records of objects in
    ``.distcp`` files, and a checkpoint that is one file. Records of tensors are not: torch reads them with
    ``weights_only``.

    Raises:
        MinitronError: naming the file and what it names.
    """
    if checkpoint is None:
        return
    path = Path(checkpoint)
    if not path.is_dir():
        _check_file(path)
        return
    files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    if len(files) > _MAX_FILES:
        raise MinitronError(f"{path}: expected at most {_MAX_FILES} files in a checkpoint, found {len(files)}")
    for file in sorted(files):
        if file.suffix != ".distcp" and file.name != "metadata.json":
            _check_file(file)
        if file.name == ".metadata":
            _check_objects(file)


def _check_file(path: Path) -> None:
    with _open(path) as file:
        length = os.fstat(file.fileno()).st_size
        check_names(_reader(file, 0, length), length, str(path), _COMMON_LIMIT)


def _check_objects(metadata: Path) -> None:
    """Records that are no tensors, which ``.metadata`` places in the files beside it."""
    with _open(metadata) as file:
        data = file.read(METADATA_LIMIT + 1)
    try:
        if len(data) > METADATA_LIMIT:
            raise ValueError(f"more than {METADATA_LIMIT} bytes")
        places = [
            (str(index.fqn), str(info.relative_path), int(info.offset), int(info.length))
            for index, info in MetadataUnpickler(data).read_all().storage_data.items()
            if getattr(index, "offset", None) is None
        ]
    except (pickle.UnpicklingError, AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise MinitronError(f"{metadata} is refused: {error!s:.200}") from None
    for key, name, start, length in places:
        if Path(name).name != name or name == "..":
            raise MinitronError(f"{metadata} is refused: it places '{key:.80}' outside of its folder")
        with _open(metadata.with_name(name)) as file:
            check_names(_reader(file, start, length), length, f"{metadata.with_name(name)} with '{key:.80}'")


def _reader(file: IO[bytes], begin: int, length: int) -> Read:
    """Bytes of a part of a file."""

    def read(start: int, size: int) -> bytes:
        if not 0 <= start <= start + size <= length or begin < 0:
            raise RecordError(f"expected bytes {start}..{start + size} in it, found {length}")
        data = os.pread(file.fileno(), size, begin + start)
        if len(data) != size:
            raise RecordError("expected a whole file, found its end")
        return data

    return read


def _open(path: Path) -> Any:
    """A regular file."""
    try:
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise MinitronError(f"{path}: expected a readable file, found: {error}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise MinitronError(f"{path}: expected a regular file")
    return file
