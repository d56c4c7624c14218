"""The table that ``benchmarks/zero_shot.py`` fills cell by cell."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import zero_shot
import zero_shot_bench


def test_named_text(tmp_path):
    assert zero_shot.named_text(f"other={tmp_path}") == ("other", tmp_path)
    for given in (f"brown={tmp_path}", f"={tmp_path}", str(tmp_path), f"other={tmp_path}/none"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected NAME=PATH"):
            zero_shot.named_text(given)


FACTS = {"model": "smollm2", "setting": "lines", "samples": 64, "weights": "w", "texts": {"brown": "a", "chat": "b"}}
TARGETS = ["hidden 576→512", "ffn 1536→1024"]


class Drawn:
    """What ``measure`` asks of a bench."""

    model, update_iter = zero_shot_bench.MODELS["smollm2"], 1

    def __init__(self, draw=0, overrides=(), texts=("brown", "chat")):
        self.draw, self.overrides, self.texts = draw, {"importance": [], "prune": list(overrides)}, dict.fromkeys(texts)
        self.teacher, self.seconds = Path("teacher.nemo"), {"ranks_s": 9.0}

    def at(self, draw):
        return Drawn(draw, self.overrides["prune"], self.texts)

    def losses(self, path):
        return dict.fromkeys(self.texts, 2.0)


@pytest.fixture
def measured(monkeypatch):
    """Cells in the order in which they are measured, each of a loss that tells which it is."""
    done = []

    def measure(bench, target, method):
        done.append((bench.draw, target, method))
        if len(done) == getattr(measure, "stops_at", None):
            raise KeyboardInterrupt
        loss = 3.0 + bench.draw + len(method) / 10
        settings = zero_shot.settings_of(bench, method)
        return {"loss": dict.fromkeys(bench.texts, loss), "seconds": 1.0, "peak_memory_bytes": 5, "settings": settings}

    monkeypatch.setattr(zero_shot, "measured", measure)
    return SimpleNamespace(done=done, measure=measure)


def filled(path, bench, draws=3, methods=("plain", "ours", "oscar"), facts=FACTS):
    table = zero_shot.Table(path, facts)
    zero_shot.measure(bench, table, methods, TARGETS, range(draws))
    return json.loads(path.read_text())


def test_a_table_goes_on_where_it_stopped(measured, tmp_path, capsys):
    path = tmp_path / "table.json"
    measured.measure.stops_at = 8
    with pytest.raises(KeyboardInterrupt):
        filled(path, Drawn())
    partly = json.loads(path.read_text())
    assert sum(len(cells["draws"]) for row in partly["rows"].values() for cells in row.values()) == 7
    measured.done.clear()
    measured.measure.stops_at = None
    table = filled(path, Drawn())
    assert len(measured.done) == 3 * 5 - 7, "of each draw two methods in two rows, and oscar in one"
    assert list(table["rows"]) == ["ffn 1536→1024", "hidden 576→512"], "in the order of the targets"
    assert "oscar" not in table["rows"]["hidden 576→512"]
    ours = table["rows"]["ffn 1536→1024"]["ours"]
    assert list(ours["draws"]) == ["0", "1", "2"]
    assert ours["above"] == pytest.approx({"brown": 2.4, "chat": 2.4})
    assert ours["spread"] == pytest.approx({"brown": 1.0, "chat": 1.0})
    measured.done.clear()
    assert filled(path, Drawn())["rows"] == table["rows"] and not measured.done
    capsys.readouterr()
    zero_shot.show(table)
    assert "2.400 ±1.000" in capsys.readouterr().out
    assert not [file for file in tmp_path.iterdir() if file.name not in ("table.json", ".table.json.lock")]


def test_cells_of_other_settings_or_fewer_texts_are_measured_again(measured, tmp_path):
    path = tmp_path / "table.json"
    filled(path, Drawn(texts=("brown",)), 1, facts=FACTS | {"texts": {"brown": "a"}})
    measured.done.clear()
    filled(path, Drawn(texts=("brown",), overrides=["prune.rotate=false"]), 1, facts=FACTS | {"texts": {"brown": "a"}})
    assert measured.done == [(0, target, "ours") for target in TARGETS]
    measured.done.clear()
    table = filled(path, Drawn(), 1, ["plain"])
    assert measured.done == [(0, target, "plain") for target in TARGETS]
    assert table["rows"][TARGETS[0]]["plain"]["above"].keys() == table["teacher"].keys() == {"brown", "chat"}
    assert table["rows"][TARGETS[0]]["ours"]["above"].keys() == {"brown"}


def test_runs_that_fill_one_table_keep_each_others_cells(measured, tmp_path):
    path = tmp_path / "table.json"
    table = zero_shot.Table(path, FACTS)
    filled(path, Drawn(), 1, ["plain"])
    zero_shot.measure(Drawn(), table, ["ours"], TARGETS, [1])
    rows = json.loads(path.read_text())["rows"]
    assert {method: list(cells["draws"]) for method, cells in rows[TARGETS[0]].items()} == {
        "plain": ["0"],
        "ours": ["1"],
    }


@pytest.mark.parametrize(("name", "other"), [("weights", "v"), ("samples", 8), ("texts", {"brown": "c", "chat": "b"})])
def test_a_table_of_something_else_is_refused(measured, tmp_path, name, other):
    path = tmp_path / "table.json"
    filled(path, Drawn(), 1)
    before = path.read_text()
    with pytest.raises(SystemExit, match=f"expected a table of {name}"):
        zero_shot.Table(path, FACTS | {name: other})
    assert path.read_text() == before
