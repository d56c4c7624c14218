"""The lines that a report gives for its student run as they stand, whatever the folder is called."""

from __future__ import annotations

import ast
import shlex

import pytest

from nemo_minitron.config.compose import compose
from nemo_minitron.report.page import render
from nemo_minitron.report.run_folder import Run
from nemo_minitron.report.use import use


def run_with(folder, *files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return Run(folder, folder.name)


def composed(line):
    program, command, *words = shlex.split(line)
    assert program == "minitron"
    return compose(command, words)


def test_without_a_student_nothing_is_said(tmp_path):
    assert use(run_with(tmp_path, "recipe.yaml")) == ("", [])


def test_the_better_student_is_named(tmp_path):
    where, _ = use(run_with(tmp_path, "pruned.nemo"))
    assert where == f"The student (pruned and not distilled) is {tmp_path}/pruned.nemo."
    where, _ = use(run_with(tmp_path, "distilled.nemo", "hf/config.json"))
    assert where == (
        f"The student (distilled) is {tmp_path}/distilled.nemo, and as a Hugging Face folder {tmp_path}/hf."
    )


@pytest.mark.parametrize("name", ["run", "a b", "ü", "a=b", "it's", 'say "x"', "f(1),[2]"])
@pytest.mark.parametrize("exported", [False, True])
def test_every_line_says_its_path(name, exported, tmp_path):
    folder = tmp_path / name
    _, ways = use(run_with(folder, "distilled.nemo", *(["hf/config.json"] if exported else [])))
    lines = {what: code for what, _, code in ways}
    assert composed(lines["Talk to it"]).model.restore_from_path == str(folder / "distilled.nemo")
    assert ("As a Hugging Face folder" in lines) != exported
    if not exported:
        assert composed(lines["As a Hugging Face folder"]).output_path == str(folder / "hf")
    texts = [node.value for node in ast.walk(ast.parse(lines["transformers"])) if isinstance(node, ast.Constant)]
    assert texts == [str(folder / "hf")] * 2
    assert shlex.split(lines["vLLM"]) == ["vllm", "serve", str(folder / "hf")]
    make, talk = lines["llama.cpp"].splitlines()
    assert composed(make).output_path == shlex.split(talk)[-1] == str(folder / "student.gguf")


def test_both_pages_show_them(tmp_path):
    run = run_with(tmp_path, "distilled.nemo", "hf/config.json")
    html, markdown = render(run)
    for page in (html, markdown):
        assert "Use it" in page and f"vllm serve {tmp_path}/hf" in page
    assert "Use it" not in render(run_with(tmp_path / "empty", "recipe.yaml"))[0]
