"""The two ends of a stage whose processes srun starts: the same records as a run's, and its errors in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_minitron.config.compose import compose
from nemo_minitron.recipe import walk
from nemo_minitron.recipe.job import UP_TO_DATE, main

STAGE = {
    "command": "convert",
    "config": {"input_name_or_path": "source", "output_path": "run/a.nemo"},
    "inputs": ["source"],
    "outputs": ["run/a.nemo"],
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("source").write_text("weights")
    Path("run").mkdir()
    recipe = {"name": "demo", "order": ["first"], "stages": {"first": STAGE}}
    OmegaConf.save(compose("run", ["run_dir=run"], config={"recipe": recipe}), "run.yaml")


def job(*words: str) -> int:
    return main([words[0], "run.yaml", "first", *words[1:]], compose)


def record() -> dict:
    return json.loads(Path("run/.stages/first.json").read_text())


def test_a_stage_begins_and_ends_as_in_a_run(capsys, monkeypatch):
    assert job("begin") == 0
    assert record()["state"] == "started" and not record()["resumed"]
    assert OmegaConf.load("run/.stages/first.yaml").output_path == "run/a.nemo"
    Path("run/a.nemo").write_text("done")
    assert job("end", "0") == 0
    assert record()["state"] == "done" and record()["seconds"] >= 0 and "torch" in record()["versions"]
    assert job("begin") == UP_TO_DATE
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "first: running minitron convert" and out[1].startswith("first: done in")
    assert out[2].startswith("first: up to date, skipped") and Path("run/recipe.yaml").is_file()

    monkeypatch.setattr(walk, "_launch", lambda argv: pytest.fail("a run knows it as done"))
    from nemo_minitron.config.compose import Source, configure

    walk.run(configure("run", source=Source(path=".", name="run.yaml")), compose)


@pytest.mark.parametrize(
    ("code", "written", "said"),
    [
        ("137", True, "stage 'first' failed (minitron convert, exit status 137"),
        ("0", False, "stage 'first' ended well but did not write run/a.nemo"),
    ],
)
def test_what_went_wrong_is_told_and_the_stage_begins_again(capsys, code, written, said):
    assert job("begin") == 0
    if written:
        Path("run/a.nemo").write_text("half")
    assert job("end", code) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"minitron: {said}") and record()["state"] == "started"
    assert job("begin") == 0 and record()["resumed"]
    assert "first: resuming minitron convert" in capsys.readouterr().out


def test_an_absent_input(capsys):
    Path("source").unlink()
    assert job("begin") == 2
    assert capsys.readouterr().err == "minitron: stage 'first': input source does not exist\n"
    assert not Path("run/.stages/first.json").exists()
