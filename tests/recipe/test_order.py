"""Which stages read what others write, of every shipped recipe and of ones that say less."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_minitron.config.compose import compose, configure, group_options
from nemo_minitron.recipe import Stage, load_stages
from nemo_minitron.recipe.order import readers


def stage(name: str, inputs=(), outputs=(), config=None, work=None) -> Stage:
    return Stage(name, "convert", OmegaConf.create(config or {}), tuple(inputs), tuple(outputs), work)


@pytest.mark.parametrize("name", group_options("recipe"))
def test_shipped_recipes(name, tmp_path):
    given = [] if name == "tiny" else [f"recipe.settings.source={tmp_path}/given"]
    stages = load_stages(configure("run", [f"recipe={name}", f"run_dir={tmp_path}/run", *given]), compose)
    found = readers(list(stages.values()))
    data = ["preprocess_train", "preprocess_validation"]
    tuned = "finetune" if "finetune" in stages else "convert"
    assert found["convert"] == (("synthesize",) if name == "tiny" else ())
    assert found["preprocess_train"] == found["preprocess_validation"] == ("convert",)
    if tuned == "finetune":
        assert found["finetune"] == ("convert", *data)
    assert set(found["prune"]) == {tuned, "importance"} & stages.keys()
    assert set(found["distill"]) == {*data, tuned, "prune"}
    assert set(found["evaluate_pruned"]) == {"preprocess_validation", "prune"}
    assert found.get("export", ("distill",)) == ("distill",)
    assert found["report"] == tuple(name for name in stages if name != "report"), "it reads the whole folder"


@pytest.mark.parametrize(
    ("inputs", "config", "expected"),
    [
        (["run/a.nemo"], {}, ("first",)),
        (["run/./b"], {}, ("second",)),
        (["run/b/deep/file"], {}, ("second",)),
        (["run/*.nemo"], {}, ("first",)),
        (["run/data/train.*"], {}, ("third",)),
        (["run"], {}, ("first", "second", "third")),
        (["elsewhere"], {}, ()),
        (["elsewhere"], {"model": {"parts": [1.0, "run/data/train"]}}, ("third",)),
        (["elsewhere"], {"output_path": "run/own"}, ()),
        ([], {"name": "first"}, ("third",)),  # cannot tell: the one before
        ([], {"input": "run/a.nemo"}, ("first",)),
    ],
)
def test_what_a_stage_reads(inputs, config, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    earlier = [
        stage("first", outputs=["run/a.nemo"]),
        stage("second", ["x"], ["run/b"]),
        stage("third", ["x"], ["run/data/train.bin", "run/data/train.idx"]),
    ]
    assert readers([*earlier, stage("last", inputs, ["run/own"], config)])["last"] == expected


def test_what_it_writes_itself_is_not_read():
    first = stage("first", ["x"], ["run/work/index"])
    second = stage("second", ["x"], ["run/out"], {"dir": "run/work", "nemo_path": "run/out"}, Path("run/work"))
    assert readers([first, second])["second"] == ()
