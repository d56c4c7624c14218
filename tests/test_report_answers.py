"""What models wrote, side by side: the prompts that all have, bounded, and whatever a file holds."""

from __future__ import annotations

import json

import pytest

from nemo_minitron.report.answers import LONGEST_ANSWER, MOST_PROMPTS, read_answers
from nemo_minitron.report.inventory import Inventory
from nemo_minitron.report.page import render
from nemo_minitron.report.run_folder import read_run


def write(folder, role, answers):
    (folder / "evaluation").mkdir(exist_ok=True)
    lines = [json.dumps({"text": prompt, "answer": answer, "tokens": 3}) for prompt, answer in answers.items()]
    (folder / "evaluation" / f"{role}.answers.jsonl").write_text("".join(f"{line}\n" for line in lines))


def read(folder):
    absent: list[str] = []
    return read_answers(Inventory(folder), absent), absent


def test_prompts_that_all_models_have_in_their_order(tmp_path):
    assert read(tmp_path) == ({}, [])
    write(tmp_path, "distilled", {"b": "2", "a": "1", "c": ""})
    write(tmp_path, "teacher", {"a": "one", "b": "two\nlines", "d": "four", "c": "x"})
    found, absent = read(tmp_path)
    assert list(found) == ["a", "b", "c"] and absent == []
    assert list(found["b"].items()) == [("teacher", "two lines"), ("distilled", "2")]
    assert found["c"]["distilled"] == "–"


def test_many_and_long_ones_are_cut(tmp_path):
    write(tmp_path, "pruned", {f"prompt {number}": "x" * 5000 for number in range(MOST_PROMPTS + 1)})
    found, absent = read(tmp_path)
    assert len(found) == MOST_PROMPTS and "Answers to 21 prompts" in absent[0]
    assert all(len(answers["pruned"]) == LONGEST_ANSWER for answers in found.values())


@pytest.mark.parametrize("damaged", [b"{", b"[]\n", b"\xff\n", b'{"text": 1, "answer": []}\n'])
def test_a_damaged_file_is_named_and_the_others_are_shown(damaged, tmp_path):
    write(tmp_path, "teacher", {"a": "one"})
    (tmp_path / "evaluation" / "pruned.answers.jsonl").write_bytes(damaged)
    found, absent = read(tmp_path)
    if absent:
        assert found == {"a": {"teacher": "one"}} and "pruned.answers.jsonl:1" in absent[0]
    else:
        assert found == {}  # no prompt that both have


def test_pages_show_them_as_text(tmp_path):
    (tmp_path / "metrics.json").write_text('{"teacher": {"val_loss": 1.0}}')
    write(tmp_path, "teacher", {"<b>a": "<script>1</script> **x**"})
    html, markdown = render(read_run(tmp_path))
    assert "What they write" in html and "&lt;script&gt;1" in html and "<script" not in html and "&lt;b&gt;a" in html
    assert "- teacher: &lt;script&gt;1" in markdown and r"\*\*x" in markdown
