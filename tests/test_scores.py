"""Scores folders: faithful, deterministic, refused when foreign or damaged."""

import dataclasses
import json

import numpy as np
import pytest

from nemo_minitron.errors import MinitronError
from nemo_minitron.scores import Scores, array_sizes
from nemo_minitron.shape import ModelShape, RopeScaling

SHAPE = ModelShape(2, 16, 24, 4, 2, 8, 30, 32, rope_scaling=RopeScaling(factor=32.0))


def make(**changes):
    rng = np.random.default_rng(0)
    arrays = {name: rng.random(size) for name, size in array_sizes(SHAPE).items()}
    return Scores(
        **{
            "shape": SHAPE,
            "source_fingerprint": "w" * 64,
            "data_fingerprint": "d" * 64,
            "calibration": {"num_samples": 3, "sequence": "mean"},
            **arrays,
            **changes,
        }
    )


def test_round_trip_is_exact_and_deterministic(tmp_path):
    scores = make()
    for name in "ab":
        (tmp_path / name).mkdir()
        scores.write(tmp_path / name)
    loaded = Scores.load(tmp_path / "a")
    for name in array_sizes(SHAPE):
        assert np.array_equal(getattr(loaded, name), getattr(scores, name))
    assert loaded.shape == SHAPE and loaded.calibration == scores.calibration
    assert loaded.fingerprint() == scores.fingerprint() != make(data_fingerprint="e").fingerprint()
    for name in ("scores.json", "arrays.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "scores.json").read_text())["calibration"]["num_samples"] == 3


def test_arrays_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        make().ffn[0, 0] = 1.0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_refused_by_name(value):
    bad = np.zeros((2, 24))
    bad[1, 3] = value
    with pytest.raises(MinitronError, match="'ffn' holds 1 NaN or infinite"):
        make(ffn=bad)


def test_wrong_size_is_refused():
    with pytest.raises(MinitronError, match=r"'heads' must have size \[2, 4\], found \[4, 2\]"):
        make(heads=np.zeros((4, 2)))


def test_scores_of_another_checkpoint_are_refused():
    scores = make()
    scores.check_matches("w" * 64, SHAPE)
    with pytest.raises(MinitronError, match="weights wwwwwwwwwwwwwwww, but this checkpoint's are vvvv"):
        scores.check_matches("v" * 64, SHAPE)
    with pytest.raises(MinitronError, match="hidden_size 16, but this checkpoint has 20"):
        scores.check_matches("w" * 64, dataclasses.replace(SHAPE, hidden_size=20))


def test_damage_is_noticed(tmp_path):
    (tmp_path / "s").mkdir()
    make().write(tmp_path / "s")
    with pytest.raises(MinitronError, match="not a scores folder"):
        Scores.load(tmp_path / "missing")
    text = (tmp_path / "s" / "scores.json").read_text()
    (tmp_path / "s" / "scores.json").write_text(text.replace('"num_samples": 3', '"num_samples": 4'))
    with pytest.raises(MinitronError, match="altered or damaged"):
        Scores.load(tmp_path / "s")
    (tmp_path / "s" / "scores.json").write_text(text)
    npz = (tmp_path / "s" / "arrays.npz").read_bytes()
    (tmp_path / "s" / "arrays.npz").write_bytes(npz[: len(npz) // 2])
    with pytest.raises(MinitronError, match="cannot read"):
        Scores.load(tmp_path / "s")


def test_pickled_or_oversized_arrays_are_refused(tmp_path):
    (tmp_path / "s").mkdir()
    make().write(tmp_path / "s")
    arrays = {name: getattr(make(), name) for name in array_sizes(SHAPE)}
    np.savez(tmp_path / "s" / "arrays.npz", **{**arrays, "hidden": np.array([object()] * 16, dtype=object)})
    with pytest.raises(MinitronError):
        Scores.load(tmp_path / "s")
    np.savez(tmp_path / "s" / "arrays.npz", **{**arrays, "hidden": np.zeros(100_000)})
    with pytest.raises(MinitronError, match="'hidden' is larger"):
        Scores.load(tmp_path / "s")
