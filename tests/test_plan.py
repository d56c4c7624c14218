"""Plans: files byte for byte, damaged ones refused by name."""

import pytest

from nemo_minitron.errors import MinitronError
from nemo_minitron.plan import Compensation, Plan, format_ranges, parse_ranges
from tests.test_planning import SHAPE, A, plan_for


def test_ranges():
    assert format_ranges([0, 1, 2, 5, 7, 8]) == "0-2 5 7-8"
    for indices in ((), (3,), (0, 2, 4), tuple(range(100))):
        assert parse_ranges(format_ranges(indices), 100) == indices
    assert parse_ranges(7, 8) == (7,)
    for text in ("0-999999999", "5-3", "a", "-1", "1,2"):
        with pytest.raises(MinitronError):
            parse_ranges(text, 10)


def test_file_round_trip_byte_for_byte(tmp_path):
    plan = plan_for({"hidden_size": 10, "ffn_hidden_size": 7, "num_query_groups": 2}, drop_layers=[3])
    plan.save(tmp_path / "a.yaml")
    loaded = Plan.load(tmp_path / "a.yaml")
    assert loaded == plan
    loaded.save(tmp_path / "b.yaml")
    assert (tmp_path / "a.yaml").read_bytes() == (tmp_path / "b.yaml").read_bytes()
    assert str(tmp_path) not in (tmp_path / "a.yaml").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.yaml", "b.yaml"]


def test_identity():
    plan = Plan.identity(SHAPE, "f")
    assert plan.target == plan.source == SHAPE and plan.heads[3] == tuple(range(A))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nemo_minitron.plan/1", "other/1", "is not a plan"),
        ("hidden: 0-15", "hidden: 0-16", "does not fit an axis of 16"),
        ("hidden: 0-15", "hidden: 1-15", "expected 16 indices, found 15"),
        ("hidden: 0-15", "hidden: 1-15 0", "ascending"),
        ("  hidden: 0-15\n", "", "lacks 'hidden'"),
        ("kv_channels", "kv_canals", "kv_canals"),
        ("num_layers: 4", "num_layers: five", "num_layers"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, old, new, message):
    text = Plan.identity(SHAPE, "f").to_yaml()
    path = tmp_path / "p.yaml"
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(MinitronError, match=message) as caught:
        Plan.load(path)
    assert "p.yaml" in str(caught.value)


def test_heads_must_belong_to_kept_groups():
    plan = plan_for({"num_query_groups": 2})
    wrong = tuple(tuple((h + 2) % A for h in row) for row in plan.heads)
    with pytest.raises(MinitronError):
        Plan(
            plan.source_fingerprint,
            plan.source,
            plan.target,
            plan.layers,
            plan.hidden,
            plan.ffn,
            plan.groups,
            tuple(tuple(sorted(row)) for row in wrong),
        )


def test_missing_plan_and_unwritable_output(tmp_path):
    with pytest.raises(MinitronError, match=r"cannot read .*none.yaml"):
        Plan.load(tmp_path / "none.yaml")
    (tmp_path / "file").write_text("x")
    with pytest.raises(MinitronError, match=r"p\.yaml: expected a writable destination"):
        Plan.identity(SHAPE, "f").save(tmp_path / "file" / "p.yaml")


def test_a_plan_from_before_rescaling_is_not_rescaled(tmp_path):
    plan = Plan(**{**vars(Plan.identity(SHAPE, "f")), "compensation": Compensation("t" * 64, rescale=True)})
    path = tmp_path / "p.yaml"
    plan.save(path)
    assert Plan.load(path) == plan
    path.write_text(plan.to_yaml().replace("  rescale: true\n", ""))
    assert Plan.load(path).compensation == Compensation("t" * 64)
    path.write_text(plan.to_yaml().replace("rescale: true", "rescale: 1"))
    with pytest.raises(MinitronError, match=r"compensation.rescale: expected true or false, found 1"):
        Plan.load(path)
