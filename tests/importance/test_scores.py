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
from nemo_minitron.importance.scores import Scores
from nemo_minitron.importance.scores_format import AXES, axis_sizes, statistic_sizes
from nemo_minitron.model.shape import ModelShape, RopeScaling
from tests.importance.made import made, write_format_1

SHAPE = ModelShape(2, 16, 24, 4, 2, 8, 30, 32, rope_scaling=RopeScaling(factor=32.0))


def make(reconstruction=False, **changes):
    facts = {"source_fingerprint": "w" * 64, "calibration": {"num_samples": 3, "sequence": "mean"}}
    return made(SHAPE, np.random.default_rng(0).random, reconstruction=reconstruction, **{**facts, **changes})


def with_ranking(**rankings):
    return make(rankings=make().rankings | rankings)


def test_round_trip_is_exact_and_deterministic(tmp_path):
    scores = make()
    for name in "ab":
        (tmp_path / name).mkdir()
        scores.write(tmp_path / name)
    loaded = Scores.load(tmp_path / "a")
    for name in statistic_sizes(SHAPE):
        assert np.array_equal(getattr(loaded, name), getattr(scores, name))
    assert_same_rankings(loaded, scores)
    assert loaded.shape == SHAPE and loaded.calibration == scores.calibration
    assert loaded.fingerprint() == scores.fingerprint() != make(data_fingerprint="e").fingerprint()
    for name in ("scores.json", "arrays.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "scores.json").read_text())["calibration"]["num_samples"] == 3


def test_arrays_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        make().published["ffn"][0, 0] = 1.0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_refused_by_name(value):
    bad = np.zeros((2, 24))
    bad[1, 3] = value
    with pytest.raises(MinitronError, match="'mine/ffn' holds 1 NaN or infinite"):
        with_ranking(mine={"ffn": bad})
    with pytest.raises(MinitronError, match="'ffn_rms' holds 1 NaN or infinite"):
        make(ffn_rms=bad)


def test_wrong_size_is_refused():
    with pytest.raises(MinitronError, match=r"'mine/heads' must have size \[2, 4\], found \[4, 2\]"):
        with_ranking(mine={"heads": np.zeros((4, 2))})


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
    arrays = dict(np.load(tmp_path / "s" / "arrays.npz"))
    name = "rankings/minitron/hidden"
    np.savez(tmp_path / "s" / "arrays.npz", **{**arrays, name: np.array([object()] * 16, dtype=object)})
    with pytest.raises(MinitronError, match="expected numbers"):
        Scores.load(tmp_path / "s")
    np.savez(tmp_path / "s" / "arrays.npz", **{**arrays, name: np.zeros(100_000)})
    with pytest.raises(MinitronError, match=rf"array '{name}' must have size \[16\], found \[100000\]"):
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
    array = np.array(make().published[name] if name in AXES else getattr(make(), name))
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
    "NaN": (infected(np.nan), "'minitron/hidden' holds 1 NaN or infinite"),
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
    "what counted of other tokens": (
        {
            "tokens": npy(np.zeros((1, 2), np.int32)),
            "sensitivity": npy(np.zeros((4, 1, 2), np.float32)),
            "counted": npy(np.ones((2, 1), np.int8)),
        },
        "'counted' must have size",
    ),
    "what counted neither 0 nor 1": (
        {
            "tokens": npy(np.zeros((1, 2), np.int32)),
            "sensitivity": npy(np.zeros((4, 1, 2), np.float32)),
            "counted": npy(np.full((1, 2), 7, np.int8)),
        },
        "'counted' must be 0 or 1 for each of the tokens",
    ),
    "a moment of another size": ({"stream_moment": npy(np.zeros((16, 17)))}, "'stream_moment' must have size"),
}
HOSTILE_RANKINGS = {
    "no ranking": (
        {"rankings/ffn": npy(np.zeros((2, 24)))},
        "expected an axis of ffn, heads, groups, hidden, found ''",
    ),
    "no name": ({"rankings//ffn": npy(np.zeros((2, 24)))}, "name of a ranking: expected up to 64 letters"),
    "name of a path": ({"rankings/../ffn": npy(np.zeros((2, 24)))}, "name of a ranking: expected up to 64 letters"),
    "deep name": ({"rankings/a/b/ffn": npy(np.zeros((2, 24)))}, "found 'b/ffn'"),
    "long name": ({f"rankings/{'a' * 65}/ffn": npy(np.zeros((2, 24)))}, "name of a ranking: expected up to 64 letters"),
    "endless name": ({f"rankings/{'a' * 900}/{'b' * 90}": b""}, "name of a ranking: expected up to 64 letters"),
    "name of two lines": ({"rankings/a\nb/ffn": npy(np.zeros((2, 24)))}, "name of a ranking: expected up to 64"),
    "marked name": ({"rankings/<b>/ffn": npy(np.zeros((2, 24)))}, "name of a ranking: expected up to 64 letters"),
    "unknown axis": ({"rankings/mine/layers": npy(np.zeros(2))}, "found 'layers'"),
    "unknown ranking of another size": (
        {"rankings/mine/ffn": npy(np.zeros((3, 24)))},
        "'rankings/mine/ffn' must have size",
    ),
    "unknown ranking of 8 TB": ({"rankings/mine/ffn": claim(shape="(2, 549755813888)")}, "'rankings/mine/ffn'"),
    "unknown ranking of NaN": ({"rankings/mine/ffn": npy(np.full((2, 24), np.nan))}, "'mine/ffn' holds 48 NaN"),
    "unknown ranking of text": ({"rankings/mine/ffn": npy(np.full((2, 24), "a"))}, "must hold numbers"),
    "one more ranking than was written": ({"rankings/mine/ffn": npy(np.zeros((2, 24)))}, "altered or damaged"),
    "thirteen rankings": (
        {f"rankings/m{n}/hidden": npy(np.zeros(16)) for n in range(12)},
        "expected at most 12 rankings, found 13",
    ),
    "published one not whole": (
        {"rankings/minitron/ffn": None},
        "expected the ranking 'minitron' of ffn, heads, groups",
    ),
}


