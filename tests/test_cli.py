"""The command line: what help costs, what is dispatched, how processes are started, how errors leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_minitron import __version__, cli
from nemo_minitron.config.keys import keys
from nemo_minitron.config.schema import COMMANDS, ConvertConfig
from nemo_minitron.config.sections import Tokenizer
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs import launch
from nemo_minitron.jobs.processes import Place, place, slurm_rendezvous


@pytest.fixture
def stage(monkeypatch):
    """Stand in for a stage module; the configs it was given."""
    calls: list[Any] = []

    def install(command: str, run=calls.append):
        monkeypatch.setitem(sys.modules, f"nemo_minitron.stages.{command}", types.SimpleNamespace(run=run))
        return calls

    return install


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


CONVERT = ["convert", "input_name_or_path=a", "output_path=b"]
EVALUATE = ["evaluate", "model.restore_from_path=.", "evaluate.data_prefix=d", "output_path=o"]


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)


# ----------------------------------------------------------------------------------------------------------- help


def test_help_names_every_command():
    result = python("-m", "nemo_minitron", "--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["distill", "-h"], ["--version"]])
def test_help_imports_the_standard_library_alone(arguments):
    heavy = ["torch", "numpy", "hydra", "omegaconf", "yaml", "megatron", "nemo", "transformers", "lightning", "rich"]
    code = (
        "import sys; from nemo_minitron.cli import main; "
        f"assert main({arguments!r}) == 0; sys.exit(str([m for m in {heavy!r} if m in sys.modules] or ''))"
    )
    result = python("-c", code)
    assert not result.stderr.strip(), result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_command_help_lists_every_key(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())  # as it is before it is folded
    for name, _, _, metadata in keys(COMMANDS[command]):
        assert name in text and metadata["help"] in text
    if command == "distill":
        assert "kd_teacher_restore_from_path" in text and "warmup_steps" in text


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_no_command_shows_usage_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: minitron COMMAND" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["distil"], "Did you mean 'distill'?"),
        (["convert", "input_name_or_pth=a"], "Did you mean 'input_name_or_path'?"),
        (["convert", "--confg-path=x"], "Did you mean '--config-path'?"),
        (["convert", "--config-path"], "--config-path needs a value"),
        (["convert", "--cfg", "hydra"], "--cfg: expected job"),
    ],
)
def test_user_errors_are_one_line_and_status_2(arguments, expected, capsys):
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert expected in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err


def test_a_stage_error_is_status_2_and_names_the_rank(stage, capsys, monkeypatch):
    def fail(cfg):
        raise MinitronError("key: expected 1, found 2")

    stage("convert", fail)
    assert cli.main(CONVERT) == 2
    assert capsys.readouterr().err == "minitron: key: expected 1, found 2\n"
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(CONVERT) == 2
    assert capsys.readouterr().err == "minitron: [rank 3] key: expected 1, found 2\n"


@pytest.mark.parametrize(("status", "left"), [(0, True), (2, False)])
def test_a_process_leaves_its_groups_when_its_work_is_done(monkeypatch, status, left):
    import torch.distributed as dist

    calls = []
    monkeypatch.setattr(cli, "main", lambda: status)
    monkeypatch.setattr(cli.lifeline, "hold", lambda: None)  # this process is to stay as it is
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("left"))
    assert cli.console() == status
    assert calls == ["left"] * left


@pytest.mark.parametrize(("keys", "lines"), [([], 2), (["+trainer.enable_progress_bar=false"], 0)])
def test_progress_is_switched_off_in_any_command(stage, monkeypatch, capsys, keys, lines):
    from nemo_minitron.jobs import progress

    def run(cfg):
        with progress.progress_bar(1, "evaluate", "batch"):
            pass

    monkeypatch.setattr(progress, "START_SECONDS", 0.0)
    stage("evaluate", run)
    assert cli.main([*EVALUATE, *keys]) == 0
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_interrupt_is_status_130(stage):
    def interrupt(cfg):
        raise KeyboardInterrupt

    stage("convert", interrupt)
    assert cli.main(CONVERT) == 130


def test_sigterm_unwinds_the_stage(stage):
    """So that what it was writing is removed; then the process is as it was."""
    left, before = [], signal.getsignal(signal.SIGTERM)

    def end(cfg):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            left.append("clean")

    stage("convert", end)
    with pytest.raises(SystemExit) as ended:
        cli.main(CONVERT)
    assert ended.value.code == 128 + signal.SIGTERM and left == ["clean"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_defects_keep_their_traceback(stage):
    def defect(cfg):
        raise ZeroDivisionError

    stage("convert", defect)
    with pytest.raises(ZeroDivisionError):
        cli.main(CONVERT)


# ------------------------------------------------------------------------------------------------------- dispatch


def test_dispatch_gives_the_stage_its_checked_config(stage):
    calls = stage("convert")
    assert cli.main([*CONVERT, "precision=bf16"]) == 0
    assert isinstance(calls[0], ConvertConfig) and isinstance(calls[0].tokenizer, Tokenizer)
    assert calls[0].precision == "bf16" and calls[0].verify is False


def test_config_flags_are_nemo_launchers(stage, tmp_path):
    calls = stage("convert")
    (tmp_path / "job_hydra.yaml").write_text("input_name_or_path: a\noutput_path: b\nrun: {name: job}\n")
    assert cli.main([f"--config-path={tmp_path}", "convert", "--config-name", "job_hydra.yaml", "precision=16"]) == 0
    assert (calls[0].input_name_or_path, calls[0].precision) == ("a", "16")


def test_cfg_job_prints_and_runs_nothing(stage, capsys):
    calls = stage("convert")
    assert cli.main(["convert", "--cfg", "job", "output_path=b"]) == 0
    assert not calls
    shown = OmegaConf.create(capsys.readouterr().out)
    assert shown.output_path == "b" and OmegaConf.is_missing(shown, "input_name_or_path")


# ------------------------------------------------------------------------------------------------------ processes


@pytest.fixture
def launched(monkeypatch):
    """What would be started: (processes, command line)."""
    calls: list[tuple[int, list[str]]] = []

    def record(processes, argv):
        calls.append((processes, argv))
        return 7

    monkeypatch.setattr(launch, "launch", record)
    return calls


def test_several_devices_start_processes(stage, launched):
    calls = stage("evaluate")
    assert cli.main([*EVALUATE, "trainer.devices=2"]) == 7
    assert launched == [(2, [*EVALUATE, "trainer.devices=2", "++trainer.devices=2"])]
    assert not calls


TORCHRUN = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
SRUN = {
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "16",
}  # fmt: skip
LAUNCHERS = pytest.mark.parametrize("environment", [TORCHRUN, SRUN], ids=["torchrun", "srun"])


@LAUNCHERS
@pytest.mark.parametrize("asked", [[], ["trainer.devices=8", "trainer.num_nodes=2"], ["trainer.devices=auto"]])
def test_under_a_launcher_the_stage_runs_here_on_its_grid(stage, launched, monkeypatch, environment, asked):
    calls = stage("evaluate")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place() == Place(rank=9, local_rank=1, world_size=16, local_world_size=8)
    assert cli.main([*EVALUATE, *asked]) == 0
    assert (calls[0].trainer["devices"], calls[0].trainer["num_nodes"]) == (8, 2) and not launched


@LAUNCHERS
@pytest.mark.parametrize("asked", ["trainer.devices=4", "trainer.num_nodes=3"])
def test_a_grid_that_the_launcher_did_not_start(stage, monkeypatch, environment, asked, capsys):
    calls = stage("evaluate")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main([*EVALUATE, asked]) == 2
    assert f"{asked}, but the launcher started" in capsys.readouterr().err and not calls


def test_the_shell_of_an_allocation_is_no_task(stage, launched, monkeypatch):
    """There SLURM_NTASKS says what could be started; waiting for so many ranks would be waiting for ever."""
    stage("evaluate")
    for name, value in {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert place() is None
    assert cli.main([*EVALUATE, "trainer.devices=8"]) == 7


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node07", "node07"),
        ("node[007-012,20],x", "node007"),
        ("a,b[1-2]", "a"),
        ("n[3]", "n3"),
        ("n-1-[04,06]", "n-1-04"),
    ],
)
def test_slurm_rendezvous(nodes, host):
    assert slurm_rendezvous({"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "123456"}) == (host, 18456)


def test_auto_devices_without_cuda_is_one_process(stage, launched, monkeypatch):
    import torch

    calls = stage("evaluate")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli.main([*EVALUATE, "trainer.devices=auto"]) == 0
    assert calls[0].trainer["devices"] == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert cli.main([*EVALUATE, "trainer.devices=-1"]) == 7
    assert launched[0][0] == 4


@pytest.mark.parametrize(
    ("override", "expected"),
    [("trainer.devices=0", "at least 1"), ("trainer.devices=many", "number"), ("trainer.num_nodes=2", "torchrun")],
)
def test_impossible_devices(stage, launched, override, expected, capsys):
    calls = stage("evaluate")
    assert cli.main([*EVALUATE, override]) == 2
    assert expected in capsys.readouterr().err and not calls and not launched
