"""lm-evaluation-harness on a local task: a model that went HF → .nemo → HF answers bit for bit as before."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path

import pytest

from nemo_minitron.cli import main
from tests.llamas import GQA

ROOT = Path(__file__).parents[1]
TASK = "tests/tasks/everyday.yaml"
ITEMS = [json.loads(line) for line in (ROOT / TASK).with_suffix(".jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folder with ``hf``, ``model.nemo`` made of it, and ``back``, made of that."""
    from nemo_minitron.convert import convert
    from nemo_minitron.synthetic import make_llama

    folder = tmp_path_factory.mktemp("models")
    make_llama(folder / "hf", GQA)
    convert(folder / "hf", folder / "model.nemo")
    convert(folder / "model.nemo", folder / "back")
    return folder


@pytest.fixture
def evaluate(models, tmp_path, monkeypatch):
    """Run the command on one of ``models``; its metrics and its items' answers."""
    monkeypatch.chdir(ROOT)  # where the task has its data

    def run(name: str, *keys: str, tasks: str = TASK) -> tuple[dict, list[dict]]:
        output = tmp_path / f"{name}.json"
        assert main([
            "evaluate", f"model.restore_from_path={models / name}", "evaluate.perplexity=false",
            f"evaluate.lm_eval.tasks=[{tasks}]", "evaluate.lm_eval.log_samples=true", f"output_path={output}", *keys,
        ]) == 0  # fmt: skip
        items = [json.loads(line) for line in output.with_name(f"{name}.samples.jsonl").read_text().splitlines()]
        assert not list(tmp_path.glob(".*")), "the exported folder is removed"
        return json.loads(output.read_text()), items

    return run


@pytest.fixture
def harness(monkeypatch, tmp_path_factory):
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    return None


def own_answers(folder: Path) -> list[list[float]]:
    """Log-likelihoods of every item's choices, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    found = []
    for item in ITEMS:
        start = len(tokenizer(item["question"])["input_ids"])
        found.append([])
        for choice in item["choices"]:
            tokens = torch.tensor([tokenizer(f"{item['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                logits = model(tokens).logits[0, :-1].log_softmax(-1)
            found[-1].append(float(logits.gather(1, tokens[0, 1:, None])[start - 1 :].sum()))
    return found


def test_a_model_that_was_a_nemo_answers_as_before(harness, evaluate, models):
    results = {name: evaluate(name) for name in ("hf", "back", "model.nemo")}
    metrics, items = results["hf"]
    for name, (other, answers) in results.items():
        assert other["lm_eval"] == metrics["lm_eval"] and answers == items, name
        assert other["num_parameters"] == GQA.num_parameters()
    assert len(items) == metrics["lm_eval"]["items"]["everyday"] == len(ITEMS) == 16

    values = metrics["lm_eval"]["tasks"]["everyday"]
    expected = own_answers(models / "hf")
    right = 0
    for item, answers, task in zip(items, expected, ITEMS, strict=True):
        assert [float(answer[0]) for answer in item["answers"]] == pytest.approx(answers, rel=1e-5)
        right += answers.index(max(answers)) == task["answer"]
    assert values["acc"] == right / 16
    assert values["acc_stderr"] == pytest.approx(math.sqrt(values["acc"] * (1 - values["acc"]) / 15))


def test_options_reach_the_harness(harness, evaluate):
    found, items = evaluate(
        "hf",
        "evaluate.lm_eval.limit=5",
        "evaluate.lm_eval.num_fewshot=2",
        "evaluate.lm_eval.include_path=tests/tasks",
        tasks="every*",
    )
    assert [item["item"] for item in items] == [0, 1, 2, 3, 4]
    assert found["lm_eval"]["num_fewshot"] == {"everyday": 2} and found["lm_eval"]["limit"] == 5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["evaluate.lm_eval.tasks=[everydya]"], "Did you mean 'everyday'"),
        (["evaluate.lm_eval.include_path=absent"], "evaluate.lm_eval.include_path: expected a folder"),
        (["evaluate.lm_eval.tasks=[tests/fuzz/seeds]"], "no task in the YAML files of tests/fuzz/seeds"),
        (["evaluate.lm_eval.tasks=[broken.yaml]"], "broken.yaml"),
        (["evaluate.perplexity=true"], "expected a .nemo, found the HF folder"),
        (["evaluate.lm_eval.tasks=[]"], "of evaluate.lm_eval.tasks, which are none"),
    ],
)
def test_mistakes_are_named_before_any_work(harness, models, tmp_path, monkeypatch, keys, message, capsys):
    monkeypatch.chdir(ROOT)
    if "broken" in keys[0]:
        (tmp_path / "broken.yaml").write_text((ROOT / TASK).read_text().replace("tests/tasks/", "absent/"))
        keys = [f"evaluate.lm_eval.tasks=[{tmp_path}/broken.yaml]"]
    base = [f"model.restore_from_path={models}/hf", "evaluate.perplexity=false", f"output_path={tmp_path}/out.json"]
    tasks = [f"evaluate.lm_eval.tasks=[{TASK}]", "evaluate.lm_eval.include_path=tests/tasks"]
    assert main(["evaluate", *base, *tasks, *keys]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minitron:")]
    assert message in line and not (tmp_path / "out.json").exists()


def test_without_the_harness_the_extra_is_named(models, tmp_path, monkeypatch, capsys):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main([
        "evaluate", f"model.restore_from_path={models}/model.nemo", "evaluate.perplexity=false",
        f"evaluate.lm_eval.tasks=[{ROOT / TASK}]", f"output_path={tmp_path}/out.json",
    ]) == 2  # fmt: skip
    assert "pip install 'nemo_minitron[lm-eval]'" in capsys.readouterr().err
