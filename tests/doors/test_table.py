"""``docs/doors.md`` has every row and column that the tests have."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.config.schema import CONVERT_FORMATS
from tests.doors.models import CONFIGS
from tests.doors.refused import REFUSED, refusal
from tests.doors.sources import SOURCES

PAGE = Path(__file__).parents[2] / "docs" / "doors.md"


def test_the_table_has_every_cell():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    head, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert head[5:] == [f"to {name}" for name in CONVERT_FORMATS]
    assert [row[:2] for row in rows] == [[model, source] for model in CONFIGS for source in SOURCES]
    for model, source, *cells in rows:
        expected = [refusal(model, source)] * 3 + [refusal(model, source, target) for target in CONVERT_FORMATS]
        assert [cell.startswith("no (") for cell in cells] == [why is not None for why in expected], (model, source)
        assert all(cell == "yes" or cell.startswith("no (") for cell in cells)
    assert all(why in PAGE.read_text() for why in REFUSED.values())
