"""``minitron evaluate`` on bad input, and its decoding; its loss is judged on every grid in ``test_grids.py``."""

from __future__ import annotations

import json

import pytest
import torch

from nemo_minitron.cli import main
from nemo_minitron.evaluate.loss import _digest
from tests.llamas import GQA
from tests.nemo.conftest import hf_logits

CASES = {
    "missing checkpoint": (
        ["model.restore_from_path=DIR/absent.nemo"],
        "restore_from_path: expected a .nemo file or folder, found nothing at",
    ),
    "no model_weights": (["model.restore_from_path=DIR/bare"], "expected the member model_weights/"),
    "missing tokens": (["evaluate.data_prefix=DIR/absent"], "absent"),
    "tokens of another vocabulary": (["evaluate.data_prefix=DIR/permuted_text_document"], "another vocabulary"),
    "tokens that the model does not have": (["evaluate.data_prefix=DIR/foreign_text_document"], "320"),
    "sequence too long": (["evaluate.seq_length=1000"], "max_position_embeddings=128"),
    "no tokens": (["evaluate.data_prefix=null"], "evaluate.data_prefix is required"),
    "throughput beyond the context": (["evaluate.throughput=true"], "evaluate.decode_tokens (544)"),
    "throughput of sequence parallel": (
        ["evaluate.throughput=true", "evaluate.prefill_tokens=8", "model.sequence_parallel=true"],
        "set model.sequence_parallel=false",
    ),
    "no repeats": (["evaluate.throughput=true", "evaluate.repeats=0"], "evaluate.repeats: expected at least 1"),
    "unwritable": (["output_path=OUT/file/out.json"], "expected a writable destination"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_leaves_the_destination_untouched(case, models, tmp_path, capsys):
    changes, message = CASES[case]
    (tmp_path / "out.json").write_text("an earlier result")
    (tmp_path / "file").write_text("in the way")
    keys = [
        f"model.restore_from_path={models}/model.nemo",
        f"evaluate.data_prefix={models}/own_text_document",
        "evaluate.seq_length=32",
        f"output_path={tmp_path}/out.json",
        *(key.replace("DIR", str(models)).replace("OUT", str(tmp_path)) for key in changes),
    ]
    assert main(["evaluate", *keys]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minitron:")]
    assert message in line
    found = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert found == {"out.json": "an earlier result", "file": "in the way"}


def test_the_text_that_was_read_is_named(models, tmp_path):
    """Four samples of other places are as many tokens, and another loss."""

    def text(*changes: str) -> str:
        keys = [f"model.restore_from_path={models}/model.nemo", f"evaluate.data_prefix={models}/own_text_document"]
        keys += ["evaluate.seq_length=32", "evaluate.num_samples=4", f"output_path={tmp_path}/out.json", *changes]
        assert main(["evaluate", *keys]) == 0
        found = json.loads((tmp_path / "out.json").read_text())
        assert found["tokens"] == 128
        return found["text"]

    first = text()
    assert text("evaluate.micro_batch_size=2") == first != text("seed=7")


def test_the_name_of_a_text_is_of_its_tokens_and_of_those_that_count():
    blocks = torch.arange(12).view(2, 6)
    name, ones = _digest(blocks, None), torch.ones_like(blocks)
    assert len(name) == 12 and int(name, 16) >= 0
    assert _digest(blocks.clone(), ones) == name, "all of them count in either"
    some = ones.clone()
    some[0, 3] = 0
    assert len({name, _digest(blocks, some), _digest(blocks + 1, None), _digest(blocks[:, :5], None)}) == 4


GRIDS = [(1, (1, 1)), (2, (2, 1)), (2, (1, 2))]


@pytest.mark.parametrize(("world", "grid"), GRIDS, ids=str)
def test_decoding_with_the_cache_gives_the_logits_of_one_long_pass(zygote, models, world, grid):
    """Against transformers, which reads all tokens at once: what is timed is the model's real decoding."""
    tokens = torch.randint(GQA.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = hf_logits(models / "hf", tokens)
    ranks = zygote.run("tests.nemo.grid_jobs:decode", world, f"{models}/model.nemo", tokens.tolist(), 7, grid)
    parts = [torch.tensor(part) for part in ranks if part is not None]  # the last stage's ranks
    assert len(parts) == grid[0]
    for found in parts:
        torch.testing.assert_close(found[..., : GQA.vocab_size], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("world", "grid"), GRIDS[1:], ids=str)
def test_throughput_and_energy_of_a_grid(zygote, models, tmp_path, world, grid):
    found, *others = zygote.run(
        "tests.nemo.grid_jobs:evaluate_speed", world, f"{models}/model.nemo", f"{models}/own_text_document",
        str(tmp_path), grid,
    )  # fmt: skip
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == found and all(other["throughput"]["kv_cache_bytes"] for other in others)
    speed = found["throughput"]
    assert (speed["batch_size"], speed["prefill_tokens"], speed["decode_tokens"]) == (2, 16, 4)
    assert speed["decode_milliseconds_per_step"] == pytest.approx(1000 * 2 / speed["decode_tokens_per_second"])
    assert speed["prefill_tokens_per_second"] > 0 and speed["peak_memory_bytes"] > 2**20
    layers = GQA.num_layers if grid[1] == 1 else 2  # of the fuller stage
    per_token = 2 * layers * GQA.num_query_groups * GQA.kv_channels * 4 // grid[0]
    assert speed["kv_cache_bytes"] == 2 * 20 * per_token
    assert list(found)[:2] == ["val_loss", "perplexity"]
    energy = found["energy"]
    if energy["available"]:
        assert set(energy["joules_per_token"]) == {"perplexity", "prefill", "decode"}
    else:
        assert energy["reason"]
