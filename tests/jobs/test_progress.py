"""What a log holds of a bar: whole lines with the remaining time, and nothing of what was quick."""

from __future__ import annotations

import io
import re

import pytest

from nemo_minitron.jobs import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch, stream: io.StringIO, **options) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    with progress.progress_bar(3, "compensate", "layer", **options) as bar:
        for _ in range(3):
            bar.update()
    return stream.getvalue()


def test_a_log_has_lines_with_the_remaining_time(monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    lines = shown(monkeypatch, io.StringIO()).splitlines()
    assert "\r" not in "".join(lines) and len(lines) >= 3 and all(len(line) <= 100 for line in lines)
    assert re.search(r"compensate:\s+33%.* 1/3 \[\d\d:\d\d<\d\d:\d\d", "\n".join(lines))


def test_what_is_quick_writes_nothing_into_a_log(monkeypatch):
    assert shown(monkeypatch, io.StringIO()) == ""


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_other_processes_show_nothing(monkeypatch, stream):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    assert shown(monkeypatch, stream(), show=False) == ""


def test_a_terminal_has_a_bar_that_moves(monkeypatch):
    assert "\r" in shown(monkeypatch, Terminal())
