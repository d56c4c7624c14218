"""The passages of ``benchmarks/cloze.py``, and that its count is lm-evaluation-harness's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from nemo_minitron.cli import main
from tests.llamas import GQA

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import cloze

FILLER = "Here are ten words that only make this passage longer! " * 5


def test_a_run_is_whole_sentences_of_paragraphs_that_follow_each_other():
    text = (
        "A heading\nOne sentence. Another one!\n\nThis is a third.\nx = 1\nOf 3 + 4 = 7 & 5 * 6 = 30.\n"
        "The last? This is no.\nand so."
    )
    assert list(cloze.runs(text)) == [
        ["One sentence.", "Another one!", "This is a third."],
        ["The last?", "This is no."],
    ]


@pytest.mark.parametrize(
    ("sentence", "word"),
    [
        ("This is what one can read.", "read"),
        ("This is what one can see.", None),
        ("This is what one can read!", None),
        ("This is what they call read2.", None),
        ("This is what they call re-read.", None),
        ("You can read.", None),
    ],
)
def test_the_word_that_is_to_be_found(sentence, word):
    assert cloze.last_word(sentence) == word


def passages(text: str) -> list[tuple[str, str]]:
    return [(one["context"], one["word"]) for one in cloze.passages({"text": text, "source": "a"})]


def test_a_passage_has_its_word_before_the_last_sentence():
    last = "This is how we get to the Device."
    assert passages(f"A device is here. {FILLER}{last}") == [
        (f"A device is here. {FILLER}This is how we get to the", "Device")
    ]
    assert passages(f"Devices are here. {FILLER}{last}") == [], "another word"
    assert passages(f"{FILLER}The device is a device, or this device.") == [], "in the last sentence alone"
    assert passages(f"A device is here. {last}") == [], "too short"
    assert passages(f"A device is here. {FILLER * 4}{last}") == [], "too long"


def test_a_passage_begins_as_late_as_it_may():
    early = "This one is not needed. "
    (found,) = passages(f"{early}A device is here. {FILLER}This is how we get to the device.")
    assert not found[0].startswith(early)
    words = len(f"{found[0]} {found[1]}".split())
    assert cloze.LEAST <= words <= cloze.MOST


def test_the_draw_is_the_seeds_and_not_of_one_document(tmp_path, monkeypatch, capsys):
    found = [{"context": "", "word": str(n), "source": str(n % 3)} for n in range(30)]
    one, same, other = (cloze.drawn(found, 8, 3, seed) for seed in (0, 0, 1))
    assert one == same != other and len(one) == 8
    assert all([row["source"] for row in one].count(source) <= 3 for source in "012")
    assert [int(row["word"]) for row in one] == sorted(int(row["word"]) for row in one)
    assert len(cloze.drawn(found, 100, 3, 0)) == 9


def test_harness_and_own_count_agree(tmp_path, monkeypatch):
    """Of a random model with each sort of passage; for some of them its own likeliest word is the last."""
    pytest.importorskip("lm_eval")
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_minitron.synthetic import make_llama

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = make_llama(tmp_path / "hf", GQA)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    text = tmp_path / "text.jsonl"
    lines = [f"A {word} is here. {FILLER}This is how we get to the {word}." for word in ("device", "string", "with")]
    text.write_text("".join(json.dumps({"text": line, "source": line[2:8]}) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["cloze.py", str(text), str(tmp_path / "task"), "--count", "3"])
    cloze.main()
    rows = cloze.read(tmp_path / "task" / "cloze.jsonl")
    assert [row["word"] for row in rows] == ["device", "string", "with"]
    token = next(
        token for word, token in sorted(tokenizer.get_vocab().items()) if word[0] == "Ġ" and word[1:].isalpha()
    )
    context = tokenizer(rows[0]["context"], return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():  # this row's word is the likeliest there
        model.lm_head.weight[token] = model.model(context).last_hidden_state[0, -1]
    model.save_pretrained(folder)
    rows.append({**rows[0], "word": tokenizer.decode(token).removeprefix(" ")})
    (tmp_path / "task" / "cloze.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "cloze.json"
    command = ["evaluate", f"model.restore_from_path={folder}", "evaluate.perplexity=false"]
    assert main([*command, f"evaluate.lm_eval.tasks=[{tmp_path}/task/cloze.yaml]", f"output_path={output}"]) == 0
    found = json.loads(output.read_text())["lm_eval"]
    assert found["items"] == {"cloze": 4} and found["tasks"]["cloze"]["perplexity"] > 1
    assert cloze.accuracy(model, tokenizer, rows, batch=3) == found["tasks"]["cloze"]["acc"]
    assert found["tasks"]["cloze"]["acc"] == 0.25