def in_format(name, version):
    """Name of an axis of the published ranking in the file."""
    return f"rankings/minitron/{name}" if version == 2 and name in AXES else name


def pack(folder, changes, compression=zipfile.ZIP_STORED, version=2):
    """Good scores of which some members are others."""
    changes = {in_format(name, version): data for name, data in changes.items()}
    make().write(folder) if version == 2 else write_format_1(make(), folder)
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


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_arrays(case, version, tmp_path):
    changes, message = HOSTILE[case]
    pack(tmp_path, changes, version=version)
    if version == 1 and "stream_moment" in changes:
        message = "expected the ranks"
    if version == 2 and case == "absent":
        message = "expected the ranking 'minitron' of ffn, heads, groups, hidden"
    refused(tmp_path, message.replace("'hidden'", f"'{in_format('hidden', version)}'"))


@pytest.mark.parametrize("case", HOSTILE_RANKINGS)
def test_hostile_rankings(case, tmp_path):
    changes, message = HOSTILE_RANKINGS[case]
    pack(tmp_path, changes)
    refused(tmp_path, message)


def assert_same_rankings(found, expected):
    assert {name: tuple(axes) for name, axes in found.rankings.items()} == {
        name: tuple(axes) for name, axes in expected.rankings.items()
    }
    for name, ranking in expected.rankings.items():
        for axis, worth in ranking.items():
            assert np.array_equal(found.rankings[name][axis], worth), (name, axis)


def test_rankings_that_are_not_known_are_read_and_ranked_by(tmp_path):
    worth = np.arange(48.0).reshape(2, 24)
    scores = with_ranking(of_mine={"ffn": worth, "hidden": np.ones(16)}, another={"groups": np.ones((2, 2))})
    scores.write(tmp_path)
    loaded = Scores.load(tmp_path)
    assert list(loaded.rankings) == ["minitron", "another", "of_mine"]
    assert_same_rankings(loaded, scores)
    assert loaded.fingerprint() == scores.fingerprint() != make().fingerprint()
    found = loaded.ranked_by("of_mine", ["ffn"])
    assert found.ranking == "of_mine" and np.array_equal(found.ffn, worth) and found.heads is None
    assert np.array_equal(found.block_influence, scores.block_influence)
    with np.load(tmp_path / "arrays.npz") as file:
        assert {name for name in file.files if "of_mine" in name} == {
            f"rankings/of_mine/{axis}" for axis in ("ffn", "hidden")
        }


def test_a_ranking_that_is_not_there_or_lacks_an_axis_is_refused_with_those_that_have_it():
    scores = with_ranking(of_mine={"ffn": np.ones((2, 24))}, other={"heads": np.ones((2, 4))})
    with pytest.raises(MinitronError, match=r"no ranking 'taylor', they have minitron, of_mine, other; run .*taylor\]"):
        scores.ranked_by("taylor")
    with pytest.raises(MinitronError, match=r"no ranking 'reconstruction'.*calibration.reconstruction=true"):
        scores.ranked_by("reconstruction")
    with pytest.raises(MinitronError, match=r"'of_mine' ranks ffn and not 'heads'.* rankings with it: minitron, other"):
        scores.ranked_by("of_mine", ["heads", "ffn"])


@pytest.mark.parametrize(
    ("rankings", "message"),
    [
        ({"my metric": {"ffn": np.ones((2, 24))}}, "the name of a ranking: expected up to 64 letters"),
        ({"mine": {"layers": np.ones(2)}}, "ranking 'mine': expected any of the axes .* found layers"),
        ({"mine": {}}, "ranking 'mine': expected any of the axes .* found none"),
        ({"minitron": {"ffn": np.ones((2, 24))}}, "expected the ranking 'minitron' of ffn, heads, groups, hidden"),
        ({f"m{n}": {"hidden": np.ones(16)} for n in range(12)}, "at most 12 rankings, found 13"),
    ],
)
def test_rankings_that_no_file_can_hold_are_refused(rankings, message):
    with pytest.raises(MinitronError, match=message):
        with_ranking(**rankings)


