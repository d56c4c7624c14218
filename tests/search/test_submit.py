"""A search as one Slurm job: what it asks for, that a requeued one goes on, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_minitron import cli
from nemo_minitron.config.compose import Source, compose
from nemo_minitron.recipe.submit import JOBS
from tests.jobs.slurm import on_path
from tests.search.test_rounds import run, source, stages  # noqa: F401  # fixtures

SEARCH = ["scores=scores", "output_path=found", "budget.num_parameters=65e3"]
WEIGHTS = [
    "model.restore_from_path=teacher.nemo", "evaluate.data_prefix=validation",
    "model.data.data_prefix={train:[1.0,train],validation:[validation]}",
]  # fmt: skip
SMALL = [
    "search.probes=[0.3]", "search.measure=4", "search.validate=3", "search.distill_steps=4", "search.min_fraction=0.5",
]  # fmt: skip

PYTHON = """\
#!{python}
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import pytest
from nemo_minitron.config import compose as composing
from nemo_minitron.recipe import walk
from tests.search.test_rounds import Stages, plain

stages = Stages(pytest.MonkeyPatch(), "teacher.nemo")
launch, left = walk._launch, int(Path("left").read_text())

def counted(argv, log):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGTERM)  # as Slurm ends a job
    with open("ran", "a") as ran:
        ran.write(argv[4].removesuffix(".yaml") + "\\n")
    return launch(argv, log)

walk._launch, compose = counted, composing.compose
composing.compose = lambda *given, **more: (plain if "config" in more else compose)(*given, **more)
sys.argv = sys.argv[3:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""
"""An interpreter for jobs, whose stages are those of the other tests; the job ends before stage ``left`` + 1."""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    return on_path(tmp_path / "bin", monkeypatch)


def dry(capsys, *words: str) -> list[str]:
    """Lines of the script."""
    words = ("search", *SEARCH, *WEIGHTS, "+cluster=slurm", "cluster.dry_run=true", *words)
    assert cli.main([*words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


def execute(script: Path) -> subprocess.CompletedProcess[str]:
    """Run the job as Slurm would, with one task."""
    subprocess.run(["bash", "-n", str(script)], check=True)
    env = {"SLURM_JOB_NODELIST": "node07", "SLURM_JOB_ID": "101", "SLURM_NTASKS": "1", "SLURM_CPUS_PER_TASK": "1"}
    return subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False, env=os.environ | env)


# --------------------------------------------------------------------------------------------------------- the script


def test_one_task_with_gpus_and_cores_for_the_processes_of_its_stages(slurm, home, capsys):
    lines = dry(capsys, "trainer.devices=4", "cluster.partition=gpu", "cluster.time_limit=12:00:00", "cluster.mem=90G")
    for line in ("nodes=1", "ntasks-per-node=1", "cpus-per-task=4", "gpus-per-node=4", "job-name=minitron-search",
                 "partition=gpu", "time=12:00:00", "mem=90G"):  # fmt: skip
        assert f"#SBATCH --{line}" in lines
    assert any(line.startswith("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK") for line in lines)
    assert lines[-1].split() == [
        sys.executable, "-u", "-m", "nemo_minitron", "search", f"--config-path={home}/slurm",
        "--config-name=minitron-search.yaml",
    ]  # fmt: skip
    assert not slurm.calls("sbatch") and not (home / "found").exists()


def test_the_job_runs_what_was_submitted(slurm, home, capsys):
    dry(capsys, *SMALL, "trainer.devices=2", "search.serving.fp8=true", "~exp_manager.name")
    again = compose("search", ["~exp_manager.name"], Source(path=str(home / "slurm"), name="minitron-search.yaml"))
    words = [*SEARCH, *WEIGHTS, *SMALL, "trainer.devices=2", "search.serving.fp8=true", "~exp_manager.name"]
    assert again == compose("search", words) and "cluster" not in again


def test_processes_of_the_cluster_are_those_of_the_stages(slurm, home, capsys):
    lines = dry(capsys, "cluster.ntasks_per_node=8", "cluster.gpus_per_node=0")
    assert "#SBATCH --cpus-per-task=8" in lines and "#SBATCH --ntasks-per-node=1" in lines
    assert not any("gpus-per-node" in line for line in lines)
    assert OmegaConf.load(home / "slurm" / "minitron-search.yaml").trainer.devices == 8
    lines = dry(capsys, "trainer.devices=auto", "cluster.gpus_per_node=2", "cluster.job_name=other")
    assert "#SBATCH --cpus-per-task=2" in lines and "#SBATCH --gpus-per-node=2" in lines


# ------------------------------------------------------------------------------------------------- requeued, and again


def test_a_requeued_job_goes_on_where_it_was(slurm, home, capsys, tmp_path, source, stages):  # noqa: F811
    """It ends with the very list of a search that nothing stopped, and starts no stage again but the last."""
    for file in source.iterdir():
        (home / file.name).symlink_to(file)
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable, root=str(Path(__file__).parents[2])))
    python.chmod(0o755)
    start = "words = sys.argv[1:]\nwhile words[0].startswith('--'): words.pop(0)\nos.execv(words[0], words)"
    slurm.install("srun", start)
    few = ["search.measure=2", "search.validate=2", "search.finalists=2"]
    words = [*SEARCH, *WEIGHTS, *SMALL, *few, "+cluster=slurm", "cluster.python=../python"]
    assert cli.main(["search", *words]) == 0
    script = home / "slurm" / "minitron-search.sh"
    run(source, tmp_path / "unbroken", *few)
    before = 9
    (home / "left").write_text(str(before))
    done = execute(script)
    assert done.returncode == 143, done.stdout + done.stderr
    assert (home / "ran").read_text().split() == stages.ran[:before] and not (home / "found/candidates.yaml").exists()
    (home / "left").write_text("1000")
    done = execute(script)
    assert done.returncode == 0, done.stderr
    assert (home / "ran").read_text().split() == stages.ran, "what was done was not done again"
    assert (home / "found/candidates.yaml").read_text() == (tmp_path / "unbroken/candidates.yaml").read_text()


