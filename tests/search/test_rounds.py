"""The course of a search over stages that are stood in for: what is chosen, what is kept, what a kill costs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from nemo_minitron import recipe
from nemo_minitron.config.compose import compose, configure
from nemo_minitron.errors import MinitronError
from nemo_minitron.importance.scores import Scores
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.plan import TARGETS, Plan
from nemo_minitron.search import latency, measure
from nemo_minitron.search import output as search_output
from nemo_minitron.search import run as run_search
from tests.llamas import GQA
from tests.search.test_predict import make_scores

DRAW = search_output.plots
SOURCE_LOSS = 3.0
TRUTH = {
    "hidden_size": 0.9,
    "ffn_hidden_size": 0.5,
    "num_attention_heads": 0.2,
    "num_query_groups": 0.1,
    "num_layers": 1.5,
}
"""Damage of halving each size, as the stand-ins have it; the scores know nothing of it."""


def true_loss(sizes: dict[str, int], steps: int = 0) -> float:
    """Training helps wide models more, so that the order changes with it."""
    damage = sum(TRUTH[name] * (1 - size / getattr(GQA, name)) for name, size in sizes.items())
    return SOURCE_LOSS * float(np.exp(damage * 0.98**steps)) - 0.0003 * steps * sizes["hidden_size"] / 64


class Stages:
    """Runs prune, evaluate and distill on JSON instead of weights; may be killed after a number of starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, teacher: str) -> None:
        self.ran: list[str] = []
        self.left: int | None = None
        self.teacher = teacher
        monkeypatch.setattr(recipe.walk, "_launch", self._launch)
        monkeypatch.setattr(search_output, "plots", lambda outcome, folder: None)
        monkeypatch.setattr(latency, "measure", lambda bytes_per_value: latency.Rates("here", 1e12, 1e10, 1e-6))

    def _launch(self, argv: list[str], log: Path) -> int:
        assert log.parent == Path(argv[2])
        name = argv[4].removesuffix(".yaml")
        self.ran.append(name)
        cfg = OmegaConf.load(Path(argv[2]) / argv[4])
        if argv[0] == "prune":
            plan = Plan.load(cfg.prune.plan)
            content = {"sizes": {size: getattr(plan.target, size) for size in TARGETS}, "steps": 0}
            path = Path(cfg.export.save_path)
        elif argv[0] == "distill":
            content = json.loads(Path(cfg.model.restore_from_path).read_text())
            assert cfg.model.kd_teacher_restore_from_path == self.teacher
            content["steps"] += cfg.trainer.max_steps
            path = Path(cfg.model.nemo_path)
        else:
            path = Path(cfg.output_path)
            content = {"val_loss": SOURCE_LOSS}
            if cfg.model.restore_from_path != self.teacher:
                student = json.loads(Path(cfg.model.restore_from_path).read_text())
                content = {"val_loss": true_loss(student["sizes"], student["steps"])}
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise SystemExit(143)  # as SIGTERM ends a command, before the stage has written anything
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return 0


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Folder with ``teacher.nemo``, scores and token files that nobody reads."""
    from nemo_minitron.convert import convert
    from nemo_minitron.synthetic import make_llama

    folder = tmp_path_factory.mktemp("source")
    convert(make_llama(folder / "hf", GQA), folder / "teacher.nemo")
    (folder / "scores").mkdir()
    make_scores(seed=5).write(folder / "scores")
    for name in ("train.bin", "train.idx", "validation.bin", "validation.idx"):
        (folder / name).write_bytes(b"tokens")
    return folder


@pytest.fixture
def plots(stages, monkeypatch) -> None:
    """Draw them as well."""
    monkeypatch.setattr(search_output, "plots", DRAW)


@pytest.fixture
def stages(monkeypatch, source) -> Stages:
    return Stages(monkeypatch, str(source / "teacher.nemo"))


def plain(command: str, config: Any) -> DictConfig:
    """A stage's configuration as it was given; composing all of them in every test takes longer than the tests."""
    return OmegaConf.create({**config, "command": command})


