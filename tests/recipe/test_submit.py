"""A run as a chain of jobs: each stage after those that it reads, with its own resources; what is done is left out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_minitron import cli
from nemo_minitron.config.compose import Source, compose
from nemo_minitron.recipe.submit import JOBS
from tests.jobs.slurm import Slurm, on_path

FILE = """
name: demo
order: [first, second, third]
settings: {devices: 2}
stages:
  first:
    command: convert
    config: {input_name_or_path: source, output_path: "${run_dir}/a.nemo"}
    inputs: [source]
    outputs: ["${run_dir}/a.nemo"]
  second:
    command: evaluate
    config:
      model: {restore_from_path: "${run_dir}/a.nemo"}
      evaluate: {data_prefix: text}
      trainer: {devices: "${recipe.settings.devices}"}
      output_path: ${run_dir}/b.json
    inputs: ["${run_dir}/a.nemo"]
    outputs: ["${run_dir}/b.json"]
  third:
    command: convert
    config: {input_name_or_path: source, output_path: "${run_dir}/c.nemo"}
    inputs: [source]
    outputs: ["${run_dir}/c.nemo"]
"""
PYTHON = """\
#!{python}
import os, runpy, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from omegaconf import OmegaConf
words = sys.argv[3:]
from nemo_minitron.recipe import walk

def stage(argv, log=None):
    folder, name = (word.partition("=")[2] for word in argv[1:3]) if "=" in argv[1] else argv[2::2]
    cfg = OmegaConf.load(Path(folder) / name)
    with open("ran", "a") as ran:
        ran.write(name.removesuffix(".yaml") + "\\n")
    if Path("fail").exists():
        return 3
    Path(cfg.output_path).write_text(name)
    return 0

if words[0] == "nemo_minitron" and words[1] != "run":
    sys.exit(stage(words[1:]))
walk._launch = stage
sys.argv = words
runpy.run_module(words[0], run_name="__main__")
"""
"""An interpreter for jobs whose stages write their output's name and no more."""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    (folder / "demo.yaml").write_text(FILE)
    (folder / "source").write_text("weights")
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable, root=str(Path(__file__).parents[2])))
    python.chmod(0o755)
    return folder


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    return on_path(tmp_path / "bin", monkeypatch)


def submit(*words: str) -> int:
    return cli.main(["run", "recipe=./demo.yaml", "run_dir=run", "+cluster=slurm", "cluster.python=../python", *words])


def jobs(slurm: Slurm) -> list[list[str]]:
    """Arguments of sbatch, scripts by their names."""
    return [
        [Path(word).stem if word.endswith(".sh") else word for word in c["argv"][2:]] for c in slurm.calls("sbatch")
    ]


def execute(slurm: Slurm, script: Path) -> subprocess.CompletedProcess[str]:
    """Run a job as Slurm would; srun starts one task, whatever the job has."""
    run = "words = sys.argv[1:]\nwhile words[0].startswith('--'): words.pop(0)\nos.execv(words[0], words)"
    slurm.install("srun", run)
    subprocess.run(["bash", "-n", str(script)], check=True)
    env = os.environ | {"SLURM_JOB_NODELIST": "node[07-08]", "SLURM_JOB_ID": "123456"}
    return subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False, env=env)


# ----------------------------------------------------------------------------------------------------- a whole recipe


def tiny(capsys, *words: str, recipe: str = "tiny") -> dict[str, list[str]]:
    """Lines of each script of a dry run."""
    assert cli.main(["run", f"recipe={recipe}", "+cluster=slurm", "cluster.dry_run=true", *words]) == 0
    parts = re.split(r"^==> (.+)\n", capsys.readouterr().out, flags=re.M)
    scripts = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert all(Path(path).read_text() == text[:-1] for path, text in scripts.items())
    return {Path(path).stem: text.splitlines() for path, text in scripts.items()}


def asked(lines: list[str]) -> dict[str, str]:
    found = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH")]
    return {key: value for key, _, value in found}


