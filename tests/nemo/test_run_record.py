"""What a training is of: a teacher by its weights or by a cache of its answers, and all that changes a gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.nemo.run_record import RunRecord, identity
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA

TEACHER = "model.kd_teacher_restore_from_path"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed in (7, 8):
        convert(make_llama(folder / f"{seed}_hf", GQA, seed=seed), folder / f"{seed}.nemo")
        with NemoReader(folder / f"{seed}.nemo") as reader:
            (folder / f"cache{seed}").mkdir()
            (folder / f"cache{seed}" / "cache.json").write_text(json.dumps({"teacher": reader.fingerprint()}))
    return folder


def asked(home: Path, teacher: int | None = 7, cache: int | None = None, **changes: Any) -> dict[str, Any]:
    """Identity of a distillation with the teacher of one seed, or with the answers of that of another."""
    model: dict[str, Any] = {"data": {"data_prefix": ["x"], "seq_length": 8}, "global_batch_size": 2, "seed": 1}
    distill = {"loss": "topk", "teacher_cache": None if cache is None else str(home / f"cache{cache}")}
    cfg = OmegaConf.create(
        {"model": {**model, "restore_from_path": str(home / "7.nemo")}, "distill": distill, "trainer": {}}
    )
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return identity("distill", cfg, cfg.model, None if teacher is None else str(home / f"{teacher}.nemo"), {"x": "c"})


def check(tmp_path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    RunRecord(tmp_path).write(identity=before)
    record = RunRecord(tmp_path)
    assert record.read()
    record.check_identity(now)


def test_a_cache_stands_for_its_own_teacher_alone(home, tmp_path):
    for before in (asked(home), asked(home, cache=7), asked(home, None, 7)):
        for now in (asked(home), asked(home, cache=7), asked(home, None, 7)):
            check(tmp_path, before, now)
        for other in (asked(home, 8), asked(home, 8, cache=8), asked(home, None, 8)):
            with pytest.raises(MinitronError, match=rf"^{TEACHER}: .*8.* is not .*7.*, with which the training"):
                check(tmp_path, before, other)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("trainer.gradient_clip_val", 1.0, "1.0 is not None"),
        ("model.hidden_dropout", 0.1, r"0\.1 is not 0\.0"),
        ("model.attention_dropout", 0.1, r"0\.1 is not 0\.0"),
    ],
)
def test_what_changes_a_gradient_is_compared(home, tmp_path, key, value, said):
    before, now = asked(home), asked(home, **{key.replace(".", "__"): value})
    with pytest.raises(MinitronError, match=f"^{key}: {said}, with which the training"):
        check(tmp_path, before, now)
    check(tmp_path, now, now)
    check(tmp_path, {name: was for name, was in before.items() if name != key}, now)  # of an earlier version


def test_no_clipping_is_said_in_two_ways(home, tmp_path):
    check(tmp_path, asked(home), asked(home, trainer__gradient_clip_val=0.0))


def test_a_record_of_before_knows_no_weights(home, tmp_path):
    before = asked(home)
    del before[TEACHER]["weights"]
    check(tmp_path, before, asked(home, None, 8))
    with pytest.raises(MinitronError, match=f"^{TEACHER}: "):
        check(tmp_path, before, asked(home, 8))
    check(tmp_path, {**before, TEACHER: None}, asked(home, None, 7))


def test_the_trusted_fingerprint_is_that_of_all_tensors(home, tmp_path):
    padded = convert(home / "7.nemo", tmp_path / "p.nemo", make_vocab_size_divisible_by=512)
    for path in (home / "7.nemo", padded):
        with NemoReader(path) as one, NemoReader(path) as other:
            assert one.fingerprint(trust=True) == other.fingerprint()
