"""The commands with transformers 5 installed, where NeMo 2.4 by itself cannot be imported, against this environment's.

As in ``test_megatron_versions``, the other release is in an environment of its own, before this one's packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from nemo_minitron.checkpoint import NemoReader

ROOT = Path(__file__).parents[1]
STREAM = ["importance.stream=true", "calibration.num_samples=16", "calibration.seq_length=64"]


@pytest.fixture(scope="module")
def newest(tmp_path_factory) -> Path:
    """Interpreter of an environment with the newest transformers 5; skips where no package index has it."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "path.pth").write_text("\n".join([str(ROOT), *others]) + "\n")
    python = venv / "bin" / "python"
    # what it needs and is not here already goes into the environment as well; what is here is left as it is
    pip = subprocess.run(
        [python, "-m", "pip", "install", "-q", "transformers>=5,<6"], capture_output=True, text=True, env=_environment()
    )
    if pip.returncode:
        pytest.skip(f"no transformers 5: {pip.stderr.strip().splitlines()[-1]}")
    show = "import transformers as t, nemo_minitron as n; print(t.__version__, t.__file__, n.__file__)"
    version, theirs, ours = subprocess.run(
        [python, "-c", show], cwd="/", check=True, stdout=subprocess.PIPE, text=True, env=_environment()
    ).stdout.split()
    assert version.startswith("5.") and theirs.startswith(f"{packages}/")
    assert Path(ours).parent == ROOT / "nemo_minitron"
    return python


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _journey(python: Path, folder: Path) -> Path:
    """Every command but `search`: the tiny recipe, which ends with the report, and scores by streaming."""
    run = folder / "run"
    for arguments in (
        ["run", "recipe=tiny", f"run_dir={run}"],
        [
            "importance",
            f"model.restore_from_path={run}/converted.nemo",
            f"output_path={run}/streamed",
            f"calibration.data_prefix={run}/data/train_text_document",
            *STREAM,
        ],
    ):
        command = [str(python), "-m", "nemo_minitron", *arguments]
        done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return run


@pytest.mark.slow
def test_every_stage_gives_the_same_with_transformers_5(newest, tmp_path):
    for name in ("here", "newest"):
        (tmp_path / name).mkdir()
    here = _journey(Path(sys.executable), tmp_path / "here")
    there = _journey(newest, tmp_path / "newest")

    for name in ("converted", "corrected", "pruned", "distilled"):
        fingerprints = []
        for run in (here, there):
            with NemoReader(run / f"{name}.nemo") as reader:
                fingerprints.append(reader.fingerprint())
        assert fingerprints[0] == fingerprints[1], name
    scores = [np.load(run / "streamed" / "arrays.npz") for run in (here, there)]
    assert set(scores[0].files) == set(scores[1].files)
    for name in scores[0].files:
        np.testing.assert_array_equal(scores[0][name], scores[1][name], err_msg=name)
    losses = [json.loads((run / "metrics.json").read_text()) for run in (here, there)]
    for role in ("teacher", "pruned", "distilled"):
        assert losses[1][role]["val_loss"] == pytest.approx(losses[0][role]["val_loss"], abs=1e-6)
    exports = [load_file(run / "hf" / "model.safetensors") for run in (here, there)]
    assert exports[0].keys() == exports[1].keys()
    assert all(exports[0][name].equal(exports[1][name]) for name in exports[0])
    for name in ("config.json", "tokenizer.json"):
        assert json.loads((here / "hf" / name).read_text()) == json.loads((there / "hf" / name).read_text())
    assert "What is not here" not in (there / "report.html").read_text()