def test_each_stage_asks_for_what_it_uses(slurm, capsys):
    scripts = tiny(capsys, "recipe.settings.devices=4", "recipe.settings.workers=6", "cluster.partition=gpu")
    order = compose("run", ["recipe=tiny"]).recipe.order
    assert list(scripts) == [*order, "submit"] and not slurm.calls("sbatch")
    sizes = {name: asked(lines) for name, lines in scripts.items()}
    for name in ("finetune", "importance", "distill", "evaluate_pruned"):
        assert (sizes[name]["ntasks-per-node"], sizes[name]["gpus-per-node"]) == ("4", "4")
    for name in ("prune", "answers_teacher"):
        assert (sizes[name]["ntasks-per-node"], sizes[name]["gpus-per-node"]) == ("1", "1")
    for name in ("synthesize", "convert", "preprocess_train", "export", "report"):
        assert sizes[name]["ntasks-per-node"] == "1" and "gpus-per-node" not in sizes[name]
    assert sizes["preprocess_train"]["cpus-per-task"] == "6" and "cpus-per-task" not in sizes["convert"]
    assert all(sizes[name]["nodes"] == "1" and sizes[name]["kill-on-invalid-dep"] == "yes" for name in order)
    assert "# stage distill, after preprocess_train, preprocess_validation, finetune, prune" in scripts["distill"]


def test_a_recipe_of_eight_gpus_on_two_machines(slurm, capsys):
    Path("x").mkdir()
    distill = "recipe.stages.distill.config.trainer.num_nodes=2"
    scripts = tiny(capsys, "recipe.settings.source=x", distill, recipe="llama3_1_8b_width")
    sizes = {name: asked(lines) for name, lines in scripts.items()}
    assert (sizes["distill"]["nodes"], sizes["distill"]["gpus-per-node"]) == ("2", "8")
    assert (sizes["finetune"]["nodes"], sizes["finetune"]["ntasks-per-node"]) == ("1", "8")
    assert sizes["preprocess_train"]["cpus-per-task"] == "32"


def test_fewer_gpus_where_a_machine_has_none(slurm, capsys):
    scripts = tiny(capsys, "recipe.settings.devices=2", "cluster.gpus_per_node=0")
    assert not any("gpus-per-node" in asked(lines) for lines in scripts.values())
    scripts = tiny(capsys, "recipe.settings.devices=auto", "cluster.gpus_per_node=4", "cluster.job_name=other")
    sizes = {name: asked(lines) for name, lines in scripts.items()}
    assert sizes["distill"]["ntasks-per-node"] == sizes["distill"]["gpus-per-node"] == "4"
    assert sizes["prune"]["gpus-per-node"] == "1" and "gpus-per-node" not in sizes["convert"]


def test_keys_of_a_command_and_of_a_stage(slurm, capsys):
    few = "cluster.stages={preprocess: {partition: cpu}, preprocess_train: {time_limit: '1:00:00'}, distill: {mem: 9G}}"
    scripts = tiny(capsys, "cluster.partition=gpu", few)
    sizes = {name: asked(lines) for name, lines in scripts.items()}
    assert sizes["preprocess_train"]["partition"] == sizes["preprocess_validation"]["partition"] == "cpu"
    assert sizes["preprocess_train"]["time"] == "1:00:00" and "time" not in sizes["preprocess_validation"]
    assert sizes["distill"]["partition"] == "gpu" and sizes["distill"]["mem"] == "9G" and "mem" not in sizes["prune"]


def test_a_container_sees_the_runs_folder(slurm, capsys, tmp_path):
    scripts = tiny(capsys, "cluster.container_image=image.sqsh", f"run_dir={tmp_path}/elsewhere")
    (step,) = [line for line in scripts["convert"] if line.startswith("srun")]
    assert f"{tmp_path}/elsewhere:{tmp_path}/elsewhere" in step and "--container-image=image.sqsh" in step


def test_the_jobs_run_exactly_what_was_submitted(slurm, home, capsys):
    tiny(capsys, "recipe.settings.lr=3e-5", "~recipe.stages.export", "recipe.order=[synthesize,convert]")
    again = compose("run", source=Source(path=str(home / "slurm" / "minitron-tiny"), name="run.yaml"))
    assert "cluster" not in again and "export" not in again.recipe.stages
    words = ["recipe=tiny", "recipe.settings.lr=3e-5", "~recipe.stages.export", "recipe.order=[synthesize,convert]"]
    assert again == compose("run", words)


def test_what_is_written_submits_by_hand(slurm, home, capsys):
    assert submit("cluster.dry_run=true") == 0
    assert "not submitted, bash " in capsys.readouterr().err and not slurm.calls("sbatch")
    script = home / "slurm" / "minitron-demo" / "submit.sh"
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["job 101: first", "job 102: second", "job 103: third"]
    assert jobs(slurm) == [["first"], ["--dependency=afterok:101", "second"], ["third"]]
    slurm.number_jobs(refused_from=4)
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode and [call["argv"][1:] for call in slurm.calls("scancel")] == [["104"]]


