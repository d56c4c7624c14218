"""Slurm jobs: the script that is written, that bash runs it as meant, and that nothing is submitted twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_minitron import cli
from nemo_minitron.config.compose import CONF_DIR, Source, compose
from nemo_minitron.config.sections import Cluster
from tests.jobs.slurm import on_path

EVALUATE = ["evaluate", "model.restore_from_path=a.nemo", "evaluate.data_prefix=d", "output_path=o.json"]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    return on_path(tmp_path / "bin", monkeypatch, numbered=False)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return folder


def dry(capsys, *arguments: str) -> str:
    assert cli.main([*arguments, "+cluster=slurm", "cluster.dry_run=true"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def execute(script: Path) -> None:
    """Run a batch script as Slurm would on the first machine."""
    subprocess.run(["bash", "-n", str(script)], check=True)
    env = os.environ | {"SLURM_JOB_NODELIST": "node[07-08]", "SLURM_JOB_ID": "123456"}
    subprocess.run(["bash", str(script)], check=True, env=env)


# --------------------------------------------------------------------------------------------------------- script


def test_dry_run_prints_the_script_that_it_writes(slurm, home, capsys):
    text = dry(capsys, *EVALUATE, "trainer.devices=8", "trainer.num_nodes=2", "cluster.partition=gpu")
    assert text == (home / "slurm" / "minitron-evaluate.sh").read_text()
    assert not slurm.calls("sbatch")
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash" and "set -euo pipefail" in lines
    for line in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu"):
        assert f"#SBATCH {line}" in lines
    assert not any(word in text for word in ("--account", "--time", "--mem", "--exclusive", "--dependency"))


def test_every_key_reaches_the_script(slurm, capsys):
    text = dry(
        capsys, *EVALUATE, "cluster.nodes=3", "cluster.ntasks_per_node=4", "cluster.gpus_per_node=2",
        "cluster.account=acc", "cluster.time_limit=1-04:00:00", "cluster.job_name=mine", "cluster.exclusive=true",
        "cluster.mem=0", "cluster.dependency=afterok:17", "cluster.sbatch_args=['--qos=high']",
        "cluster.srun_args=['--mpi=pmix']", "cluster.python=/opt/python", "cluster.setup=[module load cuda]",
        "cluster.container_image=image.sqsh", "cluster.container_mounts=['/data:/data']",
    )  # fmt: skip
    for line in ("--nodes=3", "--ntasks-per-node=4", "--gpus-per-node=2", "--account=acc", "--time=1-04:00:00",
                 "--job-name=mine", "--exclusive", "--mem=0", "--dependency=afterok:17", "--qos=high"):  # fmt: skip
        assert f"#SBATCH {line}" in text.splitlines()
    assert "module load cuda" in text.splitlines() and "/opt/python -u -m nemo_minitron evaluate" in text
    assert "--mpi=pmix" in text and "--container-image=image.sqsh" in text and ",/data:/data" in text


def test_bash_runs_the_script_as_meant(slurm, home, capsys):
    greeting = """it's "two" $words `here` \\ * """
    overrides = ["~seed", "output_path='o ut $HOME.json'", "trainer.devices=2", "trainer.num_nodes=2"]
    quoted = greeting.replace("'", "\\'")
    environment = [f"cluster.env={{GREETING: '{quoted}'}}", "cluster.setup=['echo \"$UNSET\" > set_up']"]
    dry(capsys, *EVALUATE, *overrides, *environment, "cluster.srun_args=['--comment=a b']")
    execute(home / "slurm" / "minitron-evaluate.sh")
    assert (home / "set_up").is_file()
    (call,) = slurm.calls("srun")
    folder = home / "slurm"
    assert call["argv"] == [
        "srun", "--kill-on-bad-exit=1", "--comment=a b", sys.executable, "-u", "-m", "nemo_minitron", "evaluate",
        f"--config-path={folder}", "--config-name=minitron-evaluate.yaml", "~seed",
    ]  # fmt: skip
    assert call["env"] == {"MASTER_ADDR": "node07", "MASTER_PORT": str(15000 + 3456), "GREETING": greeting}


def test_the_job_runs_exactly_what_was_submitted_and_submits_nothing(slurm, home, capsys):
    overrides = [
        "model.restore_from_path='a b.nemo'", "model.kd_teacher_restore_from_path=t", "model.nemo_path=n", "name=x",
        "model.data.data_prefix={train:[1.0,a],validation:[b]}", "~exp_manager.checkpoint_callback_params.filename",
        "trainer.devices=4", "trainer.num_nodes=2", "model.optim.lr=3e-5",
    ]  # fmt: skip
    dry(capsys, "distill", *overrides)
    folder = home / "slurm"
    again = compose(
        "distill",
        ["~exp_manager.checkpoint_callback_params.filename"],
        Source(path=str(folder), name="minitron-distill.yaml"),
    )
    assert again == compose("distill", overrides) and "cluster" not in again


