"""The stages as functions: each key that they set is one of their command, and what they return is what was written."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import nemo_minitron as nm
from nemo_minitron import api
from nemo_minitron.api import stages, training
from nemo_minitron.api.process import nested
from nemo_minitron.config.compose import compose
from nemo_minitron.errors import MinitronError
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA

ROOT = Path(__file__).parents[2]
CALLS = [name for name in api.__all__ if inspect.isfunction(getattr(api, name))]


@pytest.fixture
def composed(monkeypatch):
    """Commands with their composed configs, instead of running them."""
    found = []

    def call(command, config, settings=None, words=(), *, verbose=False):
        values = {key: value for key, value in config.items() if value is not None} | dict(settings or {})
        plain = json.loads(json.dumps(nested(values), default=os.fspath))
        found.append((command, compose(command, words, config=plain)))
        return ""

    for module in (stages, training):
        monkeypatch.setattr(module, "call", call)
    return found


def test_convert(composed):
    found = api.convert("hf", Path("a") / "teacher.nemo", precision="bf16", verify=True, settings={"untie": True})
    [(command, cfg)] = composed
    assert (command, cfg.input_name_or_path, cfg.output_path) == ("convert", "hf", "a/teacher.nemo")
    assert (cfg.precision, cfg.verify, cfg.untie, cfg.format) == ("bf16", True, True, None)
    assert os.fspath(found) == "a/teacher.nemo" and repr(found) == "Checkpoint('a/teacher.nemo')"


def test_preprocess(composed):
    found = api.preprocess("x.jsonl", "data/x", tokenizer=api.Checkpoint(Path("t.nemo")), json_key="body", workers=3)
    [(command, cfg)] = composed
    assert (command, cfg.tokenizer.type, list(cfg.json_keys), cfg.workers) == ("preprocess", "t.nemo", ["body"], 3)
    assert os.fspath(found) == "data/x_body_document"


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_training(command, composed, tmp_path):
    given = {"seq_length": 64, "max_steps": 7, "micro_batch_size": 2, "global_batch_size": 4, "lr": 3e-4, "devices": 2}
    text = api.Tokens(Path("data/x"))
    if command == "finetune":
        found = api.finetune(tmp_path / "m.nemo", text, **given)
    else:
        found = api.distill(tmp_path / "m.nemo", "t.nemo", text, validation=[0.5, "v", 0.5, text], **given)
    [(ran, cfg)] = composed
    assert ran == command and found.path == tmp_path / f"m.{command}{'d' if command == 'finetune' else 'ed'}.nemo"
    assert cfg.model.nemo_path == str(found.path) and cfg.model.restore_from_path == str(tmp_path / "m.nemo")
    validation = [1.0, "data/x"] if command == "finetune" else [0.5, "v", 0.5, "data/x"]
    assert cfg.model.data.data_prefix == {"train": [1.0, "data/x"], "validation": validation}
    assert (cfg.model.data.seq_length, cfg.model.micro_batch_size, cfg.model.global_batch_size) == (64, 2, 4)
    assert (cfg.trainer.max_steps, cfg.trainer.val_check_interval, cfg.trainer.devices) == (7, 7, 2)
    assert cfg.model.optim.lr == 3e-4 and cfg.exp_manager.exp_dir == str(found.path.with_suffix(".logs"))
    if command == "distill":
        assert cfg.model.kd_teacher_restore_from_path == "t.nemo"


def test_distill_from_a_cache(composed):
    for teacher, more, loss in (("t.nemo", {}, "sampled_kl"), (None, {"loss": "topk"}, "topk")):
        api.distill("m.nemo", teacher, "x", teacher_cache=Path("answers"), **more)
        cfg = composed.pop()[1]
        assert (cfg.distill.teacher_cache, cfg.distill.loss) == ("answers", loss)
        assert cfg.model.kd_teacher_restore_from_path == teacher
    api.distill("m.nemo", "t.nemo", "x", settings={"distill.loss": "jsd"})
    assert composed.pop()[1].distill.loss == "jsd"


@pytest.mark.parametrize("resume", [False, True])
def test_logs_of_an_earlier_call_go_unless_it_is_resumed(resume, composed, tmp_path):
    logs = tmp_path / "m.finetuned.logs"
    logs.mkdir()
    (logs / "checkpoint").touch()
    api.finetune(tmp_path / "m.nemo", "x", resume=resume)
    assert logs.exists() == resume
    assert composed[0][1].exp_manager.resume_if_exists is True


@pytest.mark.parametrize("began", [False, True])
def test_logs_of_an_earlier_call_stay_where_this_one_begins_nothing(began, monkeypatch, tmp_path):
    logs = tmp_path / "m.finetuned.logs"
    logs.mkdir()
    (logs / "checkpoint").touch()

    def call(command, *given, **more):
        assert not logs.exists()
        if began:
            logs.mkdir()
        raise MinitronError("trainer.precision: expected 32")

    monkeypatch.setattr(training, "call", call)
    with pytest.raises(MinitronError, match="expected 32"):
        api.finetune(tmp_path / "m.nemo", "x")
    assert [file.name for file in tmp_path.iterdir()] == [logs.name]
    assert [file.name for file in logs.iterdir()] == ([] if began else ["checkpoint"])


def test_importance(composed):
    found = api.importance("a/m.nemo", [1, "x", 2.5, "y"], num_samples=8, seq_length=32)
    [(command, cfg)] = composed
    assert command == "importance" and list(cfg.calibration.data_prefix) == [1, "x", 2.5, "y"]
    assert (cfg.calibration.num_samples, cfg.calibration.seq_length, cfg.output_path) == (8, 32, "a/m.scores")
    assert os.fspath(found) == "a/m.scores"


def test_prune(composed):
    sizes = {"hidden_size": 1, "ffn_hidden_size": 2, "num_attention_heads": 3, "num_query_groups": 4, "num_layers": 5}
    found = api.prune("a/m.nemo", scores=api.Scores(Path("s")), drop_layers=(2, 3), **sizes)
    [(command, cfg)] = composed
    assert command == "prune" and {name: cfg.prune[name] for name in sizes} == sizes
    assert (list(cfg.prune.drop_layers), cfg.prune.scores) == ([2, 3], "s")
    assert (cfg.export.save_path, cfg.export.plan_path) == ("a/m.pruned.nemo", "a/m.pruned.plan.yaml")
    assert (os.fspath(found), found.plan_path) == ("a/m.pruned.nemo", Path("a/m.pruned.plan.yaml"))


def test_evaluate(composed, tmp_path):
    kept = tmp_path / "m.json"
    kept.write_text('{"val_loss": 2.0, "perplexity": 7.4, "num_parameters": 3}')  # the command that does not run
    found = api.evaluate("m.nemo", "x", kept, seq_length=16, tasks=["arc_easy"])
    [(command, cfg)] = composed
    assert command == "evaluate" and (cfg.evaluate.data_prefix, cfg.evaluate.seq_length) == ("x", 16)
    assert (cfg.evaluate.perplexity, list(cfg.evaluate.lm_eval.tasks)) == (True, ["arc_easy"])
    assert (found.loss, found.perplexity, found.values["num_parameters"]) == (2.0, 7.4, 3)


def test_synthesize(composed):
    found = api.synthesize(Path("a") / "hf", "smollm2_135m", seed=7, settings={"model.num_layers": 2})
    [(command, cfg)] = composed
    assert (command, cfg.output_path, cfg.seed) == ("synthesize", "a/hf", 7)
    assert (cfg.model.num_layers, cfg.model.hidden_size) == (2, 576) and os.fspath(found) == "a/hf"


def test_generate(monkeypatch):
    """Prompts of any text reach the command as they are, and answers come back in their order."""
    asked = []

    def call(command, config, settings=None, words=(), *, verbose=False):
        values = {key: value for key, value in config.items() if value is not None}
        cfg = compose(command, words, config=json.loads(json.dumps(nested(values), default=os.fspath)))
        prompts = [json.loads(line)["text"] for line in Path(cfg.prompts).read_text().splitlines()]
        asked.append((prompts, cfg.batch_size, cfg.inference.greedy))
        lines = [json.dumps({"answer": f"to {prompt}\u2028"}, ensure_ascii=False) + "\n" for prompt in prompts]
        Path(cfg.output_path).write_text("".join(lines))
        return ""

    monkeypatch.setattr(stages, "call", call)
    odd = ["a ${b}\nc", "d\u2028e"]
    assert api.generate("m.nemo", odd, greedy=True, batch_size=2) == [f"to {text}\u2028" for text in odd]
    assert api.generate("m.nemo", odd[0]) == f"to {odd[0]}\u2028" and api.generate("m.nemo", odd[:1]) == [
        "to a ${b}\nc\u2028"
    ]
    assert asked == [(odd, 2, True), (odd[:1], 8, False), (odd[:1], 8, False)]
    with pytest.raises(nm.MinitronError, match="prompt: expected a text or a list of texts, found an empty list"):
        api.generate("m.nemo", [])


def test_report(composed):
    assert api.report("runs/a") == Path("runs/a/report.html") and api.report("b", "c/d.html") == Path("c/d.html")
    [(command, first), (_, second)] = composed
    assert (command, first.run_dir, first.output_path) == ("report", "runs/a", None)
    assert (second.run_dir, second.output_path) == ("b", "c/d.html")


def test_search(composed, tmp_path):
    shape = {"hidden_size": 48, "ffn_hidden_size": 128}
    sizes = {"seq_length": 16, "micro_batch_size": 2, "global_batch_size": 4}
    budget = {"num_parameters": 2e5, "memory_gib": 0.5, "latency_ms": 3}
    found = api.search("t.nemo", "s", tmp_path, **budget, shapes=[shape], train="x", validation="y", lr=1e-3, **sizes)
    api.search(None, "s", tmp_path, settings={"search.until": "predict"})
    [(command, cfg), (_, alone)] = composed
    assert (command, cfg.model.restore_from_path, cfg.scores) == ("search", "t.nemo", "s")
    assert {name: cfg.budget[name] for name in budget} == budget and list(cfg.search.shapes) == [shape]
    assert cfg.model.data.data_prefix == {"train": [1.0, "x"], "validation": [1.0, "y"]}
    assert cfg.evaluate.data_prefix == "y" and cfg.model.optim.lr == 1e-3
    assert [cfg.evaluate.seq_length, cfg.model.data.seq_length] == [16, 16]
    assert [cfg.evaluate.micro_batch_size, cfg.model.micro_batch_size, cfg.model.global_batch_size] == [2, 2, 4]
    assert alone.model.data.data_prefix is None and alone.search.until == "predict"
    (tmp_path / "candidates.yaml").write_text(
        "source: {loss: 2.5}\nwinner: b\n"
        "candidates: [{name: b, zero_shot: 3.0, plan: plans/b.yaml}, {name: a, predicted: 3.1}]\n"
    )
    assert [one["name"] for one in found.candidates] == ["b", "a"] and found.teacher_loss == 2.5
    assert found.plan == tmp_path / "plans" / "b.yaml" and found.scores is None
    (tmp_path / "scores").mkdir()
    assert found.scores == tmp_path / "scores"


def test_a_search_without_a_winner_has_no_plan(tmp_path):
    (tmp_path / "candidates.yaml").write_text("source: {loss: null}\nwinner: null\ncandidates: []\n")
    found = api.SearchResult(tmp_path)
    assert found.plan is None and found.teacher_loss is None and found.candidates == []


@pytest.mark.parametrize(
    "path", ["/models/ü", "a=b", "a(1), [2]", "it's", r"back\slash", r"both\' of", "", "null", "1"]
)
def test_run_takes_any_text(path, composed, tmp_path):
    given = {"source": path, "lr": 1e-5, "drop_layers": [1, 2], "keep_checkpoints": False, "hidden_size": None}
    found = api.run("tiny", tmp_path / path, settings=given | {"recipe.description": "mine"}, stages=["convert"])
    [(command, cfg)] = composed
    assert command == "run" and {name: cfg.recipe.settings[name] for name in given} == given
    assert cfg.recipe.description == "mine" and list(cfg.stages) == ["convert"]
    assert cfg.run_dir == str(tmp_path / path) and found.evaluations == {}


def test_what_a_run_measured(composed, tmp_path):
    (tmp_path / "metrics.json").write_text('{"teacher": {"val_loss": 1.5}}')
    found = api.run("tiny", tmp_path)
    assert found.evaluations["teacher"].loss == 1.5 and found.report == tmp_path / "report.html"


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_is_explained(name):
    """By its own name, or as those of finetune."""
    text = inspect.getdoc(getattr(api, name)) + inspect.getdoc(api.finetune) + inspect.getdoc(api)
    shared = {"micro_batch_size", "global_batch_size", "workers", "num_attention_heads"}
    for argument in inspect.signature(getattr(api, name)).parameters:
        assert argument in text or argument in shared, argument


def test_a_teacher_becomes_a_student(tmp_path):
    """From an HF folder to a student without a layer, without a setting but the sizes."""
    make_llama(tmp_path / "hf", GQA)
    teacher = nm.convert(tmp_path / "hf", tmp_path / "teacher.nemo")
    assert teacher.shape.replace(padded_vocab_size=320) == GQA
    student = nm.prune(teacher, drop_layers=[2])
    assert student.shape.num_layers == 2 and student.plan.layers == (0, 2)
    assert student.num_parameters < teacher.num_parameters
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "hf", "teacher.nemo", "teacher.pruned.nemo", "teacher.pruned.plan.yaml",
    ]  # fmt: skip


def test_the_package_imports_nothing_until_it_is_asked():
    code = (
        "import sys, nemo_minitron as nm; assert {'prune', 'run'} <= set(dir(nm)); nm.convert, nm.MinitronError; "
        "sys.exit(' '.join({'torch', 'numpy', 'hydra', 'nemo', 'transformers'} & set(sys.modules)) or 0)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.parametrize("name", CALLS)
def test_a_name_is_callable_before_and_after_its_package_is_imported(name, monkeypatch):
    """``nm.prune`` is the function, ``nemo_minitron.prune`` the package; whichever is there can be called."""
    monkeypatch.setattr(api, name, lambda *args, **given: (name, args, given))
    assert getattr(nm, name)(1, verbose=True) == (name, (1,), {"verbose": True})
    if (ROOT / "nemo_minitron" / name).is_dir():
        __import__(f"nemo_minitron.{name}")
        module = sys.modules[f"nemo_minitron.{name}"]
        assert isinstance(module, types.ModuleType) and getattr(nm, name) is module
        assert module(1, verbose=True) == (name, (1,), {"verbose": True})


def test_type_checkers_know_every_call():
    stub = (ROOT / "nemo_minitron" / "__init__.pyi").read_text()
    assert sorted(re.findall(r"^from nemo_minitron\.api import (\w+) as \1$", stub, re.M)) == sorted(CALLS)
    assert sorted(nm._CALLS) == sorted(CALLS)


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'pruned'"):
        _ = nm.pruned
