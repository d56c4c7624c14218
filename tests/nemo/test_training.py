"""A training: which models it leaves, what it logs, and what it refuses before it starts, replacing nothing."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from pathlib import Path

import pytest

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.cli import main
from nemo_minitron.errors import MinitronError
from tests.nemo.grid_jobs import curve

LOSSES = ("kd_loss", "lm_loss", "top1_agreement")
LOGGED = {f"{part}_{name}" for part in ("train", "val") for name in LOSSES} | {
    "val_loss",
    "tokens",
    "tokens_per_second",
}


def test_best_and_last_are_kept_and_losses_logged_by_name(models, zygote, tmp_path):
    """A student that starts as its teacher and learns the text alone leaves it: the first validation is the best."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def distil(folder: Path, steps: int) -> dict[int, float]:
        keys = (
            f"model.kd_teacher_restore_from_path={models}/model.nemo",
            "distill.monitor=val_kd_loss",
            "trainer.val_check_interval=2",
            "distill.kd_weight=1e-6",
            "distill.lm_weight=1",
            "~model.optim.sched",  # else the rate depends on how many steps there will be
        )
        files = (str(models / "model.nemo"), str(models / "own_text_document"), str(folder))
        zygote.run("tests.nemo.grid_jobs:train", 1, "distill", *files, (1, 1, False), steps, keys)
        return curve(folder, "val_kd_loss")

    short, long = distil(tmp_path / "short", 2), distil(tmp_path / "long", 6)
    assert len(short) == 1 and len(long) == 3 and min(long, key=long.__getitem__) == next(iter(short))
    digests = {}
    for name in ("short/trained.nemo", "short/trained.last.nemo", "long/trained.nemo", "long/trained.last.nemo"):
        with NemoReader(tmp_path / name) as reader:
            digests[name] = reader.fingerprint()
    assert digests["long/trained.nemo"] == digests["short/trained.last.nemo"] == digests["short/trained.nemo"]
    assert digests["long/trained.last.nemo"] != digests["long/trained.nemo"]

    (table,) = tmp_path.glob("long/exp/**/csv/metrics.csv")
    with table.open() as stream:
        assert set(csv.DictReader(stream).fieldnames) >= LOGGED
    (events,) = tmp_path.glob("long/exp/**/events.out.tfevents.*")
    board = EventAccumulator(str(events)).Reload()
    assert set(board.Tags()["scalars"]) >= LOGGED
    assert [e.value for e in board.Scalars("val_kd_loss")] == pytest.approx(list(long.values()), rel=1e-6)


CASES = {
    "missing checkpoint": (
        ["model.restore_from_path=DIR/absent.nemo"],
        "restore_from_path: expected a .nemo file or folder, found nothing at",
    ),
    "no model_weights": (["model.restore_from_path=DIR/bare"], "expected the member model_weights/"),
    "truncated": (["model.restore_from_path=DIR/cut.nemo"], "unexpected end of data"),
    "missing tokens": (["PREFIX=DIR/absent"], "absent"),
    "tokens of another vocabulary": (["PREFIX=DIR/permuted_text_document"], "another vocabulary"),
    "ids beyond the vocabulary": (
        ["PREFIX=DIR/foreign_text_document"],
        "out of range for the model's vocabulary of 320",
    ),
    "tokens cut short": (["PREFIX=DIR/short_text_document"], "its index says"),
    "checkpoints without a step": (
        ["exp_manager.checkpoint_callback_params.filename='model-{val_loss}'"],
        "expected '{step}' in it",
    ),
    "sequence too long": (["model.data.seq_length=1000"], "max_position_embeddings=128"),
    "batch does not divide": (["model.global_batch_size=3", "model.micro_batch_size=2"], "model.global_batch_size (3)"),
    "unwritable": (["model.nemo_path=OUT/file/out.nemo"], "expected a writable destination"),
    "seed of zero": (["seed=0"], "seed: expected at least 1"),
    "output is the input": (["model.nemo_path=DIR/model.nemo"], "choose another name"),
}
TEACHERS = {
    "missing teacher": ("absent.nemo", "restore_from_path: expected a .nemo file or folder, found nothing at"),
    "teacher without model_weights": ("bare", "expected the member model_weights/"),
    "teacher of another vocabulary": ("larger.nemo", "the teacher's vocabulary has 400 tokens, the student's 320"),
    "teacher of a permuted vocabulary": ("permuted.nemo", "teacher and student tokenizers differ: token 'a'"),
    "teacher of fewer positions": ("short.nemo", "max_position_embeddings=16"),
}
LATE = ("tokens of another vocabulary", "teacher of a permuted vocabulary")  # known once a tokenizer is loaded


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in ("finetune", "distill") for case in CASES] + [("distill", case) for case in TEACHERS],
)
def test_bad_input_leaves_the_destination_untouched(name, case, models, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "out.nemo").write_text("an earlier model")
    (out / "file").write_text("in the way")
    teacher, message = TEACHERS.get(case, ("model.nemo", ""))
    changes, message = CASES.get(case, ([], message))
    replace = {"DIR": str(models), "OUT": str(out)}
    changes = [key.replace("DIR", replace["DIR"]).replace("OUT", replace["OUT"]) for key in changes]
    prefix = next((key[7:] for key in changes if key.startswith("PREFIX=")), f"{models}/own_text_document")
    keys = [
        f"model.restore_from_path={models}/model.nemo",
        f"model.nemo_path={out}/out.nemo",
        f"model.data.data_prefix={{train: [{prefix}], validation: [{prefix}]}}",
        "model.data.seq_length=32",
        "model.global_batch_size=1",  # NeMo keeps one per process, and other tests of this process run forward alone
        f"exp_manager.exp_dir={tmp_path}/exp",
        *([f"model.kd_teacher_restore_from_path={models}/{teacher}"] if name == "distill" else []),
        *(key for key in changes if not key.startswith("PREFIX=")),
    ]
    before = (models / "model.nemo").read_bytes()
    assert main([name, *keys]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minitron:")]
    assert message in line
    assert {p.name: p.read_text() for p in out.iterdir()} == {"out.nemo": "an earlier model", "file": "in the way"}
    assert (models / "model.nemo").read_bytes() == before
    assert (tmp_path / "exp").exists() == (case in LATE)


def test_attention_of_transformer_engine_takes_no_documents():
    """It is asked before any weight is read; with torch's attention, or over whole samples, all is well."""
    from omegaconf import OmegaConf

    from nemo_minitron.nemo.training import _check_attention

    for engine, apart in ((True, True), (True, False), (False, True)):
        job = OmegaConf.create({"transformer_engine": engine, "data": {"reset_attention_mask": apart}})
        with (
            pytest.raises(MinitronError, match=r"set model\.transformer_engine=false")
            if engine and apart
            else nullcontext()
        ):
            _check_attention(job)
