"""A training that is called again: it goes on where it was, says so, and takes nothing else for itself."""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.convert import convert
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA
from tests.nemo.grid_jobs import curve
from tests.nemo.test_grids import CHECKPOINTS

KILLS = int(os.environ.get("MINITRON_TEST_KILLS", "50"))
JOB = "tests.nemo.grid_jobs:train"
ALONE = (1, 1, False)


@pytest.fixture(scope="module")
def others(models, tmp_path_factory) -> Path:
    """A student of the teacher's shape, another one, and a second corpus that is as long as the first one."""
    folder = tmp_path_factory.mktemp("others")
    for seed in (7, 8):
        convert(make_llama(folder / f"{seed}_hf", GQA, seed=seed), folder / f"{seed}.nemo")
    return folder


class Run:
    """One ``distill`` command in a folder, called any number of times."""

    def __init__(self, zygote, models: Path, others: Path, folder: Path) -> None:
        self.zygote, self.folder, self._said = zygote, folder, folder.with_name(f"{folder.name}.said")
        self.student, self.prefix = str(others / "7.nemo"), str(models / "own_text_document")
        self.teacher = str(models / "model.nemo")

    def __call__(self, *extra: str, steps: int = 8, kill: tuple[int, bool, float] | None = None) -> None:
        keys = (*CHECKPOINTS, f"model.kd_teacher_restore_from_path={self.teacher}", *extra)
        files = (self.student, self.prefix, str(self.folder))
        job, how = (f"{JOB}_killed", kill) if kill else (f"{JOB}_aloud", ())
        self.zygote.run(job, 1, *how, str(self._said), "distill", *files, ALONE, steps, keys)

    def said(self) -> str:
        """What the last call printed."""
        return self._said.read_text()

    def table(self) -> list[dict[str, str]]:
        """Rows of metrics.csv without what a clock says."""
        (path,) = self.folder.glob("exp/**/csv/metrics.csv")
        with path.open() as stream:
            rows = list(csv.DictReader(stream))
        clocks = {name for name in rows[0] if name.endswith("timing in s")} | {"tokens_per_second"}
        rows = [{name: value for name, value in row.items() if name not in clocks} for row in rows]
        return [row for row in rows if any(value for name, value in row.items() if name != "step")]

    def contents(self) -> list[str]:
        found = []
        for name in ("trained.nemo", "trained.last.nemo"):
            with NemoReader(self.folder / name) as reader:
                found.append(reader.fingerprint())
        return found


@pytest.fixture(scope="module")
def start(zygote, models, others):
    def run(folder: Path) -> Run:
        folder.mkdir(exist_ok=True)
        return Run(zygote, models, others, folder)

    return run


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Run:
    run = start(tmp_path_factory.mktemp("whole"))
    run()
    return run


def begins_at(run: Run) -> str:
    """What the next call has to say, from the names of the checkpoints alone."""
    found = list(run.folder.glob("exp/**/checkpoints/*step=*"))
    marked = {path.name.removesuffix("-unfinished") for path in found if path.is_file()}
    steps = [
        int(path.name.split("step=")[1].split("-")[0]) for path in found if path.is_dir() and path.name not in marked
    ]
    return f"distill: resuming at step {max(steps)} of " if steps else "distill: starting anew: "


def test_killed_it_ends_as_if_nothing_had_happened(start, whole, tmp_path):
    """Before the first checkpoint, in the middle of writing one, and after it; table, best and last model are those of
    one run."""
    run = start(tmp_path)
    for step, writing in ((1, False), (4, True), (5, False)):
        expected = begins_at(run)
        with pytest.raises(RuntimeError, match="died"):
            run(kill=(step, writing, 0.02))
        assert run.said().startswith(expected)
    run()
    assert "distill: resuming at step 4 of 8 from" in run.said()
    assert run.table() == whole.table()
    assert [int(row["step"]) for row in run.table() if row["train_lm_loss"]] == list(range(8))
    assert run.contents() == whole.contents()