def test_the_grid_of_the_job_is_the_trainers(slurm, home, capsys):
    dry(capsys, *EVALUATE, "trainer.devices=auto", "cluster.gpus_per_node=8", "cluster.nodes=4")
    cfg = OmegaConf.load(home / "slurm" / "minitron-evaluate.yaml")
    assert (cfg.trainer.devices, cfg.trainer.num_nodes) == (8, 4)


def test_the_yaml_shows_the_schemas_defaults():
    file = CONF_DIR / "cluster" / "slurm.yaml"
    assert OmegaConf.load(file) == OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(Cluster)))


def test_commands_of_one_process_ask_for_no_gpu(slurm, capsys):
    text = dry(capsys, "convert", "input_name_or_path=a", "output_path=b")
    assert "#SBATCH --ntasks-per-node=1" in text and "gpus" not in text


# ----------------------------------------------------------------------------------------------------- submission


def test_submission_leaves_script_config_and_number(slurm, home, capsys):
    assert cli.main([*EVALUATE, "+cluster=slurm"]) == 0
    script = home / "slurm" / "minitron-evaluate.sh"
    assert capsys.readouterr().out.startswith(f"submitted job 4217: {script};")
    (call,) = slurm.calls("sbatch")
    assert call["argv"] == ["sbatch", "--parsable", str(script)]
    assert json.loads(script.with_suffix(".job").read_text())["job"] == "4217"
    assert sorted(path.name for path in script.parent.iterdir()) == [
        "minitron-evaluate.job", "minitron-evaluate.sh", "minitron-evaluate.yaml",
    ]  # fmt: skip


def test_a_waiting_job_keeps_its_files(slurm, home, capsys):
    for length in (64, 128, 128):
        assert cli.main([*EVALUATE, f"evaluate.seq_length={length}", "+cluster=slurm"]) == 0
    lengths = {path.stem: OmegaConf.load(path).evaluate.seq_length for path in (home / "slurm").glob("*.yaml")}
    assert lengths == {"minitron-evaluate": 64, "minitron-evaluate-2": 128}


def test_a_sites_own_cluster_file(slurm, home, capsys):
    (home / "conf" / "cluster").mkdir(parents=True)
    (home / "conf" / "cluster" / "site.yaml").write_text("partition: gpu\nmem: 0\n")
    assert cli.main([*EVALUATE, "--config-dir=conf", "+cluster=site", "cluster.dry_run=true"]) == 0
    assert "#SBATCH --partition=gpu" in capsys.readouterr().out


def test_without_sbatch_nothing_is_written(home, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main([*EVALUATE, "+cluster=slurm"]) == 2
    assert "found no sbatch" in capsys.readouterr().err and not (home / "slurm").exists()


def test_sbatchs_refusal_is_passed_on(slurm, capsys):
    slurm.install("sbatch", "sys.exit('sbatch: error: invalid partition specified: gpu')")
    assert cli.main([*EVALUATE, "+cluster=slurm", "cluster.partition=gpu"]) == 2
    err = capsys.readouterr().err
    assert "invalid partition specified: gpu" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("cluster.partitoin=gpu", "Did you mean 'cluster.partition'?"),
        ("cluster.nodes=many", "cluster.nodes: expected an integer"),
        ("cluster.nodes=0", "cluster.nodes: expected at least 1"),
        ("cluster.time_limit=14400", "cluster.time_limit: expected"),
        ("cluster.job_name='a b'", "cluster.job_name: expected"),
        ("cluster.job_name=interactive", "cluster.job_name: expected"),
        ("cluster.env={a-b: 1}", "cluster.env: expected names"),
        ("cluster.srun_args=[hostname]", "expected options, found 'hostname'"),
        ('cluster.partition="a\nb"', "expected one line"),
        ("trainer.devices=auto", "cluster.ntasks_per_node"),
        ("trainer.devices=zero", "trainer.devices: expected a number"),
    ],
)
def test_bad_values_write_nothing(slurm, home, capsys, override, expected):
    assert cli.main([*EVALUATE, "+cluster=slurm", override]) == 2
    assert expected in capsys.readouterr().err
    assert not (home / "slurm").exists() and not slurm.calls("sbatch")


def test_commands_of_one_process_refuse_a_grid(slurm, capsys):
    assert cli.main(["convert", "input_name_or_path=a", "output_path=b", "+cluster=slurm", "cluster.nodes=2"]) == 2
    assert "`minitron convert` runs in one process" in capsys.readouterr().err


def test_stages_are_for_runs(slurm, home, capsys):
    assert cli.main([*EVALUATE, "+cluster=slurm", "cluster.stages={distill: {mem: 1G}}"]) == 2
    assert "cluster.stages: `minitron evaluate` has none" in capsys.readouterr().err and not (home / "slurm").exists()


def test_nor_is_a_stage_of_a_recipe(slurm, capsys):
    assert cli.main(["run", "recipe=tiny", "recipe.stages.distill.config.cluster.nodes=2"]) == 2
    assert "stage 'distill'" in capsys.readouterr().err
