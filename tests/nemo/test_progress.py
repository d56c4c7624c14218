"""A training's line: steps, losses as they are logged, validations; of the first process alone, or of none."""

from __future__ import annotations

import re

import pytest

from tests.jobs.terminal import screen, states
from tests.nemo.grid_jobs import curve
from tests.nemo.progress_jobs import SHOW

LINE = re.compile(
    r"distill(  [━─]+)?  step (?P<step>\d)/4(  validating (?P<batch>\d)/2)?(  loss (?P<loss>\d+\.\d{4}))?"
    r"(  val_loss (?P<val>\d+\.\d{4}))?(  [\d,]+ tokens/s)?(  (ETA|took) \d+:\d\d)?"
)


@pytest.fixture
def shown(models, zygote, tmp_path):
    """Runs four steps of a distillation; what each rank wrote."""

    def run(function, *first, world=1, grid=(1, 1, False), failing=False, keys=SHOW):
        files = (f"{models}/model.nemo", f"{models}/own_text_document", str(tmp_path))
        teacher = (f"model.kd_teacher_restore_from_path={models}/model.nemo", "distill.lm_weight=1")
        where = f"tests.nemo.progress_jobs:{function}"
        return zygote.run(where, world, *first, failing, "distill", *files, grid, 4, (*teacher, *keys))

    return run


def check(lines: list[str], folder) -> None:
    """Every state is a line of progress with the losses that ``metrics.csv`` has of its step."""
    found = [match for match in map(LINE.fullmatch, lines) if match]
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    train, validation = (curve(folder, name) for name in ("reduced_train_loss", "val_loss"))
    # a row's step is counted from 0
    of_step = {f"{step + 1}": f"{loss:.4f}" for step, loss in train.items()}
    told = {match["step"]: match["loss"] for match in found if match["loss"]}
    assert told == of_step and set(told) == set("1234")
    seen = {match["val"] for match in found if match["val"]}
    assert seen == {f"{loss:.4f}" for loss in validation.values()} and len(validation) == 2
    assert found[0]["step"] == "0" and [m["batch"] for m in found if m["batch"]] == ["1", "2"] * 2
    assert found[-1]["step"] == "4" and "took" in found[-1][0]


def test_in_a_terminal(shown, tmp_path):
    (text,) = shown("in_terminal", 100)
    said, *_ = [line for line in screen(text) if line.startswith("4 steps")]
    seen = [line for line in screen(text) if line.startswith("distill  ")]
    assert len(seen) == 1 and "val_loss" in seen[0] and "took" in seen[0], "one line, below which all else stands"
    lines = states(text)
    check([line for line in lines if line.startswith("distill  ")], tmp_path)
    assert all(len(line) < 100 for line in lines if line.startswith("distill  ")) and said in lines


def test_in_a_file(shown, tmp_path):
    (text,) = shown("to_file", str(tmp_path / "log"))
    assert not set(text) & {"\r", "\x1b"} and text.endswith("\n")
    lines = text.splitlines()
    check([line for line in lines if line.startswith("distill  ")], tmp_path)
    assert lines[-1].startswith("4 steps, ") and "" not in lines


def test_the_first_of_two_ranks_writes(shown):
    first, second = shown("in_terminal", 40, world=2, grid=(2, 1, False))
    lines = [line for line in states(first) if line.startswith("distill  ")]
    assert {re.search(r"step (\d)/4", line)[1] for line in lines} == set("01234")
    assert all(len(line) < 40 for line in lines) and "distill" not in second and "step" not in second


def test_a_loss_that_is_not_finite_is_told_below_the_line(shown):
    (text,) = shown("in_terminal", 100, failing=True)
    *_, line, error = [line for line in screen(text) if line]
    assert re.fullmatch(r"distill  step 2/4  .*  stopped after \d+:\d\d", line)
    assert error == "minitron: train_kd_loss is nan at step 2: training stopped"


def test_none_is_shown_unless_asked_for(shown):
    (text,) = shown("in_terminal", 100, keys=("++trainer.enable_progress_bar=false", *SHOW[1:]))
    assert "step 1/4" not in text and "\r" not in text.replace("\r\n", "\n")
