"""Students of ``benchmarks/zero_shot_bench.py`` on a tiny model: every method through files, as a table makes them."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.importance.scores import Scores
from nemo_minitron.model import layout
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.synthetic import make_llama
from tests.brown import tagged_topics
from tests.test_peers import STAND_IN

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import peers
import zero_shot
import zero_shot_bench

SHAPE = ModelShape(4, 64, 96, 8, 4, 8, 512, 512, share_embeddings_and_output_weights=True, max_position_embeddings=512)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    source, brown = make_llama(folder / "source", SHAPE), tagged_topics(folder / "brown", 52)
    other = folder / "other"
    other.mkdir()
    (other / "b.txt").write_text("What is said at last. " * 3000)
    (other / "a.txt").write_text("What is said at first. " * 3000)
    (folder / "work").mkdir()
    return zero_shot_bench.Bench(source, brown, folder / "work", samples=6, texts={"other": other})


@pytest.fixture
def student(bench):
    path = bench.folder / "student.nemo"
    yield path
    path.unlink(missing_ok=True)


def weights(path):
    with NemoReader(path) as reader:
        return reader.shape, reader.tensor(layout.FINAL_NORM), reader.tensor(layout.FC2_WEIGHT, 0)


def test_texts_and_calibration(bench):
    assert {name: tuple(blocks.shape) for name, blocks in bench.texts.items()} == {
        "brown": (3, 512),
        "pydoc": (10, 512),
        "python": (10, 512),
        "other": (10, 512),
    }
    draws = [bench, bench.at(1), bench.at(2)]
    evaluated = {tuple(row) for row in bench.texts["brown"].tolist()}
    for drawn in draws:
        assert drawn.calibration.shape == (6, 512)
        assert not evaluated & {tuple(row) for row in drawn.calibration.tolist()}
    assert len({tuple(drawn.calibration.flatten().tolist()) for drawn in draws}) == 3
    assert bench.draw == 0


def test_scores_are_of_all_of_the_draws_calibration(bench):
    drawn = bench.at(1)
    kept = Scores.load(drawn.scores).tokens.tolist()
    given = drawn.calibration.tolist()
    assert sorted(row for row in kept if row in given) == sorted(given)
    assert drawn.scores.parent != bench.kept
    modified = (drawn.scores / "arrays.npz").stat().st_mtime_ns
    assert (bench.at(1).scores / "arrays.npz").stat().st_mtime_ns == modified, "measured once"


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("magnitude", {"num_query_groups": 3}),
        ("plain", {"ffn_hidden_size": 64}),
        ("ours", {"ffn_hidden_size": 64, "hidden_size": 56}),
        ("ours", {"num_layers": 2}),
        ("ours_greedy", {"num_layers": 2}),
        ("oscar", {"ffn_hidden_size": 64, "num_query_groups": 3}),
        ("replaceme", {"num_layers": 3}),
    ],
)
def test_a_student_of_every_method(bench, student, monkeypatch, method, target):
    monkeypatch.setattr(peers, "osscar_core", lambda wheel: STAND_IN)
    bench.prune(method, target, student)
    shape, *_ = weights(student)
    assert {name: getattr(shape, name) for name in target} == target
    losses = bench.losses(student)
    assert losses.keys() == bench.texts.keys() and all(math.isfinite(loss) for loss in losses.values())


def test_unscaled_differs_by_the_final_norm_alone(bench, student, monkeypatch):
    monkeypatch.setattr("nemo_minitron.prune.student.worse", lambda losses: False)  # a random teacher decides by chance
    found = []
    for method in ("ours", "ours_unscaled"):
        bench.prune(method, {"ffn_hidden_size": 64}, student)
        found.append(weights(student))
    (_, scaled, fc2), (_, unscaled, same) = found
    assert torch.equal(fc2, same)
    ratio = (scaled / unscaled).double()
    assert abs(float(ratio.mean()) - 1) > 1e-3  # by one number, and then by one for each channel
    assert 1e-5 < ratio.std() < 0.2


def test_layers_of_a_smaller_count_come_of_the_same_search(bench):
    two = bench.layers_to_drop(2)
    written = (bench.kept / "layers_scores.json").read_text()
    (one,) = bench.layers_to_drop(1)
    assert one in two and (bench.kept / "layers_scores.json").read_text() == written


def test_a_measured_cell_leaves_nothing(bench):
    bench.model = zero_shot_bench.Model({"ffn": {"ffn_hidden_size": 64}}, "brown")
    before = {file.name for file in bench.folder.iterdir()}
    cell = zero_shot.measured(bench, "ffn", "plain")
    assert {file.name for file in bench.folder.iterdir()} == before
    assert cell["loss"].keys() == bench.texts.keys() and cell["peak_memory_bytes"] > 0
    assert np.isfinite(list(cell["loss"].values())).all()
