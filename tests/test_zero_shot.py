"""What the rows of ``benchmarks/zero_shot.py`` see."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import zero_shot


@pytest.mark.parametrize("name", zero_shot.SETTINGS)
def test_calibration_is_of_other_files(name):
    numbers = np.arange(500)
    chosen = zero_shot.SETTINGS[name].calibration(numbers[numbers % 25 != 0])[: zero_shot.SAMPLES]
    assert 0 < len(chosen) <= 64
    assert len(set(chosen)) == len(chosen)
    assert not set(chosen) & set(numbers[::25])


def test_sentences(tmp_path):
    (tmp_path / "ca01").write_text("\n\n\tA/at dog/nn ,/, ``/`` 1/2/cd ''/'' ./. \n\n\n\tTwo/cd ;/. ?/.\n")
    (tmp_path / "ca02").write_text("Hello/uh")
    lines = zero_shot._sentences(tmp_path, tmp_path / "brown.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["A dog, `` 1/2 ''.\nTwo ; ?", "Hello"]
