"""Scores folders: faithful, deterministic, refused when foreign or damaged."""

import dataclasses
import io
import json
import os
import tracemalloc
import zipfile

import numpy as np
import pytest

from nemo_minitron.errors import MinitronError
from nemo_minitron.importance.scores import Scores, array_sizes
from nemo_minitron.model.shape import ModelShape, RopeScaling

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
    with pytest.raises(MinitronError, match="expected a zip"):
        Scores.load(tmp_path / "s")


def test_pickled_or_oversized_arrays_are_refused(tmp_path):
    (tmp_path / "s").mkdir()
    make().write(tmp_path / "s")
    arrays = {name: getattr(make(), name) for name in array_sizes(SHAPE)}
    np.savez(tmp_path / "s" / "arrays.npz", **{**arrays, "hidden": np.array([object()] * 16, dtype=object)})
    with pytest.raises(MinitronError):
        Scores.load(tmp_path / "s")
    np.savez(tmp_path / "s" / "arrays.npz", **{**arrays, "hidden": np.zeros(100_000)})
    with pytest.raises(MinitronError, match=r"array 'hidden' must have size \[16\], found \[100000\]"):
        Scores.load(tmp_path / "s")


def header(text, major=1):
    """A ``.npy`` header of ``text``, and no values."""
    data = text.encode()
    return b"\x93NUMPY" + bytes([major, 0]) + len(data).to_bytes(2 if major == 1 else 4, "little") + data


def npy(array):
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def claim(descr="'<f8'", shape="(16,)", order="False"):
    return header(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}\n")


def infected(value, name="hidden"):
    array = np.array(getattr(make(), name))
    array.flat[0] = value
    return {name: npy(array)}


HOSTILE = {
    "shape of 8 TB": ({"hidden": claim(shape="(1099511627776,)") + b"\0" * 128}, "'hidden'"),
    "shape that overflows": ({"hidden": claim(shape=f"({2**62}, {2**62})")}, "'hidden'"),
    "negative shape": ({"hidden": claim(shape="(-2, -8)") + b"\0" * 128}, "'hidden'"),
    "shape of text": ({"hidden": claim(shape="'abc'")}, "'hidden'"),
    "many dimensions": ({"hidden": claim(shape=f"({'1,' * 60})") + b"\0" * 8}, "'hidden'"),
    "objects": ({"hidden": npy(np.array([object()] * 16, dtype=object))}, "expected numbers"),
    "wide values": ({"hidden": claim(descr="'V4000000000'")}, "'hidden'"),
    "text values": ({"hidden": npy(np.array(["a"] * 16))}, "'hidden' must hold numbers"),
    "complex values": ({"hidden": npy(np.zeros(16, complex))}, "'hidden' must hold numbers"),
    "no header": ({"hidden": b"\0" * 300}, "'hidden'"),
    "version 9": ({"hidden": header("{}", 9)}, "'hidden'"),
    "header of 4 GB": ({"hidden": b"\x93NUMPY\x02\0\xff\xff\xff\xff{"}, "'hidden'"),
    "deep header": ({"hidden": header("(" * 3000)}, "'hidden'"),
    "code in the header": ({"hidden": header("__import__('os').abort()")}, "'hidden'"),
    "bytes too many": ({"hidden": npy(np.zeros(16)) + b"\0"}, "'hidden'"),
    "bytes too few": ({"hidden": npy(np.zeros(16))[:-1]}, "'hidden'"),
    "another size": ({"hidden": npy(np.zeros(17))}, r"'hidden' must have size \[16\], found \[17\]"),
    "absent": ({"hidden": None}, "has no array 'hidden'"),
    "NaN": (infected(np.nan), "'hidden' holds 1 NaN or infinite"),
    "infinity": (infected(-np.inf, "ffn_rms"), "'ffn_rms' holds 1 NaN or infinite"),
    "tokens of 3 dimensions": ({"tokens": npy(np.zeros((1, 2, 3), np.int32))}, "sensitivity"),
    "tokens beyond the vocabulary": (
        {"tokens": npy(np.full((1, 2), 30, np.int32)), "sensitivity": npy(np.zeros((4, 1, 2), np.float32))},
        "ids from 0 to 29",
    ),
    "sensitivity of other tokens": (
        {"tokens": npy(np.zeros((1, 2), np.int32)), "sensitivity": npy(np.zeros((4, 9, 9), np.float32))},
        "'sensitivity' must have size",
    ),
    "half of the ranks": ({"ffn_rank": npy(np.zeros((2, 24)))}, "expected the ranks"),
}


