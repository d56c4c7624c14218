"""Rows of text out of files: jsonl, plain text and parquet, and WikiText's lines joined into articles.

Every reader yields ``(texts, done)``: one string per asked key, and the fraction of the file read so far (0 to 1),
which is what a progress bar needs whatever the format. Files are streamed, never loaded whole, except a plain text
file that is one document.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from nemo_minitron.errors import MinitronError, did_you_mean

Row = tuple[tuple[str, ...], float]
"""Texts in the order of the asked keys, and the fraction of the input consumed once this row is taken."""

JSONL, TEXT, LINES, PARQUET = "jsonl", "text", "lines", "parquet"
FORMATS = {".jsonl": JSONL, ".json": JSONL, ".txt": TEXT, ".tokens": LINES, ".raw": LINES, ".parquet": PARQUET}
"""Format by extension. ``lines`` is WikiText's own layout (``wiki.train.tokens``, ``wiki.train.raw``)."""

_HEADING = re.compile(r" = (?!= ).*\S = ?")
_SUBHEADING_END = re.compile(r".* = = ?")


def format_of(path: Path) -> str | None:
    """Format of a file by its extension (``.gz`` after a text extension is allowed), None when unknown."""
    name = path.name[:-3] if path.name.endswith(".gz") else path.name
    found = FORMATS.get(Path(name).suffix.lower())
    return None if found == PARQUET and path.name.endswith(".gz") else found


def read_jsonl(path: Path, keys: Sequence[str]) -> Iterator[Row]:
    """One row per JSON object per line; blank lines are skipped and a null value is an empty text.

    Raises:
        MinitronError: malformed JSON, an absent key or a value that is not text, each with file and line number.
    """
    for number, line, done in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise MinitronError(f"{path}:{number}: expected one JSON object per line, found {error.msg}") from None
        if not isinstance(record, dict):
            raise MinitronError(
                f"{path}:{number}: expected one JSON object per line, found a JSON {type(record).__name__}"
            )
        yield tuple(_value(record, key, f"{path}:{number}") for key in keys), done


def _value(record: dict, key: str, where: str) -> str:
    if key not in record:
        raise MinitronError(
            f"{where}: json_keys asks for '{key}', found {sorted(record)}.{did_you_mean(key, list(record))}"
        )
    value = record[key]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise MinitronError(f"{where}: key '{key}' must hold text, found {type(value).__name__}")
    return value


def read_text_file(path: Path) -> Iterator[Row]:
    """The whole file as one row."""
    yield ("".join(line for _, line, _ in _lines(path)),), 1.0


def read_text_lines(path: Path, keep_newline: bool = False) -> Iterator[Row]:
    """One row per line. WikiText keeps its newlines, so that its rows equal those of the HF parquet layout."""
    for _, line, done in _lines(path):
        yield (line if keep_newline else line.rstrip("\r\n"),), done


def read_parquet(path: Path, keys: Sequence[str]) -> Iterator[Row]:
    """One row per parquet row; ``keys`` are columns and a null is an empty text.

    Raises:
        MinitronError: a file that is not parquet, an absent column, a column that is not text.
    """
    parquet, arrow = _pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            types = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
            for key in keys:
                _check_column(key, types, path)
            total, taken = file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=1024, columns=list(keys)):
                columns = [batch.column(key).to_pylist() for key in keys]
                for values in zip(*columns, strict=True):
                    taken += 1
                    yield tuple(value or "" for value in values), taken / total
    except (OSError, arrow.ArrowException) as error:
        raise MinitronError(f"{path}: cannot be read as parquet: {_first_line(error)}") from None


def _check_column(key: str, columns: dict, where: object) -> None:
    if key not in columns:
        raise MinitronError(
            f"{where}: json_keys asks for column '{key}', found {list(columns)}.{did_you_mean(key, list(columns))}"
        )
    if str(columns[key]) not in ("string", "large_string", "string_view"):
        raise MinitronError(f"{where}: column '{key}' must hold text, found {columns[key]}")


def _pyarrow() -> tuple:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MinitronError(f"reading parquet needs a pyarrow that fits the installed numpy: {error}") from None
    return parquet, pyarrow.lib


def read_hub(name: str, config: str | None, split: str, keys: Sequence[str]) -> Iterator[Row]:
    """Rows of one split of a Hugging Face dataset, through ``datasets.load_dataset`` (its cache, its offline switch).

    Raises:
        MinitronError: a dataset, config or split that cannot be loaded, or an absent column.
    """
    _pyarrow()
    import datasets

    where = f"dataset '{name}'" + (f", config '{config}'" if config else "") + f", split '{split}'"
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise MinitronError(
            f"input: {where}: found no local file or folder of that name and the dataset could not be loaded: "
            f"{_first_line(error)}"
        ) from None
    types = {column: getattr(feature, "dtype", feature) for column, feature in rows.features.items()}
    for key in keys:
        _check_column(key, types, where)
    total, taken = len(rows), 0
    for batch in rows.select_columns(list(keys)).iter(batch_size=1024):
        for values in zip(*(batch[key] for key in keys), strict=True):
            taken += 1
            yield tuple(value or "" for value in values), taken / total


def chain(paths: Sequence[Path], read: Callable[[Path], Iterator[Row]]) -> Iterator[Row]:
    """Rows of several files one after the other, their fractions weighted by file size."""
    sizes = [max(path.stat().st_size, 1) for path in paths]
    total, before = sum(sizes), 0
    for path, size in zip(paths, sizes, strict=True):
        for texts, done in read(path):
            yield texts, (before + done * size) / total
        before += size


def is_heading(line: str) -> bool:
    """Whether a line is WikiText's level-1 heading, `` = Title = ``; `` = = Section = = `` is not."""
    line = line.rstrip("\r\n")
    return bool(_HEADING.fullmatch(line)) and not _SUBHEADING_END.fullmatch(line)


def join_articles(rows: Iterable[Row]) -> Iterator[Row]:
    """Join WikiText lines into articles: one document from each level-1 heading to the next.

    Blank lines are dropped (the HF layout stores them empty, the original one as a space), so both layouts give the
    same articles. Lines before the first heading, as in a shard cut inside an article, are a document of their own.
    """
    lines: list[str] = []
    last = 0.0
    for (line,), done in rows:
        if is_heading(line) and lines:
            yield ("".join(lines),), last
            lines = []
        if line.strip():
            lines.append(line if line.endswith("\n") else line + "\n")
        last = done
    if lines:
        yield ("".join(lines),), last


def looks_like_wikitext(rows: Iterator[Row]) -> tuple[bool, Iterator[Row]]:
    """Whether the first row that is not blank is a level-1 heading, and the rows with none lost."""
    seen: list[Row] = []
    for row in rows:
        seen.append(row)
        if any(text.strip() for text in row[0]):
            break
    found = bool(seen) and len(seen[-1][0]) == 1 and is_heading(seen[-1][0][0])
    return found, itertools.chain(seen, rows)


def _lines(path: Path) -> Iterator[tuple[int, str, float]]:
    """Numbered lines as UTF-8 with their newlines, and the fraction of the file's bytes behind them."""
    number = 0
    try:
        total = max(path.stat().st_size, 1)
        with open(path, "rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
            for line in stream:
                number += 1
                yield number, line.decode("utf-8"), min(raw.tell() / total, 1.0)
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#x}"
        raise MinitronError(f"{path}:{number}: expected UTF-8 text, found {found}") from None
    except (OSError, EOFError) as error:
        raise MinitronError(f"{path}: cannot be read: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
