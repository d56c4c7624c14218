"""A command called from Python: what it is given, what it says, how it fails, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemo_minitron.api.process import call, nested
from nemo_minitron.errors import MinitronError

ROOT = Path(__file__).parents[2]


def test_dotted_keys_become_a_tree():
    assert nested({"a.b.c": 1, "a.b.d": [2], "e": None}) == {"a": {"b": {"c": 1, "d": [2]}}, "e": None}


def test_a_mapping_adds_to_what_is_there_and_is_left_as_it_is():
    """Else ``settings={"trainer": {"precision": "bf16"}}`` would throw ``max_steps=`` away, and the default be run."""
    given = {"trainer": {"precision": "bf16", "b.c": 2}, "data": {"train": [1]}, "empty": {}}
    values = {"trainer.max_steps": 5, "trainer.precision": 32, "data": None, **given, "trainer.b.d": 3}
    expected = {"max_steps": 5, "precision": "bf16", "b": {"c": 2, "d": 3}}
    assert nested(values) == {"trainer": expected, "data": {"train": [1]}, "empty": {}}
    assert given == {"trainer": {"precision": "bf16", "b.c": 2}, "data": {"train": [1]}, "empty": {}}
    with pytest.raises(MinitronError, match=r"'b' above it has a value, 1"):
        nested({"a": {"b": 1, "b.c": 2}})


def test_a_key_below_a_value_is_refused():
    with pytest.raises(MinitronError, match=r"a\.b\.c: 'b' above it has a value, 1"):
        nested({"a.b": 1, "a.b.c": 2})


def test_what_a_user_can_mend_is_raised_as_such(tmp_path):
    with pytest.raises(
        MinitronError, match=r"^model\.restore_from_path: expected .*, found nothing at .*/ü 'x'\.nemo$"
    ):
        call("prune", {"model.restore_from_path": tmp_path / "ü 'x'.nemo", "export.save_path": tmp_path / "s.nemo"})
    assert list(tmp_path.iterdir()) == []


def test_settings_win_and_an_unknown_one_is_refused_by_name():
    with pytest.raises(MinitronError, match=r"'model\.optim\.lrr'.*Did you mean 'model\.optim\.lr'"):
        call("distill", {"model.optim.lr": 1e-3}, {"model.optim.lrr": 1e-4})
    printed = call("distill", {"model.optim.lr": 1e-3, "seed": None}, {"model.optim.lr": 2e-5}, ["--cfg=job"])
    assert "lr: 2.0e-05" in printed and "seed: 1234" in printed


def test_quiet_unless_asked(capfd):
    printed = call("convert", {}, words=["--cfg=job"])
    assert printed and capfd.readouterr() == ("", "")
    assert call("convert", {}, words=["--cfg=job"], verbose=True) == printed
    assert capfd.readouterr() == (printed, "")


def test_another_failure_shows_its_last_lines(tmp_path):
    extension = tmp_path / "broken.py"
    extension.write_text("raise ZeroDivisionError('by nothing')")
    with pytest.raises((RuntimeError, MinitronError), match="by nothing"):
        call("importance", {"extensions": [extension]})


def test_an_interrupt_ends_the_command_before_the_call(tmp_path):
    """SIGINT reaches the caller alone; the child is told to end and is waited for."""
    started, extension = tmp_path / "started", tmp_path / "slow.py"
    extension.write_text(f"import os, time\nopen({str(started)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n")
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's background ignores it
        f"from nemo_minitron.api.process import call; call('importance', {{'extensions': [{str(extension)!r}]}})"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 120
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    caller.send_signal(signal.SIGINT)
    _, said = caller.communicate(timeout=60)
    assert b"KeyboardInterrupt" in said and caller.returncode != 0
    assert not Path(f"/proc/{started.read_text()}").exists()


def test_from_a_thread():
    """Servers and some notebooks call from one."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(call("convert", {}, words=["--cfg=job"])))
    thread.start()
    thread.join()
    assert "input_name_or_path" in found[0]