def pack(folder, changes, compression=zipfile.ZIP_STORED):
    """Good scores of which some members are others."""
    make().write(folder)
    with zipfile.ZipFile(folder / "arrays.npz") as good:
        members = {name.removesuffix(".npy"): good.read(name) for name in good.namelist()}
    with zipfile.ZipFile(folder / "arrays.npz", "w", compression) as out:
        for name, data in (members | changes).items():
            if data is not None:
                out.writestr(f"{name}.npy", data)


def refused(folder, message):
    tracemalloc.start()
    with pytest.raises(MinitronError, match=message) as caught:
        Scores.load(folder)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    said = str(caught.value)
    assert said.startswith("prune.scores: ") and "\n" not in said and len(said) < 600


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_arrays(case, tmp_path):
    changes, message = HOSTILE[case]
    pack(tmp_path, changes)
    refused(tmp_path, message)


def test_hostile_zips(tmp_path):
    pack(tmp_path, {"extra": b"\0" * (200 << 20)}, zipfile.ZIP_DEFLATED)
    refused(tmp_path, "compressed")
    pack(tmp_path, {str(n): b"" for n in range(100)})
    refused(tmp_path, "at most 64 entries")
    pack(tmp_path, {})
    assert Scores.load(tmp_path).fingerprint() == make().fingerprint()
    data = (tmp_path / "arrays.npz").read_bytes()
    (tmp_path / "arrays.npz").write_bytes(data.replace(b"ffn_rms.npy", b"ffn.npy\0\0\0\0"))
    refused(tmp_path, "arrays.npz")
    at = data.rindex(b"PK\x05\x06") + 16
    directory = int.from_bytes(data[at : at + 4], "little")
    second = data.index(b"PK\x01\x02", directory + 1)
    first = data[directory + 42 : directory + 46]  # where the first member lies: the second one lies there, too
    (tmp_path / "arrays.npz").write_bytes(data[: second + 42] + first + data[second + 46 :])
    refused(tmp_path, "overlap|'ffn'|'heads'")
    (tmp_path / "arrays.npz").unlink()
    os.mkfifo(tmp_path / "arrays.npz")
    refused(tmp_path, "regular file")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"hidden_size": 16', '"hidden_size": 1000000000', r"must have size"),
        ('"hidden_size": 16', f'"hidden_size": {"9" * 5000}', "expected JSON"),
        ('"hidden_size": 16', '"hidden_size": 16, "hidden_size": 16', "'hidden_size' given twice"),
        ('"calibration": {', '"calibration": 7, "other": {', "cannot read"),
        ('"calibration": {', f'"other": {"[" * 99_999}, "calibration": {{', "expected JSON"),
        ('"rope_scaling": {', '"rope_scaling": 7, "other": {', "cannot read"),
        ('"format": "nemo_minitron', '"format": "other', "expected format"),
        ('"shape": {', '"shape": {}, "other": {', "cannot read"),
    ],
)
def test_hostile_metadata(old, new, message, tmp_path):
    pack(tmp_path, {})
    text = (tmp_path / "scores.json").read_text()
    assert old in text
    (tmp_path / "scores.json").write_text(text.replace(old, new))
    refused(tmp_path, message)


def test_another_models_scores_are_refused_before_an_array_is_read(tmp_path):
    pack(tmp_path, {"hidden": b""})
    with pytest.raises(MinitronError, match="measured on a model with num_layers 2, but this checkpoint has 3"):
        Scores.load(tmp_path, SHAPE.replace(num_layers=3))
