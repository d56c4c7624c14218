"""Ctrl-C: a command unwinds, ends with 130 and says how to go on; nothing of it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from nemo_minitron import cli
from nemo_minitron.jobs.interruption import Interrupted, how_to_go_on, last_checkpoint, orderly_end
from tests.jobs.test_lifeline import Marked, commands  # noqa: F401  a fixture

CONVERT = ["convert", "input_name_or_path=a", "output_path=b"]


@pytest.fixture(autouse=True)
def in_the_foreground():
    """A shell has what it starts in the background, these tests too, ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_unwinds_a_command_and_says_how_to_go_on(monkeypatch, capsys):
    """Not as KeyboardInterrupt, which Lightning makes an exit of its own."""
    left = []

    def run(cfg):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            sys.exit(1)
        finally:
            left.append("tidied")

    monkeypatch.setitem(sys.modules, "nemo_minitron.stages.convert", types.SimpleNamespace(run=run))
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(CONVERT) == 130
    assert capsys.readouterr().err == (
        "\nminitron: interrupted; what it was to write is as it was before; the same command starts again\n"
    )
    assert left == ["tidied"] and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("rank", "said"), [("0", True), ("1", False)])
def test_one_rank_says_it(monkeypatch, capsys, rank, said):
    def run(cfg):
        raise Interrupted(130)

    monkeypatch.setitem(sys.modules, "nemo_minitron.stages.convert", types.SimpleNamespace(run=run))
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert cli.main(CONVERT) == 130
    assert ("interrupted" in capsys.readouterr().err) is said


def test_a_second_ctrl_c_ends_at_once():
    code = """
import os, signal
from nemo_minitron.jobs.interruption import orderly_end
with orderly_end():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        print("went on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr.startswith("minitron: interrupted again") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_python_drops_comes_again(number, capsys):
    """What a handler raises within a destructor, or within what runs at a fork, goes nowhere."""

    class Deaf:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    with pytest.raises(SystemExit) as ended, orderly_end():
        Deaf()
        for _ in range(200):
            time.sleep(0.05)
    assert ended.value.code == 128 + number and not capsys.readouterr().err


def test_sigint_stays_ignored_in_the_background():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with orderly_end():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_how_to_go_on(tmp_path):
    dated = tmp_path / "exp" / "distill" / "2026-01-01_00-00-00"
    for step in (5, 10, 15):
        (dated / "checkpoints" / f"distill-step={step}-last").mkdir(parents=True)
        os.utime(dated / "checkpoints" / f"distill-step={step}-last", (step, step))
    (dated / "checkpoints" / "distill-step=15-last-unfinished").touch()
    manager = {"exp_dir": str(tmp_path / "exp"), "name": "distill"}
    assert last_checkpoint(manager, since=0) == (dated, "10")
    assert how_to_go_on("distill", {"exp_manager": manager}, since=7) == (
        f"add exp_manager.resume_if_exists=true exp_manager.explicit_log_dir={dated} to go on from step 10 of {dated}"
    )
    assert how_to_go_on("distill", {"exp_manager": manager}, since=11).startswith("no checkpoint was saved")
    again = {"exp_manager": {"explicit_log_dir": str(dated), "resume_if_exists": True}}
    assert how_to_go_on("distill", again, since=11) == f"the same command goes on from step 10 of {dated}"
    assert how_to_go_on("run", {}, 0) == "the same command goes on from the stage that it was in"


# ------------------------------------------------------------------------------------------------------ real commands


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoints", "two ranks", "recipe", "recipe on two ranks", "preprocess"])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_command_is_interrupted(commands, tmp_path, name, terminal):  # noqa: F811
    """By a signal to the first process, or to its whole group, as a terminal sends it."""
    own = [f"run_dir={tmp_path}/run"] if "recipe" in name else [f"exp_manager.exp_dir={tmp_path}/exp"]
    job = Marked([*commands[name], *(own if name != "preprocess" else [])], start_new_session=True)
    while job.process.poll() is None and not begun(name, job, tmp_path):
        time.sleep(0.2)
    (os.killpg if terminal else os.kill)(job.process.pid, signal.SIGINT)
    output = job.process.communicate(timeout=90)[0]
    assert job.process.returncode == 130, output
    said = [line for line in output.splitlines() if line.startswith("minitron: interrupted; ")]
    assert len(said) == 1 and "Traceback" not in output, output
    assert not job.alive()


def begun(name: str, job: Marked, folder: Path) -> bool:
    if "recipe" in name:
        return (folder / "run/corrected.nemo").exists()
    if name == "preprocess":
        return len(job.alive()) >= 3  # multiprocessing has begun its servers
    return any(folder.glob("exp/**/*-last"))