# --------------------------------------------------------------------------------------------------------- submission


def test_jobs_wait_for_what_they_read(slurm, home, capsys):
    assert submit() == 0
    assert jobs(slurm) == [["first"], ["--dependency=afterok:101", "second"], ["third"]]
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["job", "102", "second", "2", "processes,", "2", "GPUs", "after", "101"]
    assert out[0].split() == ["job", "101", "first", "1", "process,", "no", "GPU"]
    folder = home / "slurm" / "minitron-demo"
    assert out[3] == f"submitted 3 jobs, scripts and output in {folder}; to cancel: scancel 101 102 103"
    assert json.loads((home / "run" / ".stages" / JOBS).read_text()) == {
        "first": "101",
        "second": "102",
        "third": "103",
    }
    assert {path.name for path in folder.iterdir()} == {"run.yaml", "submit.sh", "first.sh", "second.sh", "third.sh"}


def test_the_clusters_dependency_is_that_of_the_first(slurm):
    assert submit("cluster.dependency=afterany:7") == 0
    roots = "--dependency=afterany:7"
    assert jobs(slurm) == [[roots, "first"], ["--dependency=afterok:101", "second"], [roots, "third"]]


def test_what_is_done_is_not_submitted_again(slurm, home, capsys):
    assert submit() == 0
    for name in ("first", "second", "third"):
        done = execute(slurm, home / "slurm" / "minitron-demo" / f"{name}.sh")
        assert done.returncode == 0, done.stdout + done.stderr
    assert (home / "ran").read_text().split() == ["first", "second", "third"]
    assert OmegaConf.load(home / "run" / ".stages" / "second.yaml").trainer.devices == 2
    record = json.loads((home / "run" / ".stages" / "second.json").read_text())
    assert record["state"] == "done" and record["seconds"] >= 0 and not record["resumed"]
    capsys.readouterr()
    assert submit() == 0
    assert capsys.readouterr().out == "recipe demo: all 3 stages are up to date, nothing to submit\n"
    (home / "run" / "b.json").unlink()
    assert submit() == 0
    assert jobs(slurm)[3:] == [["second"]] and "up to date, not submitted: first, third" in capsys.readouterr().out
    assert [path.name for path in (home / "slurm").iterdir()] == ["minitron-demo"], "the scripts are the same"
    (home / "source").write_text("others")
    assert submit("stages=[first,second]") == 0
    assert jobs(slurm)[4:] == [["first"], ["--dependency=afterok:105", "second"]]
    assert submit("force=true", "stages=[second]") == 0 and jobs(slurm)[6:] == [["second"]]


def test_a_run_here_and_a_job_know_each_others_stages(slurm, home, capsys, monkeypatch):
    """A job that was submitted before a run did its work sees so, in either form."""
    assert submit() == 0
    for name in ("first", "second"):
        assert execute(slurm, home / "slurm" / "minitron-demo" / f"{name}.sh").returncode == 0
    again = execute(slurm, home / "slurm" / "minitron-demo" / "second.sh")
    assert again.returncode == 0 and again.stdout.startswith("second: up to date, skipped")
    again = execute(slurm, home / "slurm" / "minitron-demo" / "first.sh")
    assert again.returncode == 0 and "[1/1] first: up to date, skipped" in again.stdout
    from nemo_minitron.recipe import walk

    monkeypatch.setattr(walk, "_launch", lambda argv: pytest.fail("nothing is to run"))
    capsys.readouterr()
    assert cli.main(["run", "recipe=./demo.yaml", "run_dir=run", "stages=[first,second]"]) == 0
    assert capsys.readouterr().out.count("up to date, skipped") == 2


def test_a_stage_that_fails_is_told_and_taken_up_again(slurm, home):
    (home / "fail").touch()
    (home / "run").mkdir()
    (home / "run" / "a.nemo").write_text("first.yaml")
    assert submit() == 0
    script = home / "slurm" / "minitron-demo" / "second.sh"
    done = execute(slurm, script)
    assert done.returncode == 2 and "minitron: stage 'second' failed (minitron evaluate, exit status 3" in done.stderr
    assert json.loads((home / "run" / ".stages" / "second.json").read_text())["state"] == "started"
    (home / "fail").unlink()
    done = execute(slurm, script)
    assert done.returncode == 0 and "second: resuming minitron evaluate" in done.stdout
    assert json.loads((home / "run" / ".stages" / "second.json").read_text())["resumed"] is True


