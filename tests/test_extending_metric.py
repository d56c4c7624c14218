"""The importance metric of docs/extending.md, taken out of the document: from outside of the package, in one file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from nemo_minitron.cli import main
from nemo_minitron.convert import convert
from nemo_minitron.data.blocks import token_blocks
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.importance.scores import Scores
from nemo_minitron.prune.plan import Plan
from nemo_minitron.registry import METRICS
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA

DOCUMENT = Path(__file__).parents[1] / "docs" / "extending.md"
TEXTS = [f"Sentence {i} says that {i * i} is the square of {i}." for i in range(300)]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The file; what it registers is gone after the test."""
    monkeypatch.setattr(METRICS, "_files", dict(METRICS._files))
    monkeypatch.setattr(METRICS, "_loaded", dict(METRICS._loaded))
    section = DOCUMENT.read_text().split("## An importance metric\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(code.splitlines()) <= 40
    (tmp_path / "mine.py").write_text(code)
    return f"extensions=[{tmp_path}/mine.py]"


def written(folder, tokens):
    """The same by transformers, dense: rms of what each neuron adds to the stream, ``[L, F]``."""
    model = LlamaForCausalLM.from_pretrained(folder).double()
    seen = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append((module.weight, args[0])))
    with torch.no_grad():
        model(tokens)
        return torch.stack([(x.square().mean((0, 1)) * w.square().sum(0)).sqrt() for w, x in seen]).numpy()


def test_a_metric_of_ones_own_scores_and_prunes(mine, tmp_path, capsys):
    make_llama(tmp_path / "hf", GQA, tokenizer_texts=TEXTS)
    convert(tmp_path / "hf", tmp_path / "teacher.nemo")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    preprocess(tmp_path / "text.txt", tmp_path / "tokens", tokenizer_type=str(tmp_path / "hf"))
    prefix, source = tmp_path / "tokens_text_document", f"model.restore_from_path={tmp_path}/teacher.nemo"
    keys = [source, mine, f"calibration.data_prefix={prefix}", f"output_path={tmp_path}/scores"]
    keys += ["calibration.num_samples=4", "calibration.seq_length=32", "calibration.seed=3", "importance.stream=true"]
    keys += ["calibration.own_samples=0"]
    assert main(["importance", *keys, "importance.metrics=[written]"]) == 0
    scores = Scores.load(tmp_path / "scores")
    assert list(scores.rankings) == ["minitron", "reconstruction", "written"]
    tokens = token_blocks(prefix, 32, num_samples=4, seed=3)[:, :-1]
    worth = scores.rankings["written"]["ffn"]
    np.testing.assert_allclose(worth, written(tmp_path / "hf", tokens), rtol=1e-4)

    prune = ["prune", source, mine, f"prune.scores={tmp_path}/scores", f"export.save_path={tmp_path}/student.nemo"]
    assert main([*prune, "prune.ffn_hidden_size=40", "prune.ranking=written"]) == 0
    plan = Plan.load(tmp_path / "student.plan.yaml")
    assert plan.ranking == "written" and plan.measured.keys() == {"calibration"}
    assert plan.ffn[1] == tuple(np.sort(np.argsort(-worth[1])[:40]))
    convert(tmp_path / "student.nemo", tmp_path / "student")
    student = LlamaForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.intermediate_size == 40 and student(tokens).logits.isfinite().all()
    capsys.readouterr()
    assert main([*prune, "prune.hidden_size=40", "prune.ranking=written"]) == 2
    said = capsys.readouterr().err
    assert "'written' ranks ffn and not 'hidden'" in said and "rankings with it: minitron, reconstruction" in said
