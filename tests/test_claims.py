"""The benchmark of the papers' claims on a tiny model: verdicts, loop, table, and what a second call runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nemo_minitron.model.shape import ModelShape
from nemo_minitron.synthetic import make_llama
from tests.brown import tagged_topics

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import claims
import claims_table
import loop

SHAPE = ModelShape(4, 64, 96, 8, 4, 8, 512, 512, share_embeddings_and_output_weights=True, max_position_embeddings=512)
SETTING = claims.Setting(
    steps=2,
    correction_steps=2,
    block=128,
    samples=6,
    width=("ffn_hidden_size", 64),
    depth=("num_layers", 3),
)
SEEDS = 2


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other cost a tiny model more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.6, 2.6, 3.6], "holds"),  # mean 2.6, spread 1, half-width 4.303 / sqrt(3) = 2.484
        ([1.4, 2.4, 3.4], "within the spread"),
        ([-1.4, -2.4, -3.4], "within the spread"),
        ([-1.6, -2.6, -3.6], "fails"),
        ([0.7, -0.5, 0.1], "within the spread"),
        ([0.2, 0.2, 0.2], "holds"),
        ([0.0, 0.0], "within the spread"),
        ([3.0], "not judged: one seed has no spread"),
    ],
)
def test_verdict_compares_the_mean_with_the_spread(differences, expected):
    worse = [4.0, 5.5, 6.0][: len(differences)]  # levels differ by seed and do not count
    found = claims_table.verdict([w - d for w, d in zip(worse, differences, strict=True)], worse)
    assert found["verdict"] == expected
    assert found["difference"] == pytest.approx(sum(differences) / len(differences))
    if differences == [1.6, 2.6, 3.6]:
        assert found["spread"] == pytest.approx(1.0) and found["margin"] == pytest.approx(2.484, abs=1e-3)


def test_sides_of_the_width_claim_are_equally_large():
    smollm2 = ModelShape(30, 576, 1536, 9, 3, 64, 49152, 49152, share_embeddings_and_output_weights=True)
    setting = claims.Setting()
    width, depth = (smollm2.replace(**dict([size])).num_parameters() for size in (setting.width, setting.depth))
    assert abs(width / depth - 1) < 0.01


def test_loop_learns_from_text_and_from_a_teacher(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))

    def model(seed):
        torch.manual_seed(seed)
        made = LlamaForCausalLM(config)
        with torch.no_grad():
            made.lm_head.weight.mul_(20)  # a teacher that is sure of something
        return made.eval()

    def divergence(teacher, student):
        with torch.no_grad():
            q, p = (one(tokens).logits.log_softmax(-1) for one in (teacher, student))
        return float(F.kl_div(p, q, log_target=True, reduction="none").sum(-1).mean())

    teacher, from_text, from_teacher = model(0), model(1), model(1)
    with torch.no_grad():
        expected = from_text(tokens, labels=tokens).loss.item()
    assert loop.losses_of(from_text, tokens) == pytest.approx(
        [from_text(row[None], labels=row[None]).loss.item() for row in tokens], rel=0.02
    )
    before, batches, rates = divergence(teacher, from_text), [tokens] * 12, loop.constant(1e-2, 12)
    said = loop.train(from_text, batches, rates)
    assert said[0] == pytest.approx(expected, rel=0.02) and said[-1] < 0.7 * said[0]
    answers, counted = loop.answers(teacher, batches), []
    assert loop.train(from_teacher, batches, rates, answers, counted.append)[0] == pytest.approx(expected, rel=0.02)
    assert counted == list(range(1, 13))
    assert divergence(teacher, from_teacher) < 0.7 * before < divergence(teacher, from_text)


def test_rates_rise_and_fall():
    rates = loop.decaying(1.0, 45)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in itertools.pairwise(rates[4:])) and rates[-1] == pytest.approx(0.1)
    assert loop.constant(1.0, 45)[4:] == [1.0] * 41


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A random model, 52 files tagged as Brown's are, and a folder to work in."""
    folder = tmp_path_factory.mktemp("claims")
    return make_llama(folder / "source", SHAPE), tagged_topics(folder / "brown", 52), folder / "work"


