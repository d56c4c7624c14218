"""Lines out of every encoding and compression, their faults, and the bound on what one line takes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import subprocess
import sys

import pyarrow
import pytest

from nemo_minitron.data import lines as module
from nemo_minitron.data.lines import MAX_RECORD, Line, read_lines
from nemo_minitron.errors import MinitronError

TEXT = "one\n\nžluť \N{GRINNING FACE}\n" * 20000 + "last without a newline"
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}


def texts(path) -> list[str]:
    found = list(read_lines(path))
    assert [line.fault for line in found] == [None] * len(found)
    assert [line.number for line in found] == list(range(1, len(found) + 1))
    done = [line.done for line in found]
    assert done == sorted(done) and done[-1] == 1.0
    return [line.text for line in found]


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_text_is_the_text(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACK[suffix](TEXT.encode()))
    assert texts(path) == TEXT.splitlines(keepends=True)


@pytest.mark.parametrize("suffix", [s for s in PACK if s])
def test_parts_one_after_the_other_are_one_text(tmp_path, suffix):
    """As `cat a.xz b.xz` makes it, and as tools that compress in parallel write it."""
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACK[suffix](b"one\ntw") + PACK[suffix](b"o\n"))
    assert texts(path) == ["one\n", "two\n"]


@pytest.mark.parametrize("suffix", [s for s in PACK if s])
@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_damaged_compression_is_one_message(tmp_path, suffix, damage):
    if (suffix, damage) == (".zst", "flipped"):
        pytest.skip("zstd has no checksum by default: other bytes are other text")
    good = PACK[suffix](os.urandom(30000).hex().encode())
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    flipped[len(good) // 2 + 1] ^= 0xFF
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes({"cut": good[:-9], "flipped": bytes(flipped), "foreign": b"no such format at all"}[damage])
    with pytest.raises(MinitronError, match=f"a.txt{suffix}: cannot be read: ."):
        list(read_lines(path))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_byte_order_marks_are_dropped(tmp_path, encoding):
    mark = "\ufeff" if encoding.endswith("-be") else ""
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress((mark + TEXT).encode(encoding)))
    assert texts(tmp_path / "a.txt.gz") == TEXT.splitlines(keepends=True)


def test_windows_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\rhalf\r\n")
    assert texts(tmp_path / "a.txt") == ["one\n", "\n", "two\rhalf\n"]


def test_faults_are_of_their_line_alone(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\ncaf\xe9\nn\0l\nfine\n")
    assert [(line.number, line.text, line.fault and line.fault[:50]) for line in read_lines(tmp_path / "a.txt")] == [
        (1, "fine\n", None),
        (2, "", "expected UTF-8 text, found byte 0xe9"),
        (3, "", "expected text, found a NUL byte: a binary file, or"),
        (4, "fine\n", None),
    ]
    (tmp_path / "b.txt").write_bytes("\ufefffine\nhalf \ud83d\nfine\n".encode("utf-16-le", "surrogatepass"))
    assert [bool(line.fault) for line in read_lines(tmp_path / "b.txt")] == [False, True, False]
    (tmp_path / "c.txt").write_bytes("\ufefffine".encode("utf-16-le") + b"x")
    with pytest.raises(MinitronError, match=r"c.txt: expected UTF-16-LE text, as its mark says"):
        list(read_lines(tmp_path / "c.txt"))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_the_longest_line(tmp_path, monkeypatch, end):
    monkeypatch.setattr(module, "MAX_RECORD", 100000)
    (tmp_path / "a.txt").write_bytes(b"a\n" + b"x" * 100000 + end)
    assert [len(line.text.strip()) for line in read_lines(tmp_path / "a.txt")] == [1, 100000]
    (tmp_path / "a.txt").write_bytes(b"a\n" + b"x" * 100001 + end)
    assert [bool(line.fault) for line in read_lines(tmp_path / "a.txt")] == [False, True]
    (tmp_path / "a.txt").write_bytes(b"x" * 399999 + b"\n" + b"x" * 400000 + b"\nshort\n")
    found = list(read_lines(tmp_path / "a.txt"))
    assert [line.number for line in found] == [1, 2, 3] and found[2] == Line(3, "short\n", 1.0)
    assert "a longer one" in found[0].fault and "a longer one" in found[1].fault


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_line_of_gigabytes_takes_little_memory(tmp_path, suffix):
    """Two GiB in a few hundred kilobytes, read by a process that may have one: the first line alone is told."""
    path = tmp_path / f"a.jsonl{suffix}"
    part = PACK[suffix](b" " * (16 << 20))
    path.write_bytes(part * 128)
    code = (
        "import sys, resource, pathlib\nfrom nemo_minitron.data.lines import read_lines\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))\n"
        "print(next(read_lines(pathlib.Path(sys.argv[1]))))"
    )
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "a line of at most 64 MiB, found a longer one" in said.stdout, said.stderr
    assert MAX_RECORD == 64 << 20 and path.stat().st_size < 1 << 22


def test_xz_that_asks_for_too_much_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_XZ_MEMORY", 4 << 20)  # the default's dictionary is 8 MiB
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"text"))
    with pytest.raises(MinitronError, match=r"a.txt.xz: cannot be read: Memory usage limit"):
        list(read_lines(tmp_path / "a.txt.xz"))


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    for name, said in {"a.txt": "found a pipe", "gone.txt": "No such file", "": "found a folder"}.items():
        with pytest.raises(MinitronError, match=said):
            list(read_lines(tmp_path / name))
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    assert texts(tmp_path / "link.txt") == ["text"]