@pytest.mark.slow
def test_fifty_kills(start, tmp_path):
    """Every second one while a checkpoint is written; after each the run says where it goes on, and its losses are
    those of a run that nobody disturbed, to the last bit."""
    steps, kills, choose = 40, 0, random.Random(20)
    whole = start(tmp_path / "whole")
    whole(steps=steps)
    while kills < KILLS:
        run, step = start(tmp_path / f"from{kills}"), 0
        for number in itertools.count():
            expected = begins_at(run)
            step += choose.randint(1, 3)
            try:
                run(steps=steps, kill=(step, number % 2 == 1, choose.random() * choose.choice((0.05, 0.5))))
            except RuntimeError as error:
                assert "died" in str(error)
                kills += 1
                print(f"{kills} kills: {run.said().splitlines()[0]}", flush=True)
                assert run.said().startswith(expected)
                continue
            break
        assert run.said().startswith(expected)
        assert run.table() == whole.table() and run.contents() == whole.contents()


def test_a_finished_run_says_so_or_writes_what_is_asked_for(start, whole, tmp_path):
    run = start(tmp_path)
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    (record,) = tmp_path.glob("exp/**/run.json")
    record.write_text(record.read_text().replace(str(whole.folder), str(tmp_path)))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.nemo")}
    run()
    assert f"finished before, at step 8 of 8 in {record.parent}: {tmp_path}/trained.nemo is there" in (run.said())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.nemo")} == before
    run(f"model.nemo_path={tmp_path}/second.nemo")
    for name in ("second.nemo", "second.last.nemo"):
        with NemoReader(tmp_path / name) as a, NemoReader(tmp_path / name.replace("second", "trained")) as b:
            assert a.fingerprint() == b.fingerprint()
    assert run.table() == whole.table()


