"""The floors: contracts of pyproject.toml, kept."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_import_contracts_are_kept():
    lint = Path(sys.executable).with_name("lint-imports")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [lint, "--config", "pyproject.toml", "--no-cache"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_the_command_line_pulls_in_no_stage():
    code = "import sys, nemo_minitron.cli; sys.exit(any(m.startswith('nemo_minitron.stages') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_page_on_architecture_lists_the_floors_that_the_contracts_check():
    contract = re.search(r"^layers = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    floors = [set(re.findall(r"\w+", line)) for line in re.findall(r'"(.+)"', contract[1])]
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## Layout")[2]
    rows = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| (`[^|]+) \|", table, re.M)]
    assert [set(row) for row in rows] == floors
    package = {path.stem for path in (ROOT / "nemo_minitron").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert set().union(*floors) == package - {"__init__", "__pycache__"}