def run(source: Path, output: Path, *overrides: str, weights: bool = True, stage_compose: Any = plain):
    given = [f"scores={source}/scores", f"output_path={output}", "budget.num_parameters=65e3", "search.probes=[0.3]"]
    given += ["search.measure=4", "search.validate=3", "search.distill_steps=4", "search.min_fraction=0.5"]
    if weights:
        given += [f"model.restore_from_path={source}/teacher.nemo", f"evaluate.data_prefix={source}/validation"]
        given += [f"model.data.data_prefix={{train:[1.0,{source}/train],validation:[{source}/validation]}}"]
    return run_search(configure("search", [*given, *overrides]), stage_compose)


def refused(source: Path, output: Path, *overrides: str, weights: bool = True) -> str:
    with pytest.raises(MinitronError) as caught:
        run(source, output, *overrides, weights=weights)
    return str(caught.value)


def test_a_search_on_fewer_tokens_names_the_scores_that_its_plans_are_for(source, tmp_path, stages, capsys):
    held = dataclasses.replace(
        make_scores(ranks=True, seed=5),
        tokens=np.arange(12, dtype=np.int32).reshape(4, 3),
        sensitivity=np.ones((6, 4, 3)),
    )
    (tmp_path / "given").mkdir()
    held.write(tmp_path / "given")
    for name, keys, scores in (("all", [], ""), ("some", ["search.tokens=6"], f" prune.scores={tmp_path}/some/scores")):
        outcome = run(source, tmp_path / name, f"scores={tmp_path}/given", *keys)
        said = capsys.readouterr().out
        assert f"prune.plan={outcome.winner.plan}{scores}\n" in said
        used = Scores.load(tmp_path / "some" / "scores") if scores else held
        plan = Plan.load(outcome.winner.plan)
        assert plan.compensation.tokens == used.tokens_fingerprint() and len(used.tokens) == (2 if scores else 4)


def test_a_predicted_plan_does_not_say_that_groups_went_by_loss(source, tmp_path, stages):
    keys = ("search.group_selection=loss", "search.until=predict")
    outcome = run(source, tmp_path / "out", *keys, weights=False)
    plans = [Plan.load(candidate.plan) for candidate in outcome.candidates]
    assert any(plan.target.num_query_groups < GQA.num_query_groups for plan in plans)
    assert not any("groups" in plan.selection for plan in plans)


def test_the_winner_has_the_lowest_loss_after_the_last_round(source, tmp_path, stages, capsys, plots):
    outcome = run(source, tmp_path / "out", stage_compose=compose)
    document = yaml.safe_load((tmp_path / "out" / "candidates.yaml").read_text())
    entries = {entry["name"]: entry for entry in document["candidates"]}
    assert document["winner"] == document["candidates"][0]["name"] == outcome.winner.key
    assert document["distilled_steps"] == [4, 12]
    measured = [entry for entry in entries.values() if entry["role"] in ("searched", "validation")]
    assert len(measured) == 7 and all("zero_shot" in entry for entry in measured)
    for entry in entries.values():
        sizes = {name: entry[name] for name in TARGETS}
        assert entry["zero_shot"] == pytest.approx(true_loss(sizes), rel=1e-5)
        for steps, loss in zip((4, 12), entry.get("distilled", ()), strict=False):
            assert loss == pytest.approx(true_loss(sizes, steps), rel=1e-5)
    finalists = sorted(measured, key=lambda entry: entry["zero_shot"])[:4]
    assert {e["name"] for e in finalists} == {e["name"] for e in measured if "distilled" in e}
    ends = sorted(finalists, key=lambda entry: entry["distilled"][0])
    assert {e["name"] for e in ends[:2]} == {e["name"] for e in measured if len(e.get("distilled", ())) == 2}
    assert document["winner"] == min(ends[:2], key=lambda entry: entry["distilled"][1])["name"]
    for entry in entries.values():
        plan = Plan.load(tmp_path / "out" / entry["plan"])
        assert {name: getattr(plan.target, name) for name in TARGETS} == {name: entry[name] for name in TARGETS}
        if entry["role"] != "probe":
            assert entry["num_parameters"] == plan.target.num_parameters() <= 65e3 * 1.005
    left = {path.stem for path in (tmp_path / "out" / "students").glob("*.nemo")}
    assert left == {entry["name"] for entry in finalists}, "students that lost are deleted"
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"prediction.png", "pareto.png"}
    out = capsys.readouterr().out
    assert "left" in out and "rank correlation" in out and out.count("[7/7]") == 1


