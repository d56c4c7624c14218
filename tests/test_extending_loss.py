"""The distillation loss of docs/extending.md, taken out of the document: from outside of the package, in one file."""

from __future__ import annotations

import csv
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_minitron.convert import convert
from nemo_minitron.distill.fused import Head, head_losses
from nemo_minitron.distill.loss import Mix
from nemo_minitron.errors import MinitronError
from nemo_minitron.registry import load_extensions
from nemo_minitron.synthetic import make_llama
from tests.distill.test_fused import PADDED, SMALL, V, _inputs
from tests.llamas import GQA
from tests.ranks import run_ranks

DOCUMENT = Path(__file__).parents[1] / "docs" / "extending.md"
MIXES = [(1.0, 1.0, 0.0), (2.5, 0.7, 0.3)]
"""Temperature, weight of the distance and weight of cross entropy."""
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    section = DOCUMENT.read_text().split("## A distillation loss\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(code.splitlines()) <= 40
    file = tmp_path_factory.mktemp("outside") / "mine.py"
    file.write_text(code)
    return str(file)


def hellinger(z: torch.Tensor, z_t: torch.Tensor, temperature: float) -> torch.Tensor:
    """1 − Σ √(p q) of whole logits ``[…, V]``."""
    p, q = ((x / temperature).softmax(-1) for x in (z, z_t))
    return 1 - (p * q).sqrt().sum(-1)


def _dense(dtype, temperature, kd, lm):
    """Loss, gradients of hidden states and head, and the distance per token, in float64 by autograd."""
    *given, labels, weights = _inputs(dtype)
    hidden, weight, hidden_t, weight_t = (x.double() for x in given)
    hidden.requires_grad_(True)
    weight.requires_grad_(True)
    z, z_t = ((h @ w.t())[..., :V].transpose(0, 1) for h, w in ((hidden, weight), (hidden_t, weight_t)))
    distance = temperature**2 * hellinger(z, z_t, temperature)
    cross_entropy = torch.nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none")
    loss = ((kd * distance + lm * cross_entropy.view_as(labels)) * weights.double()).sum()
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad, distance.detach()


def _ours(file):
    """The same of each mix, from this rank's rows of the heads."""
    load_extensions([file])
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if world > 1 else 0
    rows = slice(rank * PADDED // world, (rank + 1) * PADDED // world)
    results = []
    for dtype, (temperature, kd, lm) in itertools.product(DTYPES, MIXES):
        hidden, weight, hidden_t, weight_t, labels, weights = _inputs(dtype)
        hidden, weight = hidden.requires_grad_(True), weight[rows].clone().requires_grad_(True)
        found = head_losses(
            Head(hidden, weight), labels, weights, vocab_size=V, teacher=Head(hidden_t, weight_t[rows]),
            mix=Mix("hellinger", temperature, kd, lm), vocab_start=rows.start,
            group=torch.distributed.group.WORLD if world > 1 else None, memory_bytes=SMALL,
        )  # fmt: skip
        found.loss.backward()
        results.append((found.loss.detach(), hidden.grad, weight.grad, found.terms["kd_loss"]))
    return results


@pytest.mark.parametrize("world", [1, 2, 4])
def test_value_and_gradient_are_those_of_autograd(mine, world):
    """At 4 ranks the last one holds padding alone."""
    ranks = run_ranks(_ours, world, mine)
    for i, (dtype, mix) in enumerate(itertools.product(DTYPES, MIXES)):
        expected = _dense(dtype, *mix)
        heads = torch.cat([rank[i][2] for rank in ranks])
        for loss, hidden, _, distance in (rank[i] for rank in ranks):
            for ours, exact in zip((loss, hidden, heads, distance), expected, strict=True):
                error = (ours.double() - exact).norm() / exact.norm()
                assert error <= DTYPES[dtype], (dtype, mix)


def test_a_loss_that_is_no_loss_is_refused(tmp_path):
    file = tmp_path / "no_loss.py"
    file.write_text("class Mine:\n    name = 'no_loss'\nLOSS = Mine()\n")
    load_extensions([str(file)])
    with pytest.raises(MinitronError, match=r"distill\.loss=no_loss: expected an instance of .*distill\.loss\.Loss"):
        Mix("no_loss")


def test_a_cache_is_refused_for_a_loss_that_needs_all_logits(mine):
    load_extensions([mine])
    with pytest.raises(MinitronError, match=r"expected distill\.loss=sampled_kl or topk, found hellinger"):
        Mix("hellinger").check_learns_from()


def test_another_loss_of_the_same_name_is_another_training(mine):
    from nemo_minitron.nemo.run_record import loss_identity

    load_extensions([mine])
    before, text = loss_identity("hellinger"), Path(mine).read_text()
    Path(mine).write_text(text.replace("1 - overlap", "2 - overlap"))
    after = loss_identity("hellinger")
    Path(mine).write_text(text)
    assert before["is"] == after["is"] == "hellinger" and before["content"] != after["content"]
    assert loss_identity("forward_kl") == "forward_kl"


def _repeat(prefix: Path, block: torch.Tensor, times: int) -> None:
    """Token files in which every block of this length is the same, wherever a data set begins."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_item(block.repeat(times))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")


def test_a_distillation_follows_it(mine, tmp_path):
    """Two steps so small that no weight moves, on one block over and over: the logged loss is that block's."""
    from transformers import AutoModelForCausalLM

    length = 32
    block = torch.randint(0, GQA.vocab_size, (length,), generator=torch.Generator().manual_seed(7))
    _repeat(tmp_path / "tokens", block, 64)
    logits = {}
    for seed, role in enumerate(("teacher", "student")):
        folder = make_llama(tmp_path / role, GQA, seed=seed)
        convert(folder, tmp_path / f"{role}.nemo")
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits[role] = model.eval()(block[None]).logits.double()
    expected = 4.0 * hellinger(logits["student"], logits["teacher"], 2.0).mean().item()
    command = [
        sys.executable, "-m", "nemo_minitron", "distill",
        "extensions=[./mine.py]", "distill.loss=hellinger", "distill.temperature=2.0",
        f"model.restore_from_path={tmp_path}/student.nemo",
        f"model.kd_teacher_restore_from_path={tmp_path}/teacher.nemo",
        f"model.nemo_path={tmp_path}/distilled.nemo",
        f"model.data.data_prefix={{train: [{tmp_path}/tokens], validation: [{tmp_path}/tokens]}}",
        f"model.data.seq_length={length}", "model.micro_batch_size=2", "model.global_batch_size=4",
        "model.optim.lr=1e-30", "~model.optim.sched", "trainer.max_steps=2", "trainer.val_check_interval=2",
        "trainer.limit_val_batches=1", "trainer.log_every_n_steps=1", f"exp_manager.exp_dir={tmp_path}/exp",
        "exp_manager.create_checkpoint_callback=false",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(DOCUMENT.parents[1])}
    subprocess.run(command, cwd=Path(mine).parent, env=environment, check=True, stdout=subprocess.DEVNULL)
    (table,) = (tmp_path / "exp").glob("**/csv/metrics.csv")
    with table.open() as stream:
        rows = list(csv.DictReader(stream))
    logged = [float(row[name]) for name in ("train_kd_loss", "val_kd_loss") for row in rows if row[name]]
    assert len(logged) == 3 and logged == pytest.approx([expected] * 3, rel=1e-4)
    assert (tmp_path / "distilled.nemo").is_file()
