"""Where a line can be written anew; and that a line which was left there is cleared."""

from __future__ import annotations

import io

import pytest

from nemo_minitron.jobs.terminal import clear_line, moves


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "term", "expected"),
    [(Terminal, "xterm", True), (Terminal, "dumb", False), (Terminal, "DUMB", False), (Terminal, "", False),
     (Terminal, "unknown", False), (io.StringIO, "xterm", False)],
)  # fmt: skip
def test_what_moves(monkeypatch, stream, term, expected):
    found = stream()
    monkeypatch.setattr("sys.stderr", found)
    monkeypatch.setenv("TERM", term)
    assert moves() is expected
    clear_line()
    assert found.getvalue() == ("\r\x1b[2K" if expected else "")
