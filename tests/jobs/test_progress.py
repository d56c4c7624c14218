"""The line of progress: whole lines in a log, one line that fits in a terminal, and nothing that is glued to it."""

from __future__ import annotations

import io
import os
import re
import sys

import pytest

from nemo_minitron.jobs import progress
from nemo_minitron.jobs.line import LOSS, Part
from nemo_minitron.jobs.progress import Progress, hidden, progress_bar
from nemo_minitron.jobs.run_place import VARIABLE, RunPlace
from tests.jobs.terminal import CODE, in_terminal, screen, states


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (VARIABLE, "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def every(monkeypatch):
    """Each state is shown."""
    for name in ("START_SECONDS", "LOG_SECONDS", "REDRAW_SECONDS"):
        monkeypatch.setattr(progress, name, 0.0)


def shown(monkeypatch, stream: io.StringIO, **options) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar(3, "compensate", "layer", **options) as bar:
        for _ in range(3):
            bar.update()
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------------------ a log


def test_a_log_has_whole_lines(monkeypatch, every):
    text = shown(monkeypatch, io.StringIO())
    lines = text.splitlines()
    assert text.endswith("\n") and not set(text) & {"\r", "\x1b"}
    assert lines[0] == "compensate  layer 0/3"
    assert re.fullmatch(r"compensate  layer 1/3  ETA \d+:\d\d", lines[1])
    assert re.fullmatch(r"compensate  layer 3/3  took \d+:\d\d", lines[-1]) and len(lines) == 5


def test_what_is_quick_writes_nothing_into_a_log(monkeypatch):
    assert shown(monkeypatch, io.StringIO()) == ""


def test_a_log_has_a_line_of_what_hangs_before_its_first_unit(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "START_SECONDS", 0.01)
    with progress_bar(3, "compensate", "layer") as bar:
        bar._screen._timer.join()
        assert stream.getvalue() == "compensate  layer 0/3\n"
    assert stream.getvalue().endswith("layer 0/3  took 0:00\n")


def test_lines_of_a_log_are_half_a_minute_apart(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "START_SECONDS", 0.0)
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress_bar(100, "distill", "step") as bar:
        for _ in range(100):
            now[0] += 1.0
            bar.update()
    steps = re.findall(r"step (\d+)/100", stream.getvalue())
    assert steps == ["0", "30", "60", "90", "100"]
    assert "step 30/100  ETA 1:10\n" in stream.getvalue() and stream.getvalue().endswith("took 1:40\n")


def test_a_dumb_terminal_is_a_log(monkeypatch, every):
    monkeypatch.setenv("TERM", "dumb")
    text = shown(monkeypatch, Terminal())
    assert not set(text) & {"\r", "\x1b"} and text.count("\n") == 5


def test_what_fails_says_where_it_stopped(monkeypatch, every):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with pytest.raises(SystemExit), progress_bar(3, "compensate", "layer") as bar:
        bar.update()
        raise SystemExit
    assert re.fullmatch(r"compensate  layer 1/3  stopped after \d+:\d\d", stream.getvalue().splitlines()[-1])


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_other_processes_and_hidden_ones_show_nothing(monkeypatch, every, stream):
    assert shown(monkeypatch, stream(), show=False) == ""
    with hidden(True), hidden(False):
        assert shown(monkeypatch, stream()) == ""
    assert shown(monkeypatch, stream()) != ""


def test_names_of_another_make_no_marks(monkeypatch, every):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar(1, "to a\rb\x1b[2K\nc.nemo", "B"):
        pass
    assert stream.getvalue().splitlines()[0].startswith(r"to a\rb\x1b[2K c.nemo  0.0/1.0 B")


def test_a_stage_of_a_run_says_its_number_and_what_is_left_of_all(monkeypatch, every):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress.time, "time", lambda: 1000.0)
    RunPlace(12, 16, "distill", "distill", 1060.0, 30.0).hand_over()
    with progress_bar(3, "distill", "step"):
        pass
    with progress_bar(3, "teacher, train", "sample"):
        pass
    RunPlace(12, 16, "distill", "distill", None, None).hand_over()
    with progress_bar(3, "distill", "step"):
        pass
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[12/16] distill  step 0/3  recipe ETA 1:30"
    assert lines[2] == "[12/16] distill  teacher, train  sample 0/3  recipe ETA 1:30"
    assert lines[4] == "[12/16] distill  step 0/3"