def test_the_fit_sees_through_scores_that_know_nothing(source, tmp_path, stages):
    outcome = run(source, tmp_path / "out", "search.until=zero_shot", "search.validate=20", "search.probes=[0.2,0.4]")
    assert outcome.rank_correlation > 0.8 and outcome.winner is None
    assert not any("distill" in name for name in stages.ran)


def test_a_search_that_is_killed_again_and_again_ends_with_the_same_winner(source, tmp_path, stages):
    run(source, tmp_path / "whole")
    whole, stages.ran = stages.ran, []
    kills = 0
    while True:
        stages.left = 3
        try:
            run(source, tmp_path / "killed")
            break
        except SystemExit:
            kills += 1
    assert kills == (len(whole) - 1) // 3
    assert len(stages.ran) == len(whole) + kills, "only what was killed ran twice"
    ours, theirs = ((tmp_path / name / "candidates.yaml").read_text() for name in ("killed", "whole"))
    assert ours == theirs
    stages.left = 0
    run(source, tmp_path / "killed")
    assert (tmp_path / "killed" / "candidates.yaml").read_text() == theirs, "a finished search starts nothing"


def test_a_wider_search_measures_only_what_is_new(source, tmp_path, stages):
    run(source, tmp_path / "out", "search.until=zero_shot")
    first, stages.ran = set(stages.ran), []
    run(source, tmp_path / "out", "search.until=zero_shot", "search.measure=6")
    assert stages.ran and not first & set(stages.ran)


def test_other_data_is_measured_anew(source, tmp_path, stages):
    run(source, tmp_path / "out", "search.until=zero_shot")
    first, stages.ran = stages.ran, []
    validation = source / "validation.bin"
    validation.write_bytes(b"others")
    try:
        run(source, tmp_path / "out", "search.until=zero_shot")
    finally:
        validation.write_bytes(b"tokens")
    evaluations = [name for name in first if name.startswith("evaluate")]
    assert [name for name in stages.ran if name.startswith("evaluate")] == evaluations


def test_given_shapes_are_ranked_and_go_through_every_round(source, tmp_path, stages):
    shapes = "search.shapes=[{hidden_size: 40, num_layers: 2}, {num_query_groups: 3}]"
    outcome = run(source, tmp_path / "out", shapes)
    small, large = (one for one in outcome.candidates if one.role == "given")
    assert len(small.distilled) == 2 and 1 <= small.rank <= outcome.found.feasible
    assert large.rank is None and not large.distilled and large.zero_shot is not None
    better = sum(
        float(outcome.predictor(block.shape(at))[0]) < small.predicted
        and block.shape(at).num_parameters() <= 65e3 * 1.005
        for block in outcome.space.blocks()
        for at in range(len(block.sizes))
    )
    assert small.rank == better + 1


def test_scores_alone_rank_shapes(source, tmp_path, stages):
    outcome = run(source, tmp_path / "out", "search.shapes=[{hidden_size: 40, num_layers: 2}]", weights=False)
    assert stages.ran == [] and outcome.found.feasible > 100
    document = yaml.safe_load((tmp_path / "out" / "candidates.yaml").read_text())
    assert document["prediction"]["unit"] == "times the source's loss" and document["winner"] is None
    assert all(
        entry["predicted"] > 1 and (tmp_path / "out" / entry["plan"]).is_file() for entry in document["candidates"]
    )


