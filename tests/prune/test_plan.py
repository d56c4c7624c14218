"""Plans: files byte for byte, damaged ones refused by name."""

import dataclasses
import re
import tracemalloc

import pytest
import yaml

from nemo_minitron.errors import MinitronError
from nemo_minitron.prune.measured import Measured
from nemo_minitron.prune.plan import FORMAT, TARGETS, Compensation, Plan, format_ranges, parse_ranges
from tests.prune.test_choose import SHAPE, A, plan_for


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


def test_every_kept_group_keeps_equally_many_heads():
    shape = SHAPE.replace(num_attention_heads=6, num_query_groups=2)
    whole = Plan.identity(shape, "f" * 64)
    four = {"target": shape.replace(num_attention_heads=4), "heads": ((0, 2, 3, 4),) * shape.num_layers}
    assert dataclasses.replace(whole, **four).heads[0] == (0, 2, 3, 4)
    with pytest.raises(MinitronError, match="must keep 2 heads of each kept group"):
        dataclasses.replace(whole, **four | {"heads": ((0, 1, 2, 3),) * shape.num_layers})


def test_missing_plan_and_unwritable_output(tmp_path):
    with pytest.raises(MinitronError, match=r"none.yaml: expected a readable file, found: No such file"):
        Plan.load(tmp_path / "none.yaml")
    (tmp_path / "file").write_text("x")
    with pytest.raises(MinitronError, match=r"p\.yaml: expected a writable destination"):
        Plan.identity(SHAPE, "f").save(tmp_path / "file" / "p.yaml")


@pytest.mark.parametrize("key", ["rescale", "regain"])
def test_a_plan_from_before_the_final_norm_followed_the_loss_leaves_it(key, tmp_path):
    plan = Plan(**{**vars(Plan.identity(SHAPE, "f")), "compensation": Compensation("t" * 64, **{key: True})})
    path = tmp_path / "p.yaml"
    plan.save(path)
    assert Plan.load(path) == plan
    path.write_text(plan.to_yaml().replace(f"  {key}: true\n", ""))
    assert Plan.load(path).compensation == Compensation("t" * 64)
    path.write_text(plan.to_yaml().replace(f"{key}: true", f"{key}: 1"))
    with pytest.raises(MinitronError, match=rf"compensation.{key}: expected true or false, found 1"):
        Plan.load(path)


def test_samples_held_out_and_what_was_measured_on_them(tmp_path):
    plan = Plan.identity(SHAPE, "f")
    losses = {"own": Measured(511, 3.25, 4.5, 3.75)}
    plan = dataclasses.replace(plan, compensation=Compensation("t" * 64, held_out=(18, 19, 35)), measured=losses)
    plan.save(tmp_path / "p.yaml")
    assert Plan.load(tmp_path / "p.yaml") == plan and "\n  held_out: 18-19 35\n" in plan.to_yaml()
    document = yaml.safe_load(plan.to_yaml())
    assert document["measured"] == {"own": {"tokens": 511, "teacher": 3.25, "cut": 4.5, "resolved": 3.75}}
    (tmp_path / "p.yaml").write_text(plan.to_yaml().replace("18-19 35", "35 18-19"))
    with pytest.raises(MinitronError, match=r"compensation\.held_out: expected ascending samples, found '35 18-19'"):
        Plan.load(tmp_path / "p.yaml")
    old = dataclasses.replace(plan, compensation=Compensation("t" * 64), measured={})
    assert not any(word in old.to_yaml() for word in ("held_out", "measured")), "as before there were any"


def test_a_plan_says_the_ranking_that_chose_something(tmp_path):
    plan = plan_for({"ffn_hidden_size": 7}, ranking="of_mine")
    plan.save(tmp_path / "p.yaml")
    assert "\nranking: of_mine\n" in plan.to_yaml() and Plan.load(tmp_path / "p.yaml") == plan
    assert plan_for({"num_layers": 2}, ranking="of_mine").ranking is None, "layers are not chosen by it"
    for sizes in ({"hidden_size": 8}, {"num_query_groups": 2}, {"num_attention_heads": 3}):
        assert plan_for(sizes, ranking="of_mine").ranking == "of_mine"
    assert dataclasses.replace(plan, ranking=None) == plan_for({"ffn_hidden_size": 7}), "it changes no index"


def test_a_plan_says_how_layers_and_groups_were_chosen(tmp_path):
    fewer = plan_for({"num_layers": 2, "num_query_groups": 2}, ranking="of_mine")
    plan = fewer.chosen("greedy", "loss")
    plan.save(tmp_path / "p.yaml")
    assert "\nselection:\n  layers: greedy\n  groups: loss\n" in plan.to_yaml()
    assert Plan.load(tmp_path / "p.yaml") == plan and plan.ranking == "of_mine"
    assert dataclasses.replace(plan, selection={}) == fewer, "it changes no index"
    assert fewer.chosen("drop_layers", "ranking").selection == {"layers": "drop_layers"}
    assert plan_for({"ffn_hidden_size": 7}).chosen("greedy", "loss").selection == {}, "neither was removed"


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("greedy", "expected keys below 'selection', found 'greedy'"),
        ("{ffn: loss}", "plan: selection: expected layers or groups, found 'ffn'"),
        ("{layers: 7}", "plan: selection.layers: expected up to 64 letters, digits and underscores, found 7"),
    ],
)
def test_a_selection_that_is_none_is_refused(tmp_path, selection, message):
    (tmp_path / "p.yaml").write_text(f"selection: {selection}\n" + plan_for({"ffn_hidden_size": 7}).to_yaml())
    with pytest.raises(MinitronError, match=re.escape(message)):
        Plan.load(tmp_path / "p.yaml")