def test_a_job_that_waits_is_not_doubled(slurm, home, capsys):
    words = ["search", *SEARCH, *WEIGHTS, "+cluster=slurm"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith(f"submitted job 101: {home}/slurm/minitron-search.sh;")
    assert json.loads((home / "found" / ".stages" / JOBS).read_text()) == {"search": "101"}
    slurm.install("squeue", "print('101 RUNNING')")
    assert cli.main([*words, "search.measure=3"]) == 2
    err = capsys.readouterr().err
    assert "output_path: the search in found is job 101, RUNNING; wait for it, or scancel 101" in err
    assert len(slurm.calls("sbatch")) == 1 and len(list((home / "slurm").glob("*.sh"))) == 1
    assert cli.main([*words, "output_path=other"]) == 0, "another search may be"
    slurm.install("squeue", "")
    assert cli.main(words) == 0 and len(slurm.calls("sbatch")) == 3
    assert sorted(path.name for path in (home / "slurm").glob("*.sh")) == ["minitron-search-2.sh", "minitron-search.sh"]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trainer.num_nodes=2"], "trainer.num_nodes=2: expected 1, as `minitron search` starts the processes of its"),
        (["cluster.nodes=2"], "cluster.nodes=2: expected 1, as `minitron search`"),
        (["trainer.devices=auto"], "trainer.devices=auto: expected a number, as the machines of the job cannot be"),
        (["cluster.stages={distill: {mem: 1G}}"], "cluster.stages: `minitron search` has none"),
        (["cluster.time_limit=9"], "cluster.time_limit: expected"),
        (["cluster.partitoin=gpu"], "Did you mean 'cluster.partition'?"),
        (["search.measure=0"], "search.measure: expected at least 1, found 0"),
        (["evaluate.data_prefix=null"], "evaluate.data_prefix"),
        (["model.data.data_prefix=null"], "model.data.data_prefix is required for the distillations"),
    ],
)
def test_bad_values_submit_nothing(slurm, home, capsys, words, expected):
    assert cli.main(["search", *SEARCH, *WEIGHTS, "+cluster=slurm", *words]) == 2
    err = capsys.readouterr().err
    assert expected in err and len(err.splitlines()) == 1
    assert not list(home.iterdir()) and not slurm.calls("sbatch")


def test_a_folder_that_cannot_be_written_leaves_no_job(slurm, home, capsys):
    (home / "found").touch()
    assert cli.main(["search", *SEARCH, *WEIGHTS, "+cluster=slurm"]) == 2
    err = capsys.readouterr().err
    assert "output_path: expected a folder, cannot write found" in err and "(101) was cancelled" in err
    assert [call["argv"] for call in slurm.calls("scancel")] == [["scancel", "101"]]
