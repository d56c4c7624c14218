"""JSON, YAML and files of strangers: refused by one message, in time and memory that follow their size."""

import os
import tracemalloc

import pytest

from nemo_minitron.cli import main
from nemo_minitron.errors import MinitronError
from nemo_minitron.files import text

MANY = 200_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{" + b",".join(b'"%d": 0' % n for n in range(MANY)) + b', "7": 1}', "the name '7' given twice"),
        (b'{"a": {"b": 1, "b": 2}}', "the name 'b' given twice"),
        (b'{"' + b"k" * 9999 + b'": 0, "' + b"k" * 9999 + b'": 0}', "given twice"),
        (b'{"a": ' + b"[" * MANY + b"]" * MANY + b"}", "expected JSON"),
        (b'{"a": ' + b"7" * 5000 + b"}", "expected JSON"),
        (b'{"a": [' + b"[]," * 2_100_000 + b"0]}", "at most 4000000 values"),
        (b'{"a": "' + b" " * text.JSON_LIMIT + b'"}', "bytes of JSON"),
        (b"[]", "found list"),
        (b'{"a": "\xff"}', "expected JSON"),
        (b'{"a": 1', "expected JSON"),
        (b"", "expected JSON"),
    ],
    ids=["twice", "twice-below", "twice-long", "deep", "digits", "many", "long", "list", "utf8", "cut", "empty"],
)
def test_hostile_json(data, message):
    with pytest.raises(MinitronError, match=message) as caught:
        text.parse_json(data, "f.json")
    said = str(caught.value)
    assert said.startswith("f.json: ") and "\n" not in said and len(said) < 400


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a: &a [1]\nb: [*a, *a]", "an alias"),
        ("a: 1\na: 2", "a name given twice"),
        ("a: {b: 1, b: 2}", "a name given twice"),
        ("a: " + "[" * 99 + "]" * 99, "nested more than 64 deep"),
        ("a: " + "9" * 999, "a number of 999 characters"),
        ("a: [" + "0," * 30_000 + "0]", "more than 20000 values"),
        ("a: !!python/object/apply:os.system [id]", "the tag"),
        ("a: !!binary aaaa", "the tag"),
        ("a: 2001-99-99", "expected YAML"),
        ("a: ${oc.env:HOME}", "interpolation"),
        ("{[1]: 2}", "expected YAML"),
        ("- 1", "expected a mapping"),
        ("a: [", "expected YAML"),
    ],
)
def test_hostile_yaml(data, message):
    with pytest.raises(MinitronError, match=message) as caught:
        text.parse_plain_yaml(data.encode(), "f.yaml")
    assert str(caught.value).startswith("f.yaml: ") and "\n" not in str(caught.value)


def test_ranges_are_no_numbers():
    ranges = " ".join(f"{n}-{n + 1}" for n in range(0, 999, 3))
    assert text.parse_plain_yaml(f"a: {ranges}\nb:\n  3: x".encode(), "f") == {"a": ranges, "b": {3: "x"}}


def test_read_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert text.read_file(tmp_path / "a", 3) == b"abc"
    with pytest.raises(MinitronError, match="a: expected at most 2 bytes, found 3"):
        text.read_file(tmp_path / "a", 2)
    with pytest.raises(MinitronError, match="none: expected a readable file, found: No such file"):
        text.read_file(tmp_path / "none", 3)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MinitronError, match="pipe: expected a regular file"):
        text.read_file(tmp_path / "pipe", 3)  # and does not wait for a writer
    with pytest.raises(MinitronError):
        text.read_file(tmp_path, 3)
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 40)
    tracemalloc.start()
    with pytest.raises(MinitronError, match="sparse: expected at most 1024 bytes"):
        text.read_json(tmp_path / "sparse", 1024)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def bomb(levels):
    return "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels))])


def test_aliases_of_a_users_own_file_are_counted_before_they_are_written_out(tmp_path, capsys):
    text.check_aliases(bomb(4).encode(), "f")
    text.check_aliases(b"a: &a 1\nb: [*a, *a, *none]\nc: [", "f")  # what else is wrong others say
    with pytest.raises(MinitronError, match="f: expected at most 100000 values, found aliases for more"):
        text.check_aliases(bomb(12).encode(), "f")
    (tmp_path / "mine.yaml").write_text(bomb(12))
    assert main(["prune", f"--config-path={tmp_path}", "--config-name=mine.yaml"]) == 2
    assert "mine.yaml: expected at most 100000 values, found aliases for more" in capsys.readouterr().err