REFUSED = {
    "model.restore_from_path": ["model.restore_from_path={others}/8.nemo"],
    "model.kd_teacher_restore_from_path": ["model.kd_teacher_restore_from_path={others}/8.nemo"],
    "model.data.data_prefix": ["model.data.data_prefix={{train:[{copy}],validation:[{copy}]}}"],
    "model.data.seq_length": ["model.data.seq_length=16"],
    "model.global_batch_size": ["model.global_batch_size=4"],
    "seed": ["seed=7"],
    "model.optim.lr": ["model.optim.lr=2e-3"],
    "distill.temperature": ["distill.temperature=2.0"],
    "trainer.max_steps": ["trainer.max_steps=12"],
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_the_same_training_is_refused_by_name(key, start, whole, others, tmp_path):
    copy = tmp_path / "copy"
    if "data_prefix" in key:  # one token differs, sizes and dates do not
        for suffix in (".bin", ".idx"):
            shutil.copy2(f"{whole.prefix}{suffix}", f"{copy}{suffix}")
        tokens = np.memmap(f"{copy}.bin", dtype=np.uint16, mode="r+")
        tokens[-1] ^= 1
        tokens.flush()
        stat = os.stat(f"{whole.prefix}.bin")
        os.utime(f"{copy}.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changes = [change.format(others=others, copy=copy) for change in REFUSED[key]]
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")}
    with pytest.raises(RuntimeError, match=rf"MinitronError: {key.replace('.', '[.]')}"):
        whole(*changes)
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")} == before


@pytest.mark.slow
def test_without_a_schedule_a_longer_run_goes_on_as_one_of_that_length(start, tmp_path):
    short, long = start(tmp_path / "short"), start(tmp_path / "long")
    flat = "~model.optim.sched"
    short(flat, steps=4)
    short(flat, "trainer.val_check_interval=2", steps=6)
    long(flat, steps=6)
    assert curve(short.folder, "train_kd_loss") == curve(long.folder, "train_kd_loss")
    with pytest.raises(RuntimeError, match=r"MinitronError: trainer\.max_steps: over 4000 steps the data would have"):
        short(flat, steps=4000)


def test_an_unfinished_checkpoint_is_named(start, whole, tmp_path):
    run = start(tmp_path)
    shutil.copytree(whole.folder / "exp", tmp_path / "exp")
    (folder,) = tmp_path.glob("exp/**/checkpoints")
    for path in folder.iterdir():
        if path.is_dir():
            folder.joinpath(f"{path.name}-unfinished").touch()
    with pytest.raises(RuntimeError, match="died"):
        run(kill=(1, False, 0.0))
    assert "starting anew:" in (said := run.said()) and "was not finished when the earlier" in said
    with pytest.raises(RuntimeError, match="resume_ignore_no_checkpoint=false: expected a checkpoint"):
        run("exp_manager.resume_ignore_no_checkpoint=false")


def test_a_training_anew_sets_earlier_checkpoints_aside(start, whole, tmp_path):
    run = start(tmp_path)
    shutil.copytree(whole.folder / "exp", tmp_path / "exp")
    (folder,) = tmp_path.glob("exp/**/checkpoints")
    names = {path.name for path in folder.iterdir()}
    explicit = f"exp_manager.explicit_log_dir={folder.parent}"
    with pytest.raises(RuntimeError, match="died"):
        run("exp_manager.resume_if_exists=false", explicit, kill=(1, False, 0.0))
    assert "the checkpoints of an earlier run are in" in run.said()
    assert {path.name for path in folder.with_name("checkpoints_0").iterdir()} == names
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_documents_preprocessed_anew_are_the_ones_that_are_trained_on(zygote, models, tmp_path):
    """Under the same prefix, with an index of the earlier ones at hand; then fewer, which that index is beyond."""
    texts = [f"Document {i} tells of topic {i % 7} and of number {i * i}. " * 6 for i in range(60)]

    def distil(name: str, index: str) -> dict[int, float]:
        run = tmp_path / name
        keys = (f"model.kd_teacher_restore_from_path={models}/model.nemo", f"model.data.index_mapping_dir={index}")
        files = (str(models / "model.nemo"), str(tmp_path / "corpus_text_document"), str(run))
        zygote.run(JOB, 1, "distill", *files, ALONE, 3, keys)
        return curve(run)

    def corpus(documents: list[str]) -> None:
        path = tmp_path / "corpus.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        preprocess(str(path), tmp_path / "corpus", tokenizer_type=str(models / "hf"))

    shared = str(tmp_path / "shared")
    corpus(texts)
    first = distil("first", shared)
    again = distil("again", shared)
    corpus(texts[:30] + ["ZEBRA " * 40 + text for text in texts[30:]])
    second = distil("second", shared)
    assert second == distil("fresh", str(tmp_path / "other")) != first == again
    corpus(texts[:10])
    assert distil("few", shared) == distil("few_fresh", str(tmp_path / "third"))
    assert not list(tmp_path.glob("**/.*.tmp")) and not (tmp_path / "corpus_text_document").exists()


def test_tokens_in_a_read_only_folder(zygote, models, tmp_path):
    """Nothing is written beside them, wherever the index goes by default."""
    data = tmp_path / "data"
    data.mkdir()
    for path in models.glob("own_text_document.*"):
        shutil.copy(path, data)
    before = sorted(path.name for path in data.iterdir())
    data.chmod(0o555)
    try:
        files = (str(models / "model.nemo"), str(data / "own_text_document"), str(tmp_path / "run"))
        zygote.run(JOB, 2, "finetune", *files, ALONE, 2, ("model.data.index_mapping_dir=null",))
        assert sorted(path.name for path in data.iterdir()) == before
        (index,) = (tmp_path / "run").glob("exp/**/index/*")
        assert list(index.glob("*.npy"))
    finally:
        data.chmod(0o755)