def test_what_is_to_serve_the_student_leaves_shapes_out_and_marks_others(source, tmp_path, stages, capsys):
    wanted = "search.serving={tensor_parallel: 2, row_multiple: 16}"
    shapes = "search.shapes=[{num_attention_heads: 3, num_query_groups: 3, num_layers: 1}]"
    outcome = run(source, tmp_path / "out", wanted, shapes, weights=False)
    (given,) = (one for one in outcome.candidates if one.role == "given")
    assert given.rank is None and outcome.found.left_out > 100
    document = yaml.safe_load((tmp_path / "out" / "candidates.yaml").read_text())
    assert document["serving"]["tensor_parallel"] == 2 and document["serving"]["left_out"] == outcome.found.refused
    said = capsys.readouterr().out
    assert f"{outcome.found.left_out:,} shapes left out, which would be refused where they are to be served: " in said
    marked = 0
    for entry in document["candidates"]:
        if entry["role"] == "given":
            assert "num_attention_heads 3 does not divide over 2 GPUs" in entry["refused"]
            continue
        assert entry["num_attention_heads"] % 2 == entry["ffn_hidden_size"] % 2 == 0 and "refused" not in entry
        lengths = entry["hidden_size"], entry["ffn_hidden_size"], entry["num_attention_heads"] * GQA.kv_channels
        odd = any(length % 16 for length in lengths)
        assert odd == any("multiple of 16" in text or "multiples of 16" in text for text in entry.get("runs_badly", []))
        marked += odd
    assert marked > 0
    assert "  searched (rows" in said or "  validation (rows" in said


def test_rates_are_measured_once(source, tmp_path, stages, monkeypatch):
    """Another measurement would allow other shapes, and a search that goes on would not be the same."""
    calls = []

    def measured(bytes_per_value: int) -> latency.Rates:
        calls.append(bytes_per_value)
        return latency.Rates("here", 1e12, 1e10 * len(calls), 0.0)

    monkeypatch.setattr(latency, "measure", measured)
    monkeypatch.setattr(latency, "device_name", lambda: "here")
    overrides = ("budget.latency_ms=0.012", "search.until=predict")
    one, two = (run(source, tmp_path / "out", *overrides).found for _ in range(2))
    assert calls == [2] and one.feasible == two.feasible < one.considered
    assert max(one.best.costs["latency_ms"]) <= 0.012
    monkeypatch.setattr(latency, "device_name", lambda: "elsewhere")
    run(source, tmp_path / "out", *overrides)
    assert calls == [2, 2]


def test_layers_are_chosen_by_one_greedy_search(source, tmp_path, stages, monkeypatch):
    from nemo_minitron.search import depth

    calls = []

    def searched(cfg, scores, most):
        calls.append(most)
        return {"losses": [3.0, 3.1, 3.5][: most + 1], "removed": [[], [1], [0, 1]][: most + 1]}

    monkeypatch.setattr(depth, "_search_layers", searched)
    overrides = ("search.layer_selection=greedy", "search.until=zero_shot", "search.shapes=[{num_layers: 2}]")
    for _ in range(2):
        outcome = run(source, tmp_path / "out", *overrides)
    assert calls == [1], "at least half of three layers stay; found once"
    (given,) = (one for one in outcome.candidates if one.role == "given")
    assert Plan.load(given.plan).layers == (0, 2)
    below = ("search.layer_selection=greedy", "search.until=zero_shot", "search.shapes=[{num_layers: 1}]")
    for shrink in ((), ("search.shrink=[ffn_hidden_size]", "budget.num_parameters=120e3")):
        outcome = run(source, tmp_path / f"below{len(shrink)}", *below, *shrink)
        (given,) = (one for one in outcome.candidates if one.role == "given")
        assert Plan.load(given.plan).layers == (2,)
    assert calls == [1, 2, 2], "a given shape may have fewer layers than the space"