def test_a_refusal_leaves_no_job(slurm, capsys):
    slurm.number_jobs(refused_from=2)
    assert submit() == 2
    assert "the 2 jobs submitted before (101, 102) were cancelled" in capsys.readouterr().err
    assert [call["argv"] for call in slurm.calls("scancel")] == [["scancel", "101", "102"]]


def test_jobs_that_wait_are_not_doubled(slurm, capsys):
    assert submit() == 0
    slurm.install("squeue", "print('102 PENDING')")
    assert submit() == 2
    assert "stage 'second' of run is job 102, PENDING; wait for it, or scancel 102" in capsys.readouterr().err
    assert len(jobs(slurm)) == 3


def test_other_scripts_of_the_same_name_are_kept(slurm, home):
    assert submit() == 0 and submit("recipe.settings.devices=4") == 0
    folders = sorted(path.name for path in (home / "slurm").iterdir())
    assert folders == ["minitron-demo", "minitron-demo-2"]
    assert "--ntasks-per-node=2" in (home / "slurm" / "minitron-demo" / "second.sh").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cluster.nodes=2"], "cluster.nodes=2: a run takes machines and processes from each stage's"),
        (["cluster.ntasks_per_node=2"], "cluster.ntasks_per_node=2: a run takes"),
        (["cluster.stages={secnd: {mem: 1G}}"], "cluster.stages.secnd: there is no such stage"),
        (["cluster.stages={second: {memory: 1G}}"], "cluster.stages.second.memory: no key of a stage."),
        (["cluster.stages={second: {nodes: 2}}"], "cluster.stages.second.nodes: no key of a stage."),
        (["cluster.stages={second: 3}"], "cluster.stages.second: expected keys of cluster below it, found 3"),
        (
            ["cluster.stages={second: {exclusive: 3x}}"],
            "cluster.stages, for stage 'second': cluster.exclusive: expected",
        ),
        (["cluster.stages={second: {time_limit: 9}}"], "cluster.time_limit: expected"),
        (["cluster.partitoin=gpu"], "Did you mean 'cluster.partition'?"),
        (["recipe.settings.devices=auto"], "stage 'second': trainer.devices=auto: expected a number of at least 1"),
        (["recipe.settings.devices=no"], "stage 'second'"),
        (["recipe.stages.second.config.cluster.nodes=2"], "stage 'second': a stage of a recipe runs here"),
        (["stages=[secnd]"], "Did you mean 'second'"),
    ],
)
def test_bad_values_submit_nothing(slurm, home, capsys, words, expected):
    assert submit(*words) == 2
    err = capsys.readouterr().err
    assert expected in err and len(err.splitlines()) == 1
    assert not (home / "slurm").exists() and not slurm.calls("sbatch")


def test_an_absent_input_is_told_before_anything_is_submitted(slurm, home, capsys):
    (home / "source").unlink()
    assert submit() == 2
    assert "stage 'first': input source does not exist" in capsys.readouterr().err and not slurm.calls("sbatch")


def test_without_sbatch_nothing_is_written(home, capsys, monkeypatch):
    assert shutil.which("sbatch") is None, "this test is for machines without Slurm"
    assert submit() == 2
    assert "found no sbatch" in capsys.readouterr().err and not (home / "slurm").exists()


def test_a_stage_that_starts_its_own_processes_is_one_task(slurm, home, capsys):
    (home / "demo.yaml").write_text(FILE + "  fourth:\n    command: search\n    config: {scores: a, output_path: b}\n")
    four = ["recipe.order=[fourth]", "recipe.stages.fourth.config.trainer.devices=4"]
    assert submit(*four) == 0
    size = asked((home / "slurm" / "minitron-demo" / "fourth.sh").read_text().splitlines())
    assert [size[key] for key in ("nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node")] == ["1", "1", "4", "4"]
    assert submit(*four, "recipe.stages.fourth.config.trainer.num_nodes=2") == 2
    assert "stage 'fourth': trainer.num_nodes=2: expected 1, as `minitron search`" in capsys.readouterr().err