@pytest.fixture(scope="module")
def table(inputs):
    return claims.Study(*inputs, SETTING).table(list(claims.CLAIMS), SEEDS) | {"command": "c", "machine": "m"}


def test_table_has_every_claim_and_its_numbers(table, tmp_path):
    pairs = [(name, *pair) for name, claim in claims.CLAIMS.items() for pair in claim.pairs]
    rows = table["claims"]
    assert [(r["claim"], *(r[side].removesuffix(", untrained") for side in ("better", "worse"))) for r in rows] == pairs
    assert [row["unit"] for row in rows].count("files") == 1
    for row in rows:
        assert len(row["better_losses"]) == len(row["worse_losses"]) == (SEEDS if row["unit"] == "seeds" else 3)
        assert row["better_losses"] != row["worse_losses"]
        assert row["verdict"] in (claims_table.HOLDS, claims_table.FAILS, claims_table.WITHIN)
    parameters = {name: student["parameters"] for name, student in table["students"].items()}
    assert parameters["width"] == parameters["width, cut"] == SHAPE.replace(ffn_hidden_size=64).num_parameters()
    assert parameters["depth"] == SHAPE.replace(num_layers=3).num_parameters()
    first = {name: arm["train_lm_loss"][0][0] for name, arm in table["arms"].items()}  # of one student on one batch
    assert first["width, KD"] == first["width, CE"] == first["width, corrected KD"]
    assert min(table["corrected_teacher"]) < table["teacher"]["brown"]

    document = tmp_path / "evidence.md"
    document.write_text(f"# Before\n{claims_table.BEGIN}\noutdated\n{claims_table.END}\nafter\n")
    for _ in range(2):
        claims_table.insert(claims_table.markdown(table), document)
    written = document.read_text()
    assert written.startswith("# Before\n") and written.endswith("\nafter\n") and "outdated" not in written
    for shown in (written, claims_table.text(table)):
        assert all(shown.count(f"{row[side]} (lr") for row in rows for side in ("better", "worse") if row[f"{side}_lr"])
        assert sum(shown.count(f"{row['difference']:+.3f}") for row in rows) >= len(rows)
    claims_table.plot(json.loads(json.dumps(table)), tmp_path / "claims.png")
    assert (tmp_path / "claims.png").stat().st_size > 10_000


def test_the_seed_draws_random_weights(inputs, table):
    study = claims.Study(*inputs, SETTING)
    weights = [study._fresh("random", seed).lm_head.weight for seed in (0, 1, 0)]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_before_the_work(inputs):
    with pytest.raises(SystemExit, match="found none"):
        claims.Study(*inputs, SETTING, "cuda")


def test_a_second_call_runs_only_what_is_missing(inputs, table, monkeypatch):
    trained, train = [], loop.train
    monkeypatch.setattr(loop, "train", lambda model, *rest: trained.append(model) or train(model, *rest))
    study = claims.Study(*inputs, SETTING)
    again = study.table(list(claims.CLAIMS), SEEDS)
    assert not trained and "bench" not in vars(study), "nothing is left to do"
    assert again["claims"] == table["claims"]

    (study.folder / "arm-width-CE-1.json").unlink()
    assert claims.Study(*inputs, SETTING).table(["init", "kd"], SEEDS)["claims"] == table["claims"][:3]
    assert len(trained) == 1, "the one that was missing, with the same result"
    longer = claims.Study(*inputs, dataclasses.replace(SETTING, steps=3))
    assert longer.table(["width"], 1)["claims"][0]["verdict"] == claims_table.OPEN
    assert len(trained) == 3, "both arms of the claim have other settings now"
