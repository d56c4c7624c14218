"""NeMo Framework Launcher: what it writes is what our commands take, and our stages run in it.

The second half needs the launcher, which no package index has: NEMO_LAUNCHER_PATH names a checkout of
NVIDIA/NeMo-Framework-Launcher, NEMO_LAUNCHER_PYTHON an interpreter with its requirements (this one if unset).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_minitron.config.compose import Source, compose

ROOT = Path(__file__).parents[1]
INTEGRATION = ROOT / "integrations" / "nemo_launcher"
CHOICES = {"importance": "llama3_1_8b", "prune": "minitron_4b_width", "distill": "minitron_4b_width"}
TEACHER = {"importance": "restore_from_path", "prune": "restore_from_path", "distill": "kd_teacher_restore_from_path"}


def check(stage: str, source: Source, results: Path) -> None:
    """The command's config from a file of the launcher's, which also has its section ``run``."""
    cfg = compose(stage, source=source)
    assert cfg.model[TEACHER[stage]] == "/teacher.nemo" and cfg.run.time_limit
    if stage == "prune":
        assert cfg.prune.ffn_hidden_size == 9216 and cfg.prune.scores == f"{results}/llama3_1_8b_importance/scores"
        assert cfg.export.save_path == f"{results}/minitron_4b_width_prune/minitron_4b_width.nemo"
    elif stage == "distill":
        assert cfg.model.restore_from_path == f"{results}/minitron_4b_width_prune/minitron_4b_width.nemo"
        assert cfg.model.data.data_prefix.train == [1.0, "/data/train_text_document"]
        assert (cfg.trainer.devices, cfg.model.tensor_model_parallel_size) == (8, 8)
    else:
        assert cfg.output_path == f"{results}/llama3_1_8b_importance/scores"


@pytest.mark.parametrize("stage", CHOICES)
def test_a_file_as_the_launcher_writes_it_is_taken(stage, tmp_path):
    """The launcher resolves a stage's section within its whole config and saves it, ``run`` included."""
    whole = OmegaConf.create({"base_results_dir": str(tmp_path), "data_dir": "/data"})
    whole[stage] = OmegaConf.load(INTEGRATION / "conf" / stage / "llama" / f"{CHOICES[stage]}.yaml")
    whole[stage].model[TEACHER[stage]] = "/teacher.nemo"
    OmegaConf.resolve(whole)
    OmegaConf.save(whole[stage], tmp_path / "job_hydra.yaml")
    check(stage, Source(path=str(tmp_path), name="job_hydra.yaml"), tmp_path)


LAUNCHER = os.environ.get("NEMO_LAUNCHER_PATH")


@pytest.mark.skipif(not LAUNCHER, reason="NEMO_LAUNCHER_PATH names no checkout of NVIDIA/NeMo-Framework-Launcher")
@pytest.mark.parametrize("cluster", ["bcm", "interactive"])
def test_our_stages_run_in_the_launcher(cluster, tmp_path):
    command = [
        os.environ.get("NEMO_LAUNCHER_PYTHON", sys.executable), str(INTEGRATION / "minitron_launcher.py"),
        f"launcher_scripts_path={LAUNCHER}/launcher_scripts", f"cluster_type={cluster}", "data_dir=/data",
        f"base_results_dir={tmp_path}", "stages=[importance,prune,distill]",
        *(f"{stage}=llama/{choice}" for stage, choice in CHOICES.items()),
        *(f"{stage}.model.{key}=/teacher.nemo" for stage, key in TEACHER.items()),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        env=os.environ | {"NEMO_LAUNCHER_DEBUG": "True"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    start = {"bcm": "python3 -u", "interactive": "torchrun --nproc_per_node={}"}[cluster]
    for stage, choice in CHOICES.items():
        folder = tmp_path / f"{choice}_{stage}"
        name = f"nemo-megatron-{choice}_{stage}" if cluster == "bcm" else f"{choice}_{stage}"
        script = (folder / f"{name}_submission.sh").read_text()
        devices = 1 if stage == "prune" else 8
        words = [*start.format(devices).split(), "-m", "nemo_minitron", stage]
        words += [f"--config-path={folder}", f"--config-name={name}_hydra.yaml"]
        assert " ".join(words) in " ".join(script.replace("\\\n", " ").split())
        assert ("srun" in script) == (cluster == "bcm") and f"export PYTHONPATH={ROOT}:" in script
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        check(stage, Source(path=str(folder), name=f"{name}_hydra.yaml"), tmp_path)