def test_a_plan_of_an_earlier_version_says_no_ranking_and_keeps_its_bytes(tmp_path):
    text = plan_for({"ffn_hidden_size": 7}).to_yaml()
    assert "ranking" not in text
    (tmp_path / "p.yaml").write_text(text)
    assert Plan.load(tmp_path / "p.yaml").ranking is None and Plan.load(tmp_path / "p.yaml").to_yaml() == text


@pytest.mark.parametrize("ranking", ["'my metric'", "7", "[minitron]", "a" * 65, "'<b>'", "''", "{a: b}"])
def test_a_ranking_that_is_no_name_is_refused(tmp_path, ranking):
    (tmp_path / "p.yaml").write_text(f"ranking: {ranking}\n" + plan_for({"ffn_hidden_size": 7}).to_yaml())
    with pytest.raises(MinitronError, match=r"p\.yaml': plan: ranking: expected up to 64 letters"):
        Plan.load(tmp_path / "p.yaml")


def hostile(**sizes):
    """A plan file of a model with these sizes that asks to keep all."""
    shape = dataclasses.asdict(SHAPE) | {"vocab_size": 8, "padded_vocab_size": 8} | sizes
    one = {name: f"0-{shape[size] - 1}" for name, size in AXES.items()}
    layers = min(shape["num_layers"], 4)
    keep = {"layers": f"0-{shape['num_layers'] - 1}", "hidden": one.pop("hidden")}
    keep |= {name: dict.fromkeys(range(layers), text) for name, text in one.items()}
    target = {name: shape[name] for name in TARGETS}
    document = {"format": FORMAT, "source": {"fingerprint": "f", "shape": shape}, "target": target, "keep": keep}
    return yaml.safe_dump(document)


AXES = {
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "groups": "num_query_groups",
    "heads": "num_attention_heads",
}
BOMB = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))])
GOOD = hostile()


@pytest.mark.parametrize(
    "content",
    {
        "hidden": hostile(hidden_size=10**9),
        "ffn": hostile(ffn_hidden_size=10**9),
        "heads": hostile(num_attention_heads=10**9, num_query_groups=10**9),
        "layers": hostile(num_layers=10**9),
        "many of each": hostile(num_layers=900, ffn_hidden_size=10**6),
        "beyond any": hostile(hidden_size=10**30),
        "again and again": GOOD.replace("hidden: 0-15", "hidden: " + "0-15 " * 100_000),
        "a long piece": GOOD.replace("hidden: 0-15", "hidden: " + "'" + "1" * 10**6 + "'"),
        "aliases": f"{BOMB}\n{GOOD}",
        "an alias of layers": GOOD.replace("format:", "x: &x [1]\ny: [*x, *x]\nformat:"),
        "twice": GOOD.replace("format:", "keep: {}\nformat:"),
        "deep": GOOD.replace("format:", "x: " + "[" * 9999 + "]" * 9999 + "\nformat:"),
        "many": GOOD.replace("format:", "x: [" + "0," * 10**6 + "]\nformat:"),
        "python": GOOD.replace("format:", "x: !!python/object/apply:os.abort []\nformat:"),
        "shape is a list": GOOD.replace("  shape:", "  shape: [1]\n  other:"),
        "ffn is a list": GOOD.replace("  ffn:", "  ffn: [0-1]\n  other:"),
        "ffn is text": GOOD.replace("  ffn:", "  ffn: abc\n  other:"),
        "keep is nothing": GOOD.replace("keep:", "keep:\nother:"),
        "compensation is a date": GOOD + "compensation: {tokens: t, ffn: 2001-01-01}\n",
        "compensation is huge": GOOD + f"compensation: {{tokens: t, ffn: {'9' * 399}}}\n",
        "compensation unknown": GOOD + "compensation: {tokens: t, mlp: 1.0}\n",
        "not text": "format: \udcff",
        "empty": "",
    }.items(),
    ids=lambda item: item[0],
)
def test_hostile_plans(content, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_bytes(content[1].encode("utf-8", "surrogateescape"))
    tracemalloc.start()
    with pytest.raises(MinitronError, match=r"prune\.plan: .*p\.yaml") as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_sizes_are_compared_with_the_model_before_anything_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "p.yaml").write_text(GOOD)
    assert Plan.load(tmp_path / "p.yaml", Plan.load(tmp_path / "p.yaml").source)
    monkeypatch.setattr("nemo_minitron.prune.plan.parse_ranges", None)
    with pytest.raises(MinitronError, match=r"p.yaml': the plan is for a model with vocab_size 8, but this checkpoint"):
        Plan.load(tmp_path / "p.yaml", SHAPE)
