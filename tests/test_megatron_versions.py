"""What does not need NeMo, on later releases of Megatron-Core than the one that NeMo needs.

The tests named here run again in an environment that has this one's packages and, before them, another Megatron-Core:
an environment and not PYTHONPATH, so that every process that they start has it too. NeMo 2.4's model class itself
needs 0.13.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = [
    "tests/nemo/test_spec.py",  # layers: logits, gradients, key-value cache
    "tests/importance/test_collect.py",
    "tests/checkpoint/test_megatron.py",
    "tests/distill/test_fused.py::test_tensor_parallel_equals_dense",
    "tests/data/test_index.py",
    "tests/data/test_blocks.py",
    "tests/data/test_splits.py",
]


@pytest.fixture(scope="module", params=["0.14", "0.15", "0.16"])
def python(request, tmp_path_factory) -> Path:
    """Interpreter of an environment with the newest patch of a release; skips where no package index has it."""
    folder, venv = tmp_path_factory.mktemp(request.param), tmp_path_factory.mktemp("venv")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder)]
    pip = subprocess.run([*install, f"megatron-core=={request.param}.*"], capture_output=True, text=True)
    if pip.returncode:
        pytest.skip(f"no megatron-core {request.param}: {pip.stderr.strip().splitlines()[-1]}")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "path.pth").write_text("\n".join([str(folder), str(ROOT), *others]) + "\n")
    python = venv / "bin" / "python"
    show = "import megatron.core as m, nemo_minitron as n; print(m.__version__, m.__file__, n.__file__)"
    version, megatron, ours = subprocess.run(
        [python, "-c", show], cwd="/", check=True, stdout=subprocess.PIPE, text=True, env=_environment()
    ).stdout.split()
    assert version.startswith(f"{request.param}.") and megatron.startswith(f"{folder}/")
    assert Path(ours).parent == ROOT / "nemo_minitron"
    return python


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


@pytest.mark.slow
def test_what_does_not_need_nemo_runs_on_other_releases(python):
    run = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:]
    assert re.search(r"^\d+ passed in ", run.stdout, re.MULTILINE), run.stdout[-2000:]  # none was skipped
