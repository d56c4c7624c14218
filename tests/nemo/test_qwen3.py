"""Qwen3 through the whole journey on grids, against transformers' own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.fuse import fuse
from nemo_minitron.convert import convert
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.importance.scores import Scores
from nemo_minitron.model import layout
from nemo_minitron.prune.plan import Plan
from tests.nemo.grid_jobs import LENGTH, curve
from tests.qwen3 import TOKENS, double, random_qwen3, transformers_logits

JOBS = "tests.nemo.grid_jobs"
SIZES = ["hidden_size=32", "ffn_hidden_size=64", "num_attention_heads=4", "num_query_groups=2", "num_layers=2"]
ONE, TWO = ((1, 1, False), 1), ((2, 1, True), 2)
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (((2, 1, False), 2), ((1, 2, False), 2))]
LAST = pytest.param((2, 2, True), 4, marks=pytest.mark.slow)
GRIDS = pytest.mark.parametrize("grid,world", [pytest.param(*TWO, marks=pytest.mark.slow), *SLOW, LAST], ids=str)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """Folder with a Qwen3 as ``hf`` and ``teacher.nemo``, and tokens of its vocabulary."""
    folder = tmp_path_factory.mktemp("qwen3")
    random_qwen3(folder / "hf", tied=True)
    convert(folder / "hf", folder / "teacher.nemo")
    preprocess("pydoc_topics", folder / "data", tokenizer_type=str(folder / "hf"))
    return folder


@pytest.fixture(scope="module")
def step(qwen3):
    """Blocks of one batch, and the gradient of its mean loss by each canonical tensor, dense in float64."""
    blocks = torch.randint(0, 320, (8, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    model = double(qwen3 / "hf")
    F.cross_entropy(model(blocks[:, :-1]).logits.flatten(0, 1), blocks[:, 1:].flatten()).backward()
    named = dict(model.named_parameters())
    with NemoReader(qwen3 / "teacher.nemo") as reader:
        shape = reader.shape
    rows = layout.slots(shape)
    return blocks, {
        (row.key, layer): fuse(row, [named[name.format(l=layer)].grad for name in row.hf], shape) for row, layer in rows
    }


@pytest.mark.parametrize("grid,world", [TWO, pytest.param(*ONE, marks=pytest.mark.slow), *SLOW, LAST], ids=str)
def test_gradients_are_those_of_a_dense_model(qwen3, step, zygote, grid, world):
    """The weight of a norm is one for all heads: its gradient is the sum over the ranks that hold them."""
    blocks, expected = step
    source, losses = str(qwen3 / "teacher.nemo"), {"kd_weight": 0.0, "lm_weight": 1.0}
    job = (source, source, grid, blocks, torch.ones(8, LENGTH), losses)
    found = zygote.run(f"{JOBS}:distillation_step", world, *job)[0][2]
    assert found.keys() == expected.keys()
    for (key, layer), gradient in expected.items():
        error = ((found[key, layer][: len(gradient)].double() - gradient).norm() / gradient.norm()).item()
        assert error < 1e-5, f"{key} of layer {layer}: relative error {error:.2e}"


def _cut(qwen3, zygote, out, grid, world):
    out.mkdir()
    source, data = str(qwen3 / "teacher.nemo"), str(qwen3 / "data_text_document")
    zygote.run(f"{JOBS}:scores_and_student", world, source, data, str(out), grid, SIZES)
    return out


@pytest.fixture(scope="module")
def student(qwen3, zygote):
    """Folder with scores and student of one process."""
    return _cut(qwen3, zygote, qwen3 / "one", *ONE)


@pytest.mark.slow
def test_a_re_solved_student_keeps_its_norms_and_loads_in_transformers(qwen3, student, tmp_path):
    with NemoReader(qwen3 / "teacher.nemo") as teacher, NemoReader(student / "student.nemo") as reader:
        kept = reader.shape.to_dict()
        assert (kept["family"], kept["kv_channels"], kept["hidden_size"]) == ("qwen3", 16, 32)
        layers = Plan.load(student / "student.plan.yaml").layers
        for row in (row for row in layout.layer_parameters(reader.shape) if row.axes == ("head",)):
            for new, old in enumerate(layers):
                assert torch.equal(reader.tensor(row, new), teacher.tensor(row, old))
    back = convert(student / "student.nemo", tmp_path / "hf")
    config = json.loads((back / "config.json").read_text())
    assert (config["architectures"], config["head_dim"], config["num_hidden_layers"]) == (["Qwen3ForCausalLM"], 16, 2)
    assert transformers_logits(back).isfinite().all()


@GRIDS
def test_scores_plan_and_student_are_the_same_on_every_grid(qwen3, student, zygote, tmp_path, grid, world):
    out = _cut(qwen3, zygote, tmp_path / "out", grid, world)
    ours, expected = Scores.load(out / "scores"), Scores.load(student / "scores")
    for axis, worth in expected.published.items():
        np.testing.assert_allclose(ours.published[axis], worth, rtol=1e-5, atol=0, err_msg=axis)
    assert (out / "student.plan.yaml").read_bytes() == (student / "student.plan.yaml").read_bytes()
    with NemoReader(out / "student.nemo") as a, NemoReader(student / "student.nemo") as b:
        assert a.fingerprint() == b.fingerprint()


def _distil(qwen3, student, zygote, out, grid, world):
    out.mkdir()
    teacher = f"model.kd_teacher_restore_from_path={qwen3}/teacher.nemo"
    files = (str(student / "student.nemo"), str(qwen3 / "data_text_document"), str(out))
    zygote.run(f"{JOBS}:train", world, "distill", *files, grid, 4, (teacher,))
    return curve(out, "train_kd_loss")


@pytest.fixture(scope="module")
def distilled(qwen3, student, zygote):
    return _distil(qwen3, student, zygote, qwen3 / "distilled", *ONE)


@GRIDS
def test_distillation_follows_the_same_curve_and_its_student_is_exported(
    qwen3, student, distilled, zygote, tmp_path, grid, world
):
    found = _distil(qwen3, student, zygote, tmp_path / "out", grid, world)
    assert len(found) == 4 and found == pytest.approx(distilled, abs=1e-4)
    trained = tmp_path / "out" / "trained.last.nemo"
    back = convert(trained, tmp_path / "hf", verify=True)
    before, after = (
        zygote.run("tests.nemo.extending_jobs:logits", 1, None, str(path), TOKENS)[0]
        for path in (student / "student.nemo", trained)
    )
    torch.testing.assert_close(after, transformers_logits(back), rtol=1e-4, atol=2e-4)
    assert (before - after).abs().max() > 1e-3  # it was trained
