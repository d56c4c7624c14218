"""Rows of text or conversations out of columns: parquet, Arrow, ``Dataset.save_to_disk``, and data sets on the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron.data.lines import MAX_RECORD, regular_size
from nemo_minitron.data.messages import BadMessages, conversation_of
from nemo_minitron.data.readers import Row, Text
from nemo_minitron.errors import MinitronError, did_you_mean
from nemo_minitron.files.text import one_line, read_json

SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""What splits are called by the names that they have in the world."""

_BATCH = 64  # rows at a time: a column may repeat one long text for next to nothing
_MAX_STATE = 1 << 20


def read_parquet(path: Path, keys: Sequence[str]) -> Iterator[Row]:
    """One row per parquet row; ``keys`` are columns, or fields of them with a dot, and a null is an empty text.

    Raises:
        MinitronError: a file that is not parquet, an absent column, a column that is not text.
    """
    parquet, arrow = _pyarrow()
    regular_size(path)
    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(keys, file.schema_arrow, path)
            batches = file.iter_batches(batch_size=_BATCH, columns=sorted({column[0] for column in columns}))
            yield from _rows(batches, columns, file.metadata.num_rows, path)
    except (OSError, arrow.ArrowException) as error:
        raise MinitronError(f"{path}: cannot be read as parquet: {one_line(error)}") from None


def read_arrow(path: Path, keys: Sequence[str]) -> Iterator[Row]:
    """The same of an Arrow file, in either of IPC's layouts.

    Raises:
        MinitronError: a file that is not Arrow's, an absent column, a column that is not text.
    """
    _, arrow = _pyarrow()
    import pyarrow

    size = regular_size(path)
    try:
        with pyarrow.OSFile(str(path)) as file:
            stream = file.read(6) != b"ARROW1"
            file.seek(0)
            reader = pyarrow.ipc.open_stream(file) if stream else pyarrow.ipc.open_file(file)
            columns = _columns(keys, reader.schema, path)
            count = 1 if stream else reader.num_record_batches
            number = 0
            for index, batch in enumerate(reader if stream else map(reader.get_batch, range(count))):
                behind = file.tell() / size if stream else (index + 1) / count
                for row in _rows([batch], columns, 1, path, number):
                    yield row._replace(done=min(behind, 1.0))
                number += batch.num_rows
    except (OSError, arrow.ArrowException) as error:
        raise MinitronError(f"{path}: cannot be read as Arrow: {one_line(error)}") from None


