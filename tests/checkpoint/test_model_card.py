"""The README.md of an export says what is known, and no more; a foreign one is never replaced."""

import json
import os

import pytest
import yaml

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.model_card import MARK
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.prune.plan import Compensation, Plan
from nemo_minitron.synthetic import make_llama
from tests.compat.models import edit, prune
from tests.llamas import GQA

SHAPE = GQA.replace(share_embeddings_and_output_weights=True)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    source = make_llama(folder / "hf", SHAPE)
    edit(source / "config.json", _name_or_path="some-org/Some-Model-1B")
    return convert(source, folder / "teacher.nemo")


def card_of(folder):
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert MARK in body.splitlines()
    return yaml.safe_load(front), body


def run_of(folder, teacher):
    """A run as its stages leave it: pruned.nemo with its plan, distilled.nemo, records."""
    pruned = prune(teacher, {"hidden_size": 52, "num_layers": 2}, folder / "pruned.nemo")
    (folder / "distilled.nemo").write_bytes(pruned.read_bytes())
    with NemoReader(pruned) as reader:
        target = reader.shape
    kept = (0, 2)
    plan = Plan(
        source_fingerprint="f", source=SHAPE, target=target, layers=kept, hidden=tuple(range(52)),
        ffn=(tuple(range(SHAPE.ffn_hidden_size)),) * 2, groups=(tuple(range(4)),) * 2, heads=(tuple(range(8)),) * 2,
        compensation=Compensation(tokens="t", rotate=True), ranking="reconstruction",
        selection={"layers": "greedy", "groups": "loss"},
    )  # fmt: skip
    plan.save(folder / "pruned.plan.yaml")
    stages = folder / ".stages"
    stages.mkdir()
    run = "/elsewhere/" + folder.name
    config = {
        "model": {
            "restore_from_path": f"{run}/pruned.nemo",
            "kd_teacher_restore_from_path": f"{run}/corrected.nemo",
            "nemo_path": f"{run}/distilled.nemo",
            "global_batch_size": 4,
            "data": {"seq_length": 256},
        },
        "trainer": {"max_steps": 60, "max_time": None},
        "distill": {"loss": "kl"},
    }
    (stages / "distill.yaml").write_text(yaml.safe_dump(config))
    (folder / "evaluation").mkdir()
    for role, file, loss in (("teacher", "corrected", 2.7254), ("distilled", "distilled", 2.8947)):
        measured = {
            "model": {"restore_from_path": f"{run}/{file}.nemo"},
            "evaluate": {"data_prefix": f"{run}/data/validation_text_document"},
            "output_path": f"{run}/evaluation/{role}.json",
        }
        (stages / f"evaluate_{role}.yaml").write_text(yaml.safe_dump(measured))
        (folder / "evaluation" / f"{role}.json").write_text(json.dumps({"val_loss": loss}))
    for stage in list(stages.iterdir()):
        stage.with_suffix(".json").write_text('{"state": "done"}')
    return folder


def test_a_model_that_was_converted_alone(teacher, tmp_path):
    front, body = card_of(convert(teacher, tmp_path / "out"))
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "some-org/Some-Model-1B",
        "tags": ["minitron"],
    }
    assert "# out\n" in body and f"{SHAPE.num_parameters():,} parameters in float32" in body
    assert "| before |" not in body and "Pruned" not in body and "Distilled" not in body and "Notes" not in body
    code = body.split("```python\n")[1].split("```")[0].replace('"out"', repr(str(tmp_path / "out")))
    made = {}
    exec(code, made)  # what the card says loads it
    assert made["model"].config.hidden_size == 64 and made["tokenizer"]("a").input_ids


def test_what_the_records_of_a_run_say(teacher, tmp_path):
    run = run_of(tmp_path, teacher)
    front, body = card_of(convert(run / "distilled.nemo", tmp_path / "out"))
    assert front["tags"] == ["minitron", "pruned", "distilled"]
    assert "| hidden size | 64 | 52 |" in body and "| layers | 3 | 2 |" in body
    assert "converted from `distilled.nemo`, which was made from some-org/Some-Model-1B" in body
    assert "ranked by `reconstruction`, query groups by `loss`; the weights that stayed were re-solved on" in body
    assert "Of the layers 0-2, 0 2 stayed, chosen by `greedy`." in body and "residual stream turned" in body
    assert "**Distilled** from `corrected.nemo` with the loss `kl`, 60 steps of 1,024 tokens." in body
    assert "on `validation_text_document`: 2.8947 nats/token, the teacher's 2.7254." in body
    assert "- Exported as MistralForCausalLM without a window" in body


@pytest.mark.parametrize("spoil", ["plan of another", "not done", "older", "damaged", "hostile words", "clock"])
def test_nothing_is_invented(spoil, teacher, tmp_path):
    run = run_of(tmp_path, teacher)
    stages = run / ".stages"
    plan = run / "pruned.plan.yaml"
    if spoil == "plan of another":
        plan.write_text(plan.read_text().replace("  hidden_size: 52\n", "  hidden_size: 50\n"))
    elif spoil == "not done":
        (stages / "distill.json").write_text('{"state": "started"}')
    elif spoil == "older":
        os.utime(stages / "distill.json", (1, 1))
    elif spoil == "damaged":
        (stages / "distill.yaml").write_text("model: [")
        plan.write_bytes(b"\xff")
    elif spoil == "clock":
        text = (stages / "distill.yaml").read_text()
        (stages / "distill.yaml").write_text(text.replace("max_time: null", "max_time: '00:01:00:00'"))
    else:
        text = (stages / "distill.yaml").read_text().replace("loss: kl", 'loss: "kl](http://evil)"')
        (stages / "distill.yaml").write_text(text.replace("corrected.nemo", "`x`.nemo"))
    front, body = card_of(convert(run / "distilled.nemo", tmp_path / "out"))
    assert ("**Pruned**" in body) == (spoil in ("hostile words", "clock"))
    assert ("**Distilled**" in body) == (spoil == "plan of another") == ("distilled" in front["tags"])
    assert "evil" not in body


def test_a_foreign_readme_is_not_replaced(teacher, tmp_path):
    out = convert(teacher, tmp_path / "out")
    convert(teacher, out)  # our own is
    (out / "README.md").write_text("Years of work.\n")
    with pytest.raises(MinitronError, match=r"found also 'README\.md'"):
        convert(teacher, out)
    assert (out / "README.md").read_text() == "Years of work.\n"


@pytest.mark.parametrize("name", ["/home/me/model", "../x/y", "a/b\nbase_model: c/d", "one", 3, None])
def test_only_a_name_of_the_hub_is_a_base_model(name, tmp_path):
    source = make_llama(tmp_path / "hf", SHAPE.replace(num_layers=1))
    edit(source / "config.json", _name_or_path=name)
    front, _ = card_of(convert(convert(source, tmp_path / "m.nemo"), tmp_path / "out"))
    assert "base_model" not in front
