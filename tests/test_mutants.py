"""Faults that were put into the code one by one: a test sees each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import MUTANTS

ROOT = Path(__file__).parents[1]


def test_every_mutant_still_names_what_is_there():
    for mutant in MUTANTS:
        text = (ROOT / "nemo_minitron" / mutant.file).read_text()
        assert text.count(mutant.old) == 1 and mutant.old != mutant.new, mutant
        file, name = mutant.test.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), mutant
    assert len(MUTANTS) >= 40


@pytest.mark.slow
def test_no_mutant_survives(capsys):
    script = ROOT / "tests" / "mutants.py"
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, check=False)
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0 and done.stdout.endswith("survivors: 0\n")