def saved_files(folder: Path, split: str) -> list[Path] | None:
    """Arrow files, in order, of what ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` left; None if nothing.

    Args:
        split: which one of a ``DatasetDict``; a single ``Dataset`` is ``train``, unless it says another.

    Raises:
        MinitronError: no such split, an unreadable list of files, or a file that lies elsewhere.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json", _MAX_STATE).get("splits")
        split = split if not isinstance(splits, list) or split in splits else SPLITS.get(split, split)
        if not isinstance(splits, list) or split not in splits:
            raise MinitronError(f"dataset.split: no '{split}' in the saved data set '{folder}', found splits {splits}")
        folder = folder / _plain(split, folder / "dataset_dict.json")
    elif not (folder / "state.json").is_file():
        return None
    path = folder / "state.json"
    state = read_json(path, _MAX_STATE)
    named = (folder.parent / "dataset_dict.json").is_file()  # by what it is called there, wherever it is from
    said = folder.name if named else state.get("_split") or "train"
    if said not in (split, SPLITS.get(split, split)):
        raise MinitronError(f"dataset.split is '{split}', but the saved data set '{folder}' is '{said}'")
    if state.get("_indices_data_files"):
        raise MinitronError(f"{path}: expected a data set saved with its rows in order, found a table of indices")
    try:
        names = [_plain(file["filename"], path) for file in state["_data_files"]]
    except (KeyError, TypeError):
        raise MinitronError(f"{path}: expected _data_files, as datasets' save_to_disk lists them") from None
    if not names:
        raise MinitronError(f"{path}: expected files of a saved data set, found none")
    return [folder / name for name in names]


def _plain(name: Any, path: Path) -> str:
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise MinitronError(f"{path}: expected names in its own folder, found {name!r}")
    return name


def read_hub(name: str, config: str | None, split: str, keys: Sequence[str]) -> Iterator[Row]:
    """Rows of one split of a Hugging Face dataset, through ``datasets.load_dataset`` (its cache, its offline switch).

    Raises:
        MinitronError: a dataset, config or split that cannot be loaded, or an absent column.
    """
    _pyarrow()
    import datasets

    where = f"dataset '{name}'" + (f", config '{config}'" if config else "") + f", split '{split}'"
    try:
        rows = datasets.load_dataset(name, config, split=split)  # since datasets 4, a script is never run
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise MinitronError(
            f"input: {where}: found no local file or folder of that name and the dataset could not be loaded: "
            f"{one_line(error)}"
        ) from None
    columns = _columns(keys, rows.features.arrow_schema, where)
    tables = rows.select_columns(sorted({column[0] for column in columns})).with_format("arrow").iter(_BATCH)
    yield from _rows((batch for table in tables for batch in table.to_batches()), columns, len(rows), where)


def _columns(keys: Sequence[str], schema: Any, where: object) -> list[list[str]]:
    """Find for each key its column and, where a key has dots and is no column itself, the fields inside of it."""
    return [_column(key, schema, where) for key in keys]


def _column(key: str, schema: Any, where: object) -> list[str]:
    known, path = list(schema.names), [key] if key in schema.names else key.split(".")
    kind: Any = None
    for depth, name in enumerate(path):
        if depth:
            known = [field.name for field in kind] if str(kind).startswith("struct<") else []
        if known.count(name) != 1:
            raise MinitronError(
                f"{where}: json_keys asks for column '{key}', found {known}.{did_you_mean(name, known)}"
            )
        kind = kind.field(name).type if depth else schema.field(name).type
    text = str(kind.value_type if str(kind).startswith("dictionary<") else kind)
    if text not in ("string", "large_string", "string_view") and not _has_messages(kind):
        raise MinitronError(f"{where}: column '{key}' must hold text, or lists of messages, found {kind}")
    return path


def _has_messages(kind: Any) -> bool:
    """Whether a column's type is a list of structs with a role and a content."""
    if not str(kind).startswith(("list<", "large_list<")) or not str(kind.value_type).startswith("struct<"):
        return False
    return {"role", "content"} <= {field.name for field in kind.value_type}


def _rows(batches: Any, columns: list[list[str]], total: int, where: object, taken: int = 0) -> Iterator[Row]:
    for batch in batches:
        values = [_values(_inside(batch.column(column[0]), column[1:]), ".".join(column)) for column in columns]
        for texts in zip(*values, strict=True):
            taken += 1
            fault = next((text.said for text in texts if isinstance(text, _Fault)), None)
            yield Row(() if fault else texts, min(taken / total, 1.0), f"{where}: row {taken}", fault)


def _inside(array: Any, fields: list[str]) -> Any:
    import pyarrow.compute

    return pyarrow.compute.struct_field(array, fields) if fields else array


class _Fault(NamedTuple):
    """What is wrong with a value, in its place."""

    said: str


def _values(array: Any, key: str) -> list[Any]:
    try:
        values = array.to_pylist()
    except UnicodeDecodeError:
        values = [_value(scalar) for scalar in array]
    return [_text(value, key) for value in values]


def _text(value: Any, key: str) -> Text | _Fault:
    try:
        text: Text | _Fault = conversation_of(value, key) if isinstance(value, list) else value or ""
    except BadMessages as error:
        return _Fault(str(error))
    if not isinstance(text, _Fault) and len(text) > MAX_RECORD:
        return _Fault(f"expected a text of at most {MAX_RECORD >> 20} MiB, found a longer one")
    return text


def _value(scalar: Any) -> str | _Fault | None:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return _Fault(f"expected UTF-8 text, found byte {error.object[error.start]:#x}")


def _pyarrow() -> tuple:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MinitronError(f"reading parquet needs a pyarrow that fits the installed numpy: {error}") from None
    return parquet, pyarrow.lib
