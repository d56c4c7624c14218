"""Which samples are held back, and the record of what was measured on them."""

import pytest

from nemo_minitron.errors import MinitronError
from nemo_minitron.prune.measured import Measured, describe, from_section, hold_out, to_section, worse

LOSSES = {"calibration": Measured(511, 3.0, 4.105, 3.48), "own": Measured(1022, 2.5, 3.0, 2.75)}


@pytest.mark.parametrize(
    ("samples", "own", "held"),
    [
        (64, 0, [60, 61, 62, 63]),
        (72, 8, [60, 61, 62, 63, 71]),
        (33, 16, [15, 16, 32]),
        (3, 2, [2]),
        (4, 2, [1, 3]),
        (2, 1, []),
        (1, 0, []),
        (17, 17, [15, 16]),
    ],
)
def test_the_last_sixteenth_of_each_kind_is_held_back(samples, own, held):
    assert list(hold_out(samples, own)) == held


def test_worse_on_one_kind_is_worse():
    assert not worse(LOSSES) and not worse({})
    assert not worse({"own": Measured(1, 1.0, 2.0, 2.0)}), "as good as cut"
    assert worse(LOSSES | {"own": Measured(1022, 2.5, 3.0, 3.000001)})
    assert worse({"calibration": Measured.of_sums(2, 1.0, 2.0, float("nan"))})


def test_losses_are_means():
    assert Measured.of_sums(4, 8.0, 9.0, 10.0) == Measured(4, 2.0, 2.25, 2.5)
    assert Measured.of_sums(1, float("inf"), 1 / 3, 1.0) == Measured(1, 1e6, 0.333333, 1.0)


def test_sections_round_trip():
    assert from_section(to_section(LOSSES)) == LOSSES and from_section(None) == {}
    assert describe(LOSSES).startswith("4.1050 cut, 3.4800 re-solved on calibration text (511 tokens); 3.0000 cut")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([], "measured: expected keys of calibration, own, found"),
        ({"other": {}}, "measured: expected keys"),
        ({"own": {"tokens": 1}}, r"measured\.own: expected tokens, teacher, cut, resolved, found"),
        ({"own": {"tokens": 0, "teacher": 1.0, "cut": 1.0, "resolved": 1.0}}, r"measured\.own\.tokens: expected int"),
        ({"own": {"tokens": 1, "teacher": 1, "cut": 1.0, "resolved": 1.0}}, r"own\.teacher: expected float"),
        ({"own": {"tokens": 1, "teacher": 1.0, "cut": float("nan"), "resolved": 1.0}}, r"own\.cut: .* found nan"),
        ({"own": {"tokens": 1, "teacher": 1.0, "cut": 1.0, "resolved": -1.0}}, r"own\.resolved: .* found -1\.0"),
    ],
)
def test_sections_that_are_none_are_refused(section, message):
    with pytest.raises(MinitronError, match=message):
        from_section(section)
