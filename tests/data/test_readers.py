"""Records out of jsonl and CSV: nested keys, and everything that makes one of them bad."""

from __future__ import annotations

import csv
import json

import pytest

from nemo_minitron.data import readers
from nemo_minitron.data.readers import read_csv, read_jsonl, read_text_file
from nemo_minitron.errors import MinitronError


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def test_nested_keys(tmp_path):
    records = [{"meta": {"text": "a", "n": {"m": "b"}}}, {"meta.text": "own name", "meta": {"n": {"m": None}}}]
    path = write(tmp_path / "a.jsonl", "\r\n".join(map(json.dumps, records)))
    assert [row.texts for row in read_jsonl(path, ("meta.text", "meta.n.m"))] == [("a", "b"), ("own name", "")]
    (first, _) = read_jsonl(path, ("meta.txt",))
    assert first.fault == "json_keys asks for 'meta.txt', found ['n', 'text']. Did you mean 'text'?"
    (first, _) = read_jsonl(path, ("meta.text.more",))
    assert first.fault == "json_keys asks for 'meta.text.more', found str where 'more' should be"


BAD = {
    '{"text": "torn': "expected one JSON object per line, found Unterminated string",
    '["a"]': "expected one JSON object per line, found a JSON list",
    "NaN": "expected one JSON object per line, found a JSON float",
    '{"messages": [{"role": "user"}]}': "found ['messages']. Conversations are json_keys=[messages]",
    '{"text": NaN}': "key 'text' must hold text, or a list of messages, found float",
    '{"text": ["a", "b"]}': "text: expected a list of objects with role and content, found ['a', 'b']",
    '{"tex": "a"}': "json_keys asks for 'text', found ['tex']. Did you mean 'tex'?",
    '{"text": "a", "n": '
    + "9" * 5000
    + "}": "expected one JSON object per line, found an integer with too many digits",
    '{"text": "a", "n": ' + "[" * 100000 + "]" * 100000 + "}": "found one nested too deeply",
    '{"text": "a\tb"}': "expected one JSON object per line, found Invalid control character",
    '{"text": "\0"}': "expected text, found a NUL byte",
    b'{"text": "caf\xe9"}': "expected UTF-8 text, found byte 0xe9",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_bad_json_is_a_fault_of_its_line(tmp_path, line):
    raw = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n' + raw + b'\n\n{"text": "two", "n": NaN}\n')
    one, bad, two = read_jsonl(path, ("text",))
    assert (one.texts, two.texts, two.where) == (("one",), ("two",), f"{path}:4")
    assert BAD[line] in bad.fault and bad.where == f"{path}:2"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_csv(tmp_path, name):
    rows = [["id", "text"], ["1", "plain"], ["2", 'quotes ", and\na line, and\ta tab'], ["3", ""], ["4", "žluť"]]
    with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:  # as Excel writes it
        csv.writer(file, delimiter="\t" if name == "a.tsv" else ",").writerows(rows)
    found = list(read_csv(tmp_path / name, ("text", "id")))
    assert [row.texts for row in found] == [(text, number) for number, text in rows[1:]]
    assert [row.where.rpartition(":")[2] for row in found] == ["2", "3", "5", "6"]
    assert [row.fault for row in found] == [None] * 4 and found[-1].done == 1.0


def test_csv_fields_beyond_the_csv_modules_own_limit(tmp_path):
    path = write(tmp_path / "a.csv", "text\n" + "x" * 500000 + "\n")
    assert [len(row.texts[0]) for row in read_csv(path, ("text",))] == [500000]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"1,two,three", "expected 2 fields, as the first line has, found 3"),
        (b"1", "expected 2 fields, as the first line has, found 1"),
        (b'1,"a"b', "expected a CSV record: ',' expected after '\"'"),
        (b"1,caf\xe9", "expected UTF-8 text, found byte 0xe9"),
        (b"1,\0", "expected text, found a NUL byte"),
    ],
)
def test_bad_csv_is_a_fault_of_its_record(tmp_path, line, said):
    path = write(tmp_path / "a.csv", b"id,text\n0,one\n" + line + b"\n\n2,two\n")
    one, bad, two = read_csv(path, ("text",))
    assert (one.texts, two.texts, two.where) == (("one",), ("two",), f"{path}:5")
    assert said in bad.fault and bad.where == f"{path}:3"


def test_csv_that_ends_in_a_quote(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", 'text\none\n"two\nthree\n')
    one, bad = read_csv(path, ("text",))
    assert one.texts == ("one",) and bad.where == f"{path}:3" and "unexpected end of data" in bad.fault
    monkeypatch.setattr(readers, "MAX_RECORD", 8)
    assert "field larger than field limit (8)" in list(read_csv(path, ("text",)))[1].fault


def test_csv_needs_its_columns(tmp_path):
    for content, said in {
        "a;text\n": r"a.csv:1: json_keys asks for \['text'\] once each in the first line, found columns \['a;text'\]",
        "text,text\n": "once each",
        '"text\n': "unexpected end of data",
    }.items():
        with pytest.raises(MinitronError, match=said):
            list(read_csv(write(tmp_path / "a.csv", content), ("text",)))


def test_a_text_file_is_one_document(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\n")
    assert [row.texts for row in read_text_file(path)] == [("one\ntwo\n",)]
    (bad,) = read_text_file(write(tmp_path / "b.txt", b"one\ncaf\xe9\nmore\n"))
    assert (bad.where, bad.fault) == (f"{tmp_path}/b.txt:2", "expected UTF-8 text, found byte 0xe9")
    monkeypatch.setattr(readers, "MAX_RECORD", 5)
    (bad,) = read_text_file(path)
    assert bad.where == f"{path}:2" and "document=line" in bad.fault