def tokens_and_sensitivity():
    return {
        "tokens": np.arange(6, dtype=np.int32).reshape(2, 3),
        "sensitivity": np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 2, 3),
    }


COUNTED = np.array([[1, 0, 1], [0, 1, 0]], bool)


def test_what_counted_is_kept_with_the_tokens(tmp_path):
    scores = make(True, **tokens_and_sensitivity(), counted=COUNTED)
    scores.write(tmp_path)
    loaded = Scores.load(tmp_path)
    assert loaded.counted.dtype == bool and np.array_equal(loaded.counted, COUNTED)
    with np.load(tmp_path / "arrays.npz") as file:
        assert file["counted"].tolist() == COUNTED.astype(int).tolist()
    with pytest.raises(ValueError, match="read-only"):
        loaded.counted[0, 0] = False
    plain, other = make(True, **tokens_and_sensitivity()), make(True, **tokens_and_sensitivity(), counted=~COUNTED)
    assert loaded.fingerprint() == scores.fingerprint()
    assert len({one.fingerprint() for one in (scores, plain, other)}) == 3
    assert len({one.tokens_fingerprint() for one in (scores, plain, other)}) == 3


def test_where_all_count_nothing_is_kept(tmp_path):
    every = make(True, **tokens_and_sensitivity(), counted=np.ones((2, 3), np.int8))
    every.write(tmp_path)
    assert every.counted is None and Scores.load(tmp_path).counted is None
    plain = make(True, **tokens_and_sensitivity())
    assert every.fingerprint() == plain.fingerprint() and every.tokens_fingerprint() == plain.tokens_fingerprint()
    with np.load(tmp_path / "arrays.npz") as file:
        assert "counted" not in file.files


@pytest.mark.parametrize(
    ("counted", "message"),
    [
        (np.ones((3, 2)), r"0 or 1 for each of the tokens \[2, 3\], found size \[3, 2\]"),
        (np.full((2, 3), 2), r"0 or 1 for each of the tokens \[2, 3\], found size \[2, 3\] with values up to 2"),
        (np.full((2, 3), np.nan), "0 or 1 for each"),
        (np.array([[0, 0, 1], [0, 0, 1]]), "expected tokens whose loss counts, found none"),
    ],
)
def test_what_cannot_have_counted_is_refused(counted, message):
    with pytest.raises(MinitronError, match=message):
        make(True, **tokens_and_sensitivity(), counted=counted)
    with pytest.raises(MinitronError, match=r"each of the tokens \[\], found"):
        make(counted=counted)


@pytest.mark.parametrize("reconstruction", [False, True])
def test_a_folder_of_format_1_is_read_with_the_same_meaning_and_fingerprints(tmp_path, reconstruction):
    more = tokens_and_sensitivity() if reconstruction else {}
    scores = make(reconstruction, **more)
    fingerprint = write_format_1(scores, tmp_path)
    loaded = Scores.load(tmp_path)
    assert loaded.fingerprint() == scores.fingerprint() == fingerprint
    assert loaded.tokens_fingerprint() == scores.tokens_fingerprint()
    assert_same_rankings(loaded, scores)
    assert (loaded.stream_moment is not None) == reconstruction
    for name in (*statistic_sizes(SHAPE), *(("stream_moment", "tokens", "sensitivity") if reconstruction else ())):
        assert np.array_equal(getattr(loaded, name), getattr(scores, name)), name
    (tmp_path / "new").mkdir()
    loaded.write(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "scores.json").read_text())["format"] == "nemo_minitron.scores/2"
    assert Scores.load(tmp_path / "new").fingerprint() == fingerprint


def test_an_altered_folder_of_format_1_is_refused(tmp_path):
    scores = make(True, **tokens_and_sensitivity())
    half = axis_sizes(SHAPE)
    for name, array in (
        ("ffn", scores.published["ffn"] + 1e-9),
        ("groups_rank", np.zeros(half["groups"])),
        ("stream_moment", scores.stream_moment.T + 1.0),
        ("sensitivity", np.zeros((4, 2, 3), np.float32)),
    ):
        write_format_1(scores, tmp_path, **{name: array})
        with pytest.raises(MinitronError, match="altered or damaged"):
            Scores.load(tmp_path)
    write_format_1(make(), tmp_path, ffn_rank=np.zeros(half["ffn"]))
    with pytest.raises(MinitronError, match=r"expected the ranks ffn_rank, .* found ffn_rank"):
        Scores.load(tmp_path)
    write_format_1(make(), tmp_path)
    text = (tmp_path / "scores.json").read_text()
    (tmp_path / "scores.json").write_text(text.replace("scores/1", "scores/2"))
    with pytest.raises(MinitronError, match="expected the ranking 'minitron'"):
        Scores.load(tmp_path)


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
