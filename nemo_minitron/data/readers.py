"""Rows of text out of files of lines: jsonl, CSV and plain text; in jsonl also conversations.

Every reader yields a :class:`Row` per record. Files are streamed, never loaded whole, except a plain text file that
is one document. A record that cannot be taken is a row that says why: what becomes of it is for the caller to decide.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron.data.lines import COMPRESSIONS, MAX_RECORD, Line, read_lines, regular_size
from nemo_minitron.data.messages import BadMessages, Conversation, conversation_of
from nemo_minitron.errors import MinitronError, did_you_mean

JSONL, CSV, TEXT, LINES, PARQUET, ARROW = "jsonl", "csv", "text", "lines", "parquet", "arrow"
FORMATS = {
    ".jsonl": JSONL,
    ".json": JSONL,
    ".csv": CSV,
    ".tsv": CSV,
    ".txt": TEXT,
    ".tokens": LINES,
    ".raw": LINES,
    ".parquet": PARQUET,
    ".arrow": ARROW,
}
"""Format by extension. ``lines`` is WikiText's own layout (``wiki.train.tokens``, ``wiki.train.raw``)."""

_SURROGATE = re.compile("[\ud800-\udfff]")


Text = str | Conversation
"""What a record holds under a key."""


class Row(NamedTuple):
    """One record.

    Attributes:
        texts: in the order of the asked keys; empty where there is a fault.
        done: fraction of the input consumed once this row is taken, 0 to 1: what a progress bar needs.
        where: file and line, or what else names the record.
        fault: why the record cannot be taken, or None.
    """

    texts: tuple[Text, ...]
    done: float
    where: str
    fault: str | None = None


class _Bad(Exception):
    """What is wrong with one record."""


def format_of(path: Path) -> str | None:
    """Format of a file by its extension (text may be compressed), None when unknown."""
    name = path.name.lower()
    packed = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    found = FORMATS.get(Path(name.removesuffix(packed)).suffix)
    return None if packed and found in (PARQUET, ARROW) else found


def read_jsonl(path: Path, keys: Sequence[str]) -> Iterator[Row]:
    """One row per JSON object per line; blank lines are skipped, a null value is an empty text, a list a conversation.

    A key with dots reaches into nested objects, where no key has that very name.
    """
    for line in read_lines(path):
        if line.fault or line.text.strip():
            texts, fault = ((), line.fault) if line.fault else _parse(line.text.rstrip("\n"), keys)
            yield Row(texts, line.done, f"{path}:{line.number}", fault)


def _parse(text: str, keys: Sequence[str]) -> tuple[tuple[Text, ...], str | None]:
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            return (), f"expected one JSON object per line, found a JSON {type(record).__name__}"
        return tuple(_value(record, key) for key in keys), None
    except (_Bad, BadMessages) as error:
        return (), str(error)
    except json.JSONDecodeError as error:
        return (), f"expected one JSON object per line, found {error.msg}"
    except RecursionError:
        return (), "expected one JSON object per line, found one nested too deeply"
    except ValueError:  # what Python says of an integer of thousands of digits
        return (), "expected one JSON object per line, found an integer with too many digits"


def _value(record: dict, key: str) -> Text:
    found: Any = record
    for name in [key] if key in record else key.split("."):
        if not isinstance(found, dict):
            raise _Bad(f"json_keys asks for '{key}', found {type(found).__name__} where '{name}' should be")
        if name not in found:
            chat = "" if not isinstance(found.get("messages"), list) else " Conversations are json_keys=[messages]"
            raise _Bad(f"json_keys asks for '{key}', found {sorted(found)}.{did_you_mean(name, found) or chat}")
        found = found[name]
    if isinstance(found, list):
        return conversation_of(found, key)
    if found is not None and not isinstance(found, str):
        raise _Bad(f"key '{key}' must hold text, or a list of messages, found {type(found).__name__}")
    return found or ""


class _CsvLines:
    """Lines as the csv module takes them. Not a generator: it goes on after what it raises."""

    def __init__(self, path: Path) -> None:
        self._lines, self.last = read_lines(path), Line(0, "", 0.0)

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        self.last = next(self._lines)
        if self.last.fault:
            raise _Bad(self.last.fault)
        return self.last.text


def read_csv(path: Path, keys: Sequence[str]) -> Iterator[Row]:
    """One row per record of a CSV or TSV file whose first record names the columns.

    Quoting is RFC 4180's, and strict: a stray quote, or a record with more or fewer fields than there are columns, is
    a fault.

    Raises:
        MinitronError: no such column, columns of one name, or a first record that cannot be read.
    """
    csv.field_size_limit(MAX_RECORD)
    lines = _CsvLines(path)
    tabs = ".tsv" in [suffix.lower() for suffix in path.suffixes[-2:]]
    records = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
    columns: list[str] | None = None
    while True:
        start = lines.last.number + 1
        fields, fault = [], None
        try:
            fields = next(records)
        except StopIteration:
            return
        except (_Bad, csv.Error) as error:
            fault = str(error) if isinstance(error, _Bad) else f"expected a CSV record: {error}"
        where = f"{path}:{start}"
        if columns is None:
            columns = fields
            if fault or any(columns.count(key) != 1 for key in keys):
                missing = next((key for key in keys if key not in columns), "")
                said = f"json_keys asks for {list(keys)} once each in the first line, found columns {columns[:20]}"
                raise MinitronError(f"{where}: {fault or said + did_you_mean(missing, columns)}")
            continue
        if not fields and not fault:
            continue
        if not fault and len(fields) != len(columns):
            fault = f"expected {len(columns)} fields, as the first line has, found {len(fields)}"
        yield Row(() if fault else tuple(fields[columns.index(key)] for key in keys), lines.last.done, where, fault)


def read_text_file(path: Path) -> Iterator[Row]:
    """The whole file as one row."""
    text, size = io.StringIO(), 0
    for line in read_lines(path):
        size += len(line.text)
        fault = line.fault
        if size > MAX_RECORD:
            fault = f"expected a text file of at most {MAX_RECORD >> 20} MiB as one document; document=line takes lines"
        if fault:
            yield Row((), 1.0, f"{path}:{line.number}", fault)
            return
        text.write(line.text)
    yield Row((text.getvalue(),), 1.0, str(path))


def read_text_lines(path: Path, keep_newline: bool = False) -> Iterator[Row]:
    """One row per line. WikiText keeps its newlines, so that its rows equal those of the HF parquet layout."""
    for line in read_lines(path):
        texts = () if line.fault else (line.text if keep_newline else line.text.rstrip("\r\n"),)
        yield Row(texts, line.done, f"{path}:{line.number}", line.fault)


def chain(paths: Sequence[Path], read: Callable[[Path], Iterator[Row]]) -> Iterator[Row]:
    """Rows of several files one after the other, their fractions weighted by file size."""
    sizes = [max(regular_size(path), 1) for path in paths]
    total, before = sum(sizes), 0
    for path, size in zip(paths, sizes, strict=True):
        for row in read(path):
            yield row._replace(done=(before + row.done * size) / total)
        before += size


def is_blank(text: Text) -> bool:
    """Whether there is nothing to be read."""
    return isinstance(text, str) and not text.strip()


def not_unicode(text: str) -> str | None:
    """What makes a string no Unicode text: half a surrogate pair, which JSON's ``\\ud83d`` can spell; None if it is."""
    if text.isascii() or not (found := _SURROGATE.search(text)):
        return None
    return (
        f"expected Unicode text, found half of a surrogate pair (\\u{ord(found[0]):04x}) at character {found.start()}"
    )
