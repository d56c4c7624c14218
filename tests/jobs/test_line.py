"""What fits into a line: whole parts, by importance; counts, clocks, and the time that is left."""

from __future__ import annotations

import pytest

from nemo_minitron.jobs import line
from nemo_minitron.jobs.line import Pace, Part, clock, counted, fit, joined

TRAINING = [
    Part("[12/16]", line.PLACE, after=" "),
    Part("distill", line.NAME),
    Part("step 1,200/10,000", line.COUNT),
    Part("loss 1.2345", line.LOSS),
    Part("val_loss 5.4321", line.VALIDATION),
    Part("131,072 tokens/s", line.RATE),
    Part("ETA 1:02:03", line.LEFT),
    Part("recipe ETA 12:34:56", line.WHOLE),
]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (
            120,
            "[12/16] distill  step 1,200/10,000  loss 1.2345  val_loss 5.4321  131,072 tokens/s  ETA 1:02:03  "
            "recipe ETA 12:34:56",
        ),
        (100, "[12/16] distill  step 1,200/10,000  loss 1.2345  val_loss 5.4321  131,072 tokens/s  ETA 1:02:03"),
        (80, "[12/16] distill  step 1,200/10,000  loss 1.2345  val_loss 5.4321  ETA 1:02:03"),
        (72, "distill  step 1,200/10,000  loss 1.2345  val_loss 5.4321  ETA 1:02:03"),
        (60, "distill  step 1,200/10,000  loss 1.2345  ETA 1:02:03"),
        (40, "distill  step 1,200/10,000  loss 1.2345"),
        (30, "distill  step 1,200/10,000"),
        (20, "distill"),
        (6, "disti…"),
        (3, "dis"[:2]),
        (1, ""),
    ],
)
def test_parts_are_dropped_whole_by_importance(width, expected):
    kept = joined(fit(TRAINING, width))
    assert kept == expected and len(kept) <= width


def test_every_number_is_whole_at_every_width():
    whole = {part.text for part in TRAINING}
    for width in range(8, 130):
        kept = fit(TRAINING, width)
        assert {part.text for part in kept} <= whole and len(joined(kept)) <= width


def test_wide_marks_take_two_columns():
    def columns(text: str) -> int:
        return sum(2 if ord(mark) > 0x2E80 else 1 for mark in text)

    (name,) = fit([Part("模型模型模型", line.NAME), Part("3/4", line.COUNT)], 9, columns)
    assert name.text == "模型模型…"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((12, 40, "step"), "step 12/40"),
        ((1200, 10000, "token"), "token 1,200/10,000"),
        ((1.25e9, 16.1e9, "B"), "1.2/16.1 GB"),
        ((300, 700, "B"), "300.0/700.0 B"),
        ((0, 0, "B"), "0.0/0.0 B"),
        ((0.374, 1.0, ""), "37%"),
        ((0, 0, ""), "100%"),
    ],
)
def test_counts(arguments, expected):
    assert counted(*arguments) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(-1, "0:00"), (0.4, "0:00"), (59.6, "1:00"), (725, "12:05"), (10930, "3:02:10"), (183845, "2d 03:04:05")],
)
def test_clock(seconds, expected):
    assert clock(seconds) == expected


def test_time_left_is_that_of_the_units_after_the_first():
    pace = Pace(0.0, 0)
    assert pace.left(5.0, 0, 10) is None, "nothing is known yet"
    pace.count(60.0, 1)  # compiles
    assert pace.left(60.0, 1, 10) == 9 * 60.0
    pace.count(62.0, 2)
    assert pace.left(62.0, 2, 10) == 8 * 2.0
    assert pace.left(70.0, 6, 10) == 4 * 2.0
    assert pace.left(80.0, 10, 10) == 0.0


def test_a_validation_between_units_counts():
    pace = Pace(0.0, 0)
    for now, done in ((1.0, 1), (2.0, 2), (13.0, 3)):  # ten seconds of it
        pace.count(now, done)
    assert pace.left(13.0, 3, 5) == 2 * 6.0


def test_a_resumed_training_counts_from_its_first_step():
    pace = Pace(0.0, 900)
    assert pace.left(5.0, 900, 1000) is None
    pace.count(2.0, 901)
    pace.count(3.0, 902)
    assert pace.left(3.0, 902, 1000) == 98.0


def test_a_unit_that_is_told_again_changes_nothing():
    pace = Pace(0.0, 0)
    pace.count(4.0, 0)
    assert pace.left(5.0, 0, 10) is None