def test_calibration_tokens_can_be_fewer():
    from dataclasses import replace

    tokens = np.arange(12, dtype=np.int32).reshape(4, 3)
    scores = replace(make_scores(), tokens=tokens, sensitivity=np.arange(72.0).reshape(6, 4, 3))
    few = measure.fewer_tokens(scores, 7)
    assert few.tokens.tolist() == tokens[:2].tolist() and few.sensitivity.shape == (6, 2, 3)
    assert measure.fewer_tokens(scores, 100) is scores
    half = replace(scores, calibration={**scores.calibration, "own_samples": 2})
    assert measure.fewer_tokens(half, 7).tokens.tolist() == tokens[[0, 2]].tolist(), "one of each kind"
    assert measure.fewer_tokens(half, 7).own_samples == 1
    counted = np.eye(4, 3, dtype=bool) | (np.arange(3) == 1)
    some = replace(half, counted=counted)
    assert measure.fewer_tokens(some, 7).counted.tolist() == counted[[0, 2]].tolist()
    with pytest.raises(MinitronError, match=r"search\.tokens: the scores hold no calibration tokens"):
        measure.fewer_tokens(make_scores(), 7)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.compensate=true"], "search.compensate=true: the scores hold no calibration tokens"),
        (["budget.num_parameters=1e3"], "budget.num_parameters: 1K parameters is too little"),
        (["budget.num_parameters=1e9"], "budget: nothing to search; the source itself fits it"),
        (["budget.num_parameters=null"], "budget: expected at least one of budget.num_parameters"),
        (["budget.memory_gib=0"], "budget.memory_gib: expected a positive number, found 0.0"),
        (["search.measure=0"], "search.measure: expected at least 1, found 0"),
        (["search.serving.tensor_parallel=0"], "search.serving.tensor_parallel: expected at least 1, found 0"),
        (["search.serving.tensor_parallel=5"], "search.serving leaves out "),
        (["search.probes=[1.5]"], "search.probes: expected shares between 0 and 1"),
        (["search.shrink=[hidden]"], "search.shrink: expected some of hidden_size"),
        (["search.min_fraction=0"], "search.min_fraction: expected more than 0"),
        (["search.hidden_step=0"], "the step of hidden_size must be at least 1"),
        (["search.shapes=[{hiden_size: 3}]"], "unknown size 'hiden_size'; known: hidden_size"),
        (["search.shapes=[{hidden_size: 65}]"], "search.shapes: prune.hidden_size: 65 asked, 64 available"),
        (["search.shapes=[3]"], "search.shapes: expected sizes such as {hidden_size: 512}, found 3"),
        (["evaluate.data_prefix=null"], "evaluate.data_prefix is required"),
        (["model.data.data_prefix=null"], "model.data.data_prefix is required for the distillations"),
        (["evaluate.data_prefix=/nowhere"], "input /nowhere.* does not exist"),
        (["model.restore_from_path=/nowhere.nemo"], "/nowhere.nemo"),
        (["scores=/nowhere"], "'/nowhere' is not a scores folder"),
        (["model.tensor_model_parallel_size=3"], "model.tensor_model_parallel_size (3) must divide num_query_groups"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(source, tmp_path, stages, overrides, message):
    assert message in refused(source, tmp_path / "out", *overrides)
    assert stages.ran == [] and not (tmp_path / "out" / "candidates.yaml").exists()


def test_scores_of_another_shape_are_refused(source, tmp_path, stages):
    from nemo_minitron.convert import convert
    from nemo_minitron.synthetic import make_llama

    other: ModelShape = GQA.replace(num_layers=2)
    convert(make_llama(tmp_path / "hf", other), tmp_path / "other.nemo")
    message = refused(source, tmp_path / "out", f"model.restore_from_path={tmp_path}/other.nemo")
    assert "measured on a model with num_layers 3, but this checkpoint has 2" in message and stages.ran == []


def test_a_failed_stage_is_named_with_its_last_words(source, tmp_path, stages, monkeypatch):
    def fails(argv: list[str], log: Path) -> int:
        log.write_text("some\nminitron: no room\n")
        return 2

    monkeypatch.setattr(recipe.walk, "_launch", fails)
    message = refused(source, tmp_path / "out")
    assert "stage 'evaluate-source' failed" in message and message.endswith("minitron: no room")
