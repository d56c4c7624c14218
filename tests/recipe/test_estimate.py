"""What is said of a run's time: what the same stages took before, and nothing where one of them never ran so."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from nemo_minitron.files.staging import write_file
from nemo_minitron.recipe import Records, Stage, estimate
from nemo_minitron.recipe.estimate import run_place, took

READS = {"a": (), "b": ("a",), "c": ("b",), "d": ()}


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate.time, "time", lambda: 1000.0)
    return Records(tmp_path / ".stages")


def stage(name: str, steps: int = 1) -> Stage:
    return Stage(name, "convert", OmegaConf.create({"steps": steps}), (), (), None)


STAGES = [stage(name) for name in "abcd"]


def ran(records: Records, name: str, seconds: float, steps: int = 1, **record) -> None:
    write_file(records.folder / f"{name}.yaml", OmegaConf.to_yaml(stage(name, steps).config))
    records.write(name, {"state": "done", "seconds": seconds, **record})


def test_what_a_stage_took(records):
    assert took(STAGES[0], records) is None
    ran(records, "a", 5.0)
    assert took(STAGES[0], records) == 5.0
    ran(records, "a", 5.0, steps=2)
    assert took(STAGES[0], records) is None, "of another configuration"
    ran(records, "a", 5.0, resumed=True)
    assert took(STAGES[0], records) is None, "of a part"
    records.write("a", {"state": "started"})
    assert took(STAGES[0], records) is None


def test_a_first_run_says_nothing(records):
    place = run_place(1, STAGES, READS, records, {"a"})
    assert (place.number, place.count, place.name, place.ends, place.after) == (2, 4, "b", None, None)


def test_stages_that_will_be_skipped_take_no_time(records):
    for name, seconds in (("a", 10.0), ("b", 20.0), ("c", 30.0), ("d", 40.0)):
        ran(records, name, seconds)
    place = run_place(1, STAGES, READS, records, ran=())
    assert (place.ends, place.after) == (1020.0, 30.0), "c reads what b writes, d does not"
    assert run_place(0, STAGES, READS, records, ran=()).after == 50.0, "c runs since b does"
    assert run_place(1, STAGES, READS, records, ran=(), force=True).after == 70.0
    assert run_place(3, STAGES, READS, records, ran=()).after == 0.0


def test_one_unknown_stage_makes_all_unknown(records):
    for name, seconds in (("a", 10.0), ("b", 20.0), ("d", 40.0)):
        ran(records, name, seconds)
    place = run_place(0, STAGES, READS, records, ran=())
    assert place.ends == 1010.0 and place.after is None
    ran(records, "c", 30.0)
    assert run_place(0, STAGES, READS, records, ran=()).after == 50.0
