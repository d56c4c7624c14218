"""``benchmarks/recovery.py --scale`` on a tiny model: arms, blocks, cells, and a run that is put down and taken up."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.synthetic import make_llama

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import loop
import recovery
import recovery_arms
import recovery_bench
import recovery_scale

SHAPE = ModelShape(2, 64, 96, 8, 4, 8, 512, 512, share_embeddings_and_output_weights=True, max_position_embeddings=128)
TEXT = "The {0} of a word is what one reads of the {0} first, and the number {1} is what one counts to.\n"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other cost a tiny model more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_students_have_the_parameters_that_they_are_named_after():
    smollm2 = ModelShape(30, 576, 1536, 9, 3, 64, 49152, 49152, share_embeddings_and_output_weights=True)
    qwen = ModelShape(24, 896, 4864, 14, 2, 64, 151936, 151936, share_embeddings_and_output_weights=True)
    for model, shape in (("smollm2", smollm2), ("qwen2_5_coder", qwen)):
        for name, target in recovery_bench.TARGETS[model].items():
            assert name == f"{shape.replace(**target).num_parameters() / 1e6:.0f}M"


def test_arms_are_the_published_recipe_and_the_products_defaults():
    from nemo_minitron.config.compose import compose

    arms = recovery_arms.arms_of(["nvidia", "cut", "ours"], ["lm=resolved,distill.lm_weight=0.5,model.optim.lr=3e-4"])
    nvidia, cut, ours, lm = arms.values()
    assert (nvidia.weights, cut.weights, ours.weights, lm.weights) == ("cut", "cut", "resolved", "resolved")
    files = {"restore_from_path": "-", "kd_teacher_restore_from_path": "-", "nemo_path": "-"}
    defaults = compose("distill", config={"model": {**files, "data": {"data_prefix": ["-"]}}})
    for arm in (cut, ours):
        assert arm.lr == defaults.model.optim.lr and arm.weight_decay == defaults.model.optim.weight_decay
        assert arm.schedule == defaults.model.optim.sched and arm.mix["lm_weight"] == defaults.distill.lm_weight
    assert (lm.mix["lm_weight"], lm.lr) == (0.5, 3e-4) and lm.mix["loss"] == ours.mix["loss"]
    with pytest.raises(SystemExit, match=r"no distill\.hidden_pairs"):
        recovery_arms.of_product("cut", ["distill.hidden_pairs=[[1,1]]"])
    with pytest.raises(SystemExit, match="expected cut or resolved"):
        recovery_arms.of_product("whole")


def test_rates_of_the_published_recipe():
    """A cosine from 1e-4 to 1e-5 behind a warm-up of 100 steps, or a tenth."""
    nvidia = recovery_arms.published()
    long, short = nvidia.rates(2000), nvidia.rates(50)
    assert len(long) == 2000 and len(short) == 50
    assert long[:100] == pytest.approx([1e-4 * step / 101 for step in range(1, 101)])
    assert short[:5] == pytest.approx([1e-4 * step / 6 for step in range(1, 6)])
    for rates, warm_up in ((long, 100), (short, 5)):
        at = np.arange(len(rates) - warm_up) / (len(rates) - warm_up)
        assert rates[warm_up:] == pytest.approx(list(1e-5 + 9e-5 * (1 + np.cos(np.pi * at)) / 2))


def test_blocks_of_both_texts_in_turn_each_once():
    streams = {"prose": np.arange(100), "python": 1000 + np.arange(60)}
    blocks = recovery_bench.Blocks(streams, 9)
    assert len(blocks) == 12, "six of each, as many as the shorter has"
    rows = np.concatenate([blocks.batch(0, step, 4) for step in range(3)])
    assert rows.shape == (12, 10) and rows.dtype == np.int64
    assert (np.diff(rows, axis=1) == 1).all() and (rows[::2] < 1000).all() and (rows[1::2] >= 1000).all()
    assert len(set(rows[:, 0])) == 12 and (rows[:, 0] % 10 == 0).all()
    assert (blocks.batch(0, 3, 4)[1::2] == rows[1:4:2]).all(), "then the first again"
    assert (blocks.batch(1, 0, 4) != rows[:4]).any()
    larger = np.concatenate([blocks.batch(0, step, 2) for step in range(6)])
    assert (larger == rows).all(), "the size of a step does not change the order"


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_learner_that_is_taken_up_has_the_same_bits(weight_decay, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo_minitron.distill.loss import Mix

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    first, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
    start = {name: value.clone() for name, value in first.state_dict().items()}
    batches = torch.randint(0, 64, (6, 2, 25), generator=torch.Generator().manual_seed(0))

    def learner(model):
        return loop.Learner(model, Mix(), weight_decay=weight_decay)

    def learn(one, steps):
        for step in steps:
            tokens, labels = batches[step, :, :-1], batches[step, :, 1:]
            one.learn(tokens, labels, torch.ones(2, 24), 1e-2, loop.answer(teacher, tokens))
        return one

    whole = learn(learner(first), range(6))
    other = LlamaForCausalLM(config)
    other.load_state_dict(start)
    torch.save(learn(learner(other), range(4)).state(), tmp_path / "a.pt")
    taken_up = learner(LlamaForCausalLM(config))
    taken_up.take_up(torch.load(tmp_path / "a.pt", weights_only=True))
    assert taken_up.steps == 4
    learn(taken_up, range(4, 6))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, taken_up.model.state_dict()[name]), name
    norms = [value for name, value in first.named_parameters() if "norm" in name]
    assert norms and all(not torch.equal(one, torch.ones(32)) for one in norms)


def test_weight_decay_is_for_matrices_alone():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    learner = loop.Learner(model, None, weight_decay=0.1)
    by_decay = {group["weight_decay"]: group["params"] for group in learner._optimizer.param_groups}
    assert {one.ndim for one in by_decay[0.1]} == {2} and {one.ndim for one in by_decay[0.0]} == {1}
    assert sum(map(len, by_decay.values())) == len(list(model.parameters()))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("scale")
    source = make_llama(folder / "source", SHAPE)
    for kind, words in (("prose", ("begin", "end", "midst")), ("python", ("class", "def", "import"))):
        for split, lines in (("train", 240), ("validation", 60)):
            texts = [TEXT.format(words[n % 3], n) for n in range(lines)]
            rows = [json.dumps({"text": "".join(texts[at : at + 20])}) for at in range(0, lines, 20)]
            (folder / f"{kind}_{split}.jsonl").write_text("\n".join(rows))
    passages = [{"context": "The end of a word is what one", "word": word, "source": ""} for word in ("reads", "end")]
    (folder / "cloze.jsonl").write_text("".join(json.dumps(one) + "\n" for one in passages))
    return source, folder


def words(inputs, table: Path, *further: str) -> list[str]:
    source, folder = inputs
    given = {"source": source, "texts": folder, "work": folder / "work", "json": table, "cloze": folder / "cloze.jsonl"}
    sizes = {"batch": 4, "length": 32, "blocks": 6, "samples": 8, "seeds": 1, "budgets": "0.000512,0.001024"}
    return [f"--{name}={value}" for name, value in (given | sizes).items()] + list(further)


def test_cells_are_kept_put_down_and_taken_up(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(recovery_bench.TARGETS, "smollm2", {"small": {"hidden_size": 48, "ffn_hidden_size": 64}})
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    monkeypatch.setattr(sys, "argv", ["recovery.py", "--scale", *words(inputs, whole)])
    recovery.main()
    found = json.loads(whole.read_text())
    assert list(found["cells"]) == [f"small|{arm}|{n}|0" for n in (512, 1024) for arm in ("nvidia", "cut", "ours")]
    with NemoReader(inputs[1] / "work" / "small_resolved_8.nemo") as reader:
        size = reader.shape.num_parameters()
    for cell in found["cells"].values():
        assert cell["parameters"] == size and cell["cloze"] in (0.0, 0.5, 1.0)
        assert [point["tokens"] for point in cell["curve"]] == sorted({0, *(
            round(share * cell["budget"] / 128) * 128 for share in (0.125, 0.25, 0.5, 1.0)
        )})  # fmt: skip
        assert cell["curve"][-1]["prose"] == cell["loss"]["prose"] != cell["curve"][0]["prose"]
        assert cell["settings"]["steps"] == cell["budget"] // 128
    starts = {arm: found["cells"][f"small|{arm}|512|0"]["curve"][0] for arm in ("nvidia", "cut", "ours")}
    assert starts["nvidia"] == starts["cut"] != starts["ours"]
    assert "lead over nvidia" in (told := capsys.readouterr().out) and "0 of" not in told
    assert whole.with_suffix(".png").is_file()

    monkeypatch.setattr(loop.Learner, "learn", lambda *_: pytest.fail("all is there"))
    recovery.main()
    monkeypatch.undo()
    monkeypatch.setitem(recovery_bench.TARGETS, "smollm2", {"small": {"hidden_size": 48, "ffn_hidden_size": 64}})

    asked = iter([False] * 3 + [True] + [False] * 2 + [True])
    monkeypatch.setattr(recovery_scale.Deadline, "passed", lambda self: next(asked, False))
    some = words(inputs, parts, "--arms=ours", "--budgets=0.001024")
    for step in (3, 5):
        recovery_scale.main(some)
        assert f"stopped in small|ours|1024|0: at step {step} of 8" in capsys.readouterr().out
        assert [path.suffix for path in (inputs[1] / "work" / "cells").iterdir()] == [".pt"]
    recovery_scale.main(some)
    there, here = (json.loads(path.read_text())["cells"]["small|ours|1024|0"] for path in (parts, whole))
    for part in ("curve", "loss", "cloze", "settings"):
        assert there[part] == here[part], "the same bits"
    assert not list((inputs[1] / "work" / "cells").iterdir())
    with pytest.raises(SystemExit, match="expected a table of"):
        recovery_scale.main([*some, "--blocks=5"])
    other = ["--arms=", "--arm=ours=resolved,model.optim.lr=3e-4"]
    with pytest.raises(SystemExit, match=r"ours\|1024\|0 has lr=0.0001, not 0.0003; take another --json"):
        recovery_scale.main([*some, *other])


def test_small_budgets_come_first_and_large_ones_have_one_seed():
    given = argparse.Namespace(budgets="30,0.1", seeds=2)
    cells = list(recovery_scale.cells_of(given, ["cut", "ours"], ["a"]))
    assert [(cell.arm, cell.budget, cell.seed) for cell in cells] == [
        ("cut", 100_000, 0), ("ours", 100_000, 0), ("cut", 100_000, 1), ("ours", 100_000, 1),
        ("cut", 30_000_000, 0), ("ours", 30_000_000, 0),
    ]  # fmt: skip


def test_words_that_are_not_known_are_refused(capsys):
    with pytest.raises(SystemExit):
        recovery_scale.arguments(["--json=a", "--source=a", "--texts=b", "--work=c", "--arms=other"])
    assert "unknown: other; known: nvidia, cut, ours, 96M, 70M" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        recovery_scale.arguments(["--json=a"])
    assert "--source, --texts and --work are needed" in capsys.readouterr().err
