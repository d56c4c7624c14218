"""A stage's place in a run goes through the environment, and says what is left only where it is known."""

from __future__ import annotations

import pytest

from nemo_minitron.jobs.run_place import VARIABLE, RunPlace, forget


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")


def test_it_is_handed_over_and_forgotten():
    assert RunPlace.here() is None
    place = RunPlace(12, 16, "distill", "distill", 100.5, 20.0)
    place.hand_over()
    assert RunPlace.here() == place
    forget()
    assert RunPlace.here() is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"number": 1}', "3"])
def test_what_is_no_place_is_none(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)
    assert RunPlace.here() is None


def test_what_is_left_of_a_run():
    known = RunPlace(2, 3, "distill", "distill", ends=110.0, after=30.0)
    assert known.left(100.0, None) == 40.0, "by what the stage took"
    assert known.left(100.0, 25.0) == 55.0, "its own pace is slower"
    assert known.left(105.0, 1.0) == 35.0, "a part of the stage is done soon, not the stage"
    assert known.left(200.0, 0.0) == 30.0
    assert RunPlace(2, 3, "distill", "distill", 110.0, None).left(100.0, 5.0) is None
    assert RunPlace(2, 3, "distill", "distill", None, 30.0).left(100.0, 5.0) is None
