"""README's lines of Python run as they stand, pasted into an empty folder, on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA

ROOT = Path(__file__).parents[2]
SMALLER = {
    '"SmolLM2-135M.gguf"': '"source"',
    "seq_length=256": "seq_length=32",
    "num_samples=64": "num_samples=8",
    "ffn_hidden_size=1024": "ffn_hidden_size=64",
    "max_steps=60": "max_steps=2",
}


@pytest.mark.slow  # seven processes, of which four import NeMo
def test_the_lines_of_python_run(tmp_path):
    [code] = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    for words, tiny in SMALLER.items():
        assert words in code
        code = code.replace(words, tiny)
    make_llama(tmp_path / "source", GQA)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    loss, _, answer = result.stdout.partition(" ")
    assert 4 < float(loss) < 8 and answer.strip()
    with NemoReader(tmp_path / "teacher.pruned.distilled.nemo") as reader:
        assert reader.shape.ffn_hidden_size == 64