# ------------------------------------------------------------------------------------------------------- a terminal


@pytest.mark.parametrize("width", [12, 40, 80, 120])
def test_a_terminals_line_fits(monkeypatch, every, width):
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar(2000, "distill", "step") as bar:
        bar.figures = [Part("loss 1.2345", LOSS)]
        bar.now = "validating 1/2"
        for _ in range(2):
            bar.update()
    found = states(stream.getvalue())
    assert len(found) >= 3 and all(len(state) < width for state in found)
    assert all(re.fullmatch(r"distill(  [━─]+)?(  step [012]/2,000)?(  .*)?", state) for state in found)
    assert ("loss 1.2345" in found[1]) is (width >= 80) and ("step 1/2,000" in found[1]) is (width >= 40)
    assert ("─" in found[1]) is (width >= 80)
    (line,) = [line for line in screen(stream.getvalue()) if line]
    assert line.startswith("distill")


PRINTS = """
import logging, os, sys
handler = logging.StreamHandler()
logging.getLogger("deep").addHandler(handler)
from nemo_minitron.jobs import progress
progress.REDRAW_SECONDS = 0.0
with progress.progress_bar(4, "distill", "step") as bar:
    bar.update()
    print("a line of stdout, " + "long " * 30)
    bar.update()
    print("minitron: a notice", file=sys.stderr)
    logging.getLogger("deep").error("of a logger")
    bar.update()
    print("no end", end="")
print("after", file=sys.stderr)
logging.getLogger("deep").error("of a logger, after")
"""


def test_what_is_printed_meanwhile_stands_above_the_line(tmp_path):
    code, text = in_terminal(["-c", PRINTS], 80)
    assert code == 0, text
    lines = [line for line in screen(text) if line]
    assert lines[:4] == ["a line of stdout, " + "long " * 29 + "long", "minitron: a notice", "of a logger", "no end"]
    assert re.fullmatch(r"distill  step 3/4  took \d:\d\d", lines[4]) and lines[5:] == ["after", "of a logger, after"]
    assert "\x1b[?25l" not in text, "the cursor is never hidden"


def test_what_goes_elsewhere_stays_there(tmp_path):
    program = PRINTS.replace("import logging, os, sys", "import logging, os, sys; sys.stdout = open('out', 'w')")
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        code, text = in_terminal(["-c", program], 80, PYTHONPATH=here)
    finally:
        os.chdir(here)
    assert code == 0, text
    assert (tmp_path / "out").read_text() == "a line of stdout, " + "long " * 30 + "\nno end"
    assert "stdout" not in text


@pytest.mark.parametrize(
    ("environment", "codes"), [({}, {"K", "m"}), ({"NO_COLOR": "1"}, {"K"}), ({"TERM": "dumb"}, set())]
)
def test_colours_and_codes(environment, codes):
    code, text = in_terminal(["-c", PRINTS], 100, **environment)
    assert code == 0, text
    assert {found[2] for found in CODE.finditer(text)} == codes


def test_an_error_is_not_glued_to_the_line():
    program = PRINTS.replace('print("no end", end="")', "raise ValueError('wrong')")
    code, text = in_terminal(["-c", program], 80)
    lines = [line for line in screen(text) if line]
    assert code == 1 and lines[-1] == "ValueError: wrong"
    stopped = next(number for number, line in enumerate(lines) if "stopped after" in line)
    assert lines[stopped].startswith("distill") and lines[stopped + 1].startswith("Traceback")


def test_progress_imports_no_rich_for_a_log():
    program = "import sys, nemo_minitron.jobs.progress as p\nwith p.Progress(1, 'a', 'b'): print('rich' in sys.modules)"
    code, text = in_terminal(["-c", program], 80, TERM="dumb")
    assert (code, text.strip()) == (0, "False")


def test_stop_is_heard_once(monkeypatch, every):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    line = Progress(1, "distill", "step")
    line.start()
    line.stop()
    line.stop(failed=True)
    assert stream.getvalue().count("took") == 1 and "stopped" not in stream.getvalue()
    assert sys.stderr is stream
