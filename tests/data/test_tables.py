"""Columns: what pyarrow and datasets wrote, read back, and what is refused of them."""

from __future__ import annotations

import json
import os

import pyarrow
import pytest
from pyarrow import parquet

from nemo_minitron.data import tables as module
from nemo_minitron.data.sources import Source
from nemo_minitron.data.tables import read_arrow, read_parquet, saved_files
from nemo_minitron.errors import MinitronError

TEXTS = ["one", None, "žluť", "", *map(str, range(200))]


def table() -> pyarrow.Table:
    categories = pyarrow.array(TEXTS).dictionary_encode()
    meta = [{"text": text, "n": 1} if text != "" else None for text in TEXTS]
    return pyarrow.table({"text": TEXTS, "meta": meta, "category": categories, "number": list(range(len(TEXTS)))})


def write(path, content: pyarrow.Table):
    if path.suffix == ".parquet":
        parquet.write_table(content, path, row_group_size=50)
    else:
        new = pyarrow.ipc.new_stream if path.name.startswith("stream") else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as file, new(file, content.schema) as writer:
            writer.write_table(content, max_chunksize=50)
    return path


@pytest.fixture(params=["a.parquet", "stream.arrow", "file.arrow"])
def stored(request, tmp_path):
    path = write(tmp_path / request.param, table())
    return path, read_parquet if path.suffix == ".parquet" else read_arrow


def test_columns_and_what_is_inside_of_them(stored):
    path, read = stored
    expected = [text or "" for text in TEXTS]
    rows = list(read(path, ("text", "meta.text", "category")))
    assert [row.texts for row in rows] == [(text,) * 3 for text in expected]
    assert [row.where for row in rows[:2]] == [f"{path}: row 1", f"{path}: row 2"]
    done = [row.done for row in rows]
    assert done == sorted(done) and done[0] > 0 and 0.9 < done[-1] <= 1.0


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("txt", "column 'txt', found ['text', 'meta', 'category', 'number']. Did you mean 'text'?"),
        ("meta.txt", "column 'meta.txt', found ['text', 'n']. Did you mean 'text'?"),
        ("text.more", "column 'text.more', found []"),
        ("meta", "column 'meta' must hold text, or lists of messages, found struct"),
        ("number", "column 'number' must hold text, or lists of messages, found int64"),
    ],
)
def test_columns_that_are_not_text(stored, key, said):
    path, read = stored
    with pytest.raises(MinitronError) as error:
        list(read(path, (key,)))
    assert str(path) in str(error.value) and said in str(error.value)


def test_bad_values_are_faults_of_their_row(stored, monkeypatch):
    path, read = stored
    raw = pyarrow.array([b"fine", b"caf\xe9", b"0123456789", b"fine"]).view(pyarrow.string())
    write(path, pyarrow.table({"text": raw}))
    monkeypatch.setattr(module, "MAX_RECORD", 9)
    faults = [row.fault for row in read(path, ("text",))]
    assert faults[0] is None and faults[3] is None
    assert faults[1] == "expected UTF-8 text, found byte 0xe9" and "found a longer one" in faults[2]


def test_damaged_files(stored, tmp_path):
    path, read = stored
    good = path.read_bytes()
    for damaged in (good[: len(good) // 2], b"nothing of the kind", b"ARROW1", b""):
        path.write_bytes(damaged)
        with pytest.raises(MinitronError, match="cannot be read as"):
            list(read(path, ("text",)))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(MinitronError, match="found a pipe"):
        list(read(path, ("text",)))


def texts(path, **options) -> list[str]:
    return [row[0] for row, _ in Source(str(path), **options).documents()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A data set in three shards, and one of two splits, as datasets saves them."""
    import datasets

    folder = tmp_path_factory.mktemp("saved")
    every = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(300)]})
    every.select(range(299, -1, -1)).save_to_disk(folder / "one", num_shards=3)  # an order of its own
    datasets.DatasetDict({"train": every.select(range(5)), "validation": every.select([7])}).save_to_disk(
        folder / "two"
    )
    return folder


def test_what_save_to_disk_wrote(saved):
    import datasets

    assert (
        texts(saved / "one") == datasets.load_from_disk(str(saved / "one"))["text"][:]
        and len(texts(saved / "one")) == 300
    )
    both = datasets.load_from_disk(str(saved / "two"))
    assert texts(saved / "two") == both["train"]["text"][:]
    assert texts(saved / "two", split="val") == texts(saved / "two", split="validation") == ["text 7"]
    assert texts(saved / "two" / "validation", split="validation") == ["text 7"]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (
            {"_data_files": [{"filename": "../outside.arrow"}]},
            "expected names in its own folder, found '../outside.arrow'",
        ),
        ({"_data_files": [{"filename": "/etc/passwd"}]}, "expected names in its own folder"),
        ({"_data_files": [{"filename": 3}]}, "expected names in its own folder"),
        ({"_data_files": [{"name": "a"}]}, "expected _data_files"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "gone.arrow: cannot be read"),
        ({"_data_files": []}, "found none"),
        ({"_data_files": [], "_indices_data_files": [{"filename": "a"}]}, "a table of indices"),
        ({"_split": "test"}, "is 'test'"),
        ("[" * 100000, "expected JSON"),
        ([], "expected a JSON object"),
        ({"x": "y" * (1 << 20)}, "expected at most 1048576 bytes"),
    ],
)
def test_saved_folders_that_are_damaged(tmp_path, state, said):
    (tmp_path / "state.json").write_text(state if isinstance(state, str) else json.dumps(state))
    with pytest.raises(MinitronError) as error:
        texts(tmp_path)
    assert said in str(error.value)


def test_splits_of_saved_folders(saved, tmp_path):
    with pytest.raises(MinitronError, match=r"no 'test' in the saved data set .*\['train', 'validation'\]"):
        texts(saved / "two", split="test")
    with pytest.raises(MinitronError, match="has no configurations, found 'en'"):
        texts(saved / "one", config="en")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["../x"]}')
    with pytest.raises(MinitronError, match="own folder"):
        saved_files(tmp_path, "../x")
