"""Several prompts at once: each answer is the one that its prompt gets alone, whatever it shares the batch with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoint.formats import open_checkpoint
from nemo_minitron.cli import main
from nemo_minitron.config.sections import Inference
from nemo_minitron.convert import convert
from nemo_minitron.files.plain import plain
from nemo_minitron.generate.batch import Draw, padded
from nemo_minitron.generate.talker import Talker, load
from nemo_minitron.generate.words import Words
from nemo_minitron.synthetic import make_llama
from tests.llamas import SHAPES
from tests.test_generate import asked, decoded, logits, models, of_text, tokenizer  # noqa: F401  # a fixture

TEXTS = ["The import system, in short", "a", "A class definition is an executable statement. It may be", "if x", "of"]
COUNT = 20


def talker(source: Path, *words: str) -> Talker:
    cfg = asked(source, "prompt=a", f"inference.tokens_to_generate={COUNT}", *words)
    with open_checkpoint(source) as reader:
        return Talker(Words.of(reader, cfg), load(reader, cfg), cfg)


def prompts(home: Path, texts: Sequence[str] = TEXTS) -> list[list[int]]:
    words = tokenizer(home)
    found = [words(text)["input_ids"] for text in texts]
    assert len({len(ids) for ids in found}) > 1, "of unequal lengths"
    return found


# ------------------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("name", ["gqa", "tied", "head_dim", "padded", "llama3_rope", "biases", "qkv_bias", "qwen3"])
def test_greedy_text_is_that_of_a_dense_decode(name, models, tmp_path):  # noqa: F811
    """By the command, from a .nemo with a padded table, in the order of the prompts; three of them at once, and two."""
    home, output = models(name), tmp_path / "out.jsonl"
    words = [f"model.restore_from_path={home}/model.nemo", f"output_path={output}", "inference.greedy=true"]
    words += [f"inference.tokens_to_generate={COUNT}", "batch_size=3", f"prompts={json.dumps(TEXTS)}"]
    assert main(["generate", *words]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert found == [{"text": text, **of_text(home, text, COUNT)} for text in TEXTS]
    assert len({one["answer"] for one in found}) == len(TEXTS)


def test_a_sliding_window(tmp_path):
    """Of 12 tokens, so that it leaves out what lies before; against transformers in float64 without a cache."""
    make_llama(tmp_path / "hf", SHAPES["window"].replace(sliding_window=12))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    assert model.config.sliding_window == 12
    batch, expected = prompts(tmp_path), []
    assert max(map(len, batch)) > 12 > min(map(len, batch))
    for ids in batch:
        new: list[int] = []
        while len(new) < COUNT and 0 not in new:
            with torch.no_grad():
                new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
        expected.append(new)
    assert talker(tmp_path / "hf").tokens(batch) == expected


def test_each_ends_by_its_own_end_or_room(models, tmp_path):  # noqa: F811
    """One says what ends a text early, one has three positions left, the others go on."""
    home = models("gqa")
    batch = prompts(home)
    batch[1] = (batch[2] * 30)[: 128 - 3]
    alone = [decoded(home / "model.nemo", ids, COUNT if ids is not batch[1] else 3, -1) for ids in batch]
    others = {token for row in (alone[1], alone[2], alone[4]) for token in row}
    end = next(token for place, token in enumerate(alone[0]) if place >= 2 and token not in others)
    for file in (home / "hf").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    expected = [row[: row.index(end) + 1] if end in row else row for row in alone]
    assert len(expected[0]) < COUNT == len(expected[2])
    model = talker(tmp_path)
    assert model.tokens(batch) == expected
    assert [answer.finish_reason for answer in model.answers(batch)][:3] == ["stop", "length", "length"]


def test_a_penalty_for_repetition_does_not_see_the_padding(models):  # noqa: F811
    home = models("gqa")
    model, batch = talker(home / "hf", "inference.repetition_penalty=1.7"), prompts(home)
    together = model.tokens(batch)
    assert together == [model.tokens([ids])[0] for ids in batch] != talker(home / "hf").tokens(batch)
    ids, mask = padded([[7, 8, 9], [5]])
    assert ids.tolist() == [[7, 8, 9], [5, 5, 5]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_bf16(models, tmp_path):  # noqa: F811
    """Every token is, but for the rounding, the likeliest in float64."""
    home = models("gqa")
    convert(home / "hf", tmp_path / "half.nemo", precision="bf16")
    batch = prompts(home)
    rows = talker(tmp_path / "half.nemo", "precision=bf16").tokens(batch)
    with open_checkpoint(tmp_path / "half.nemo") as reader:
        for ids, new in zip(batch, rows, strict=True):
            exact = logits(reader, ids + new)[len(ids) - 1 : -1]
            chosen = exact.gather(1, torch.tensor(new)[:, None])[:, 0]
            assert len(new) > 1 and (exact.max(1).values - chosen).max() < 0.05 and exact.std() > 0.5


# -------------------------------------------------------------------------------------------------------------- drawn

DRAWN = ["inference.temperature=1.0", "inference.top_k=50", "inference.top_p=0.95", "seed=3"]


def test_what_is_drawn_does_not_depend_on_the_batch(models):  # noqa: F811
    home = models("gqa")
    batch = prompts(home)
    together = talker(home / "hf", *DRAWN).tokens(batch)
    one_by_one, in_twos = talker(home / "hf", *DRAWN), talker(home / "hf", *DRAWN)
    assert [one_by_one.tokens([ids])[0] for ids in batch] == together
    assert [row for first in (0, 2, 4) for row in in_twos.tokens(batch[first : first + 2])] == together
    among_others = talker(home / "hf", *DRAWN).tokens([batch[3], batch[1], batch[4] * 9])
    assert among_others[1] == together[1] and among_others[0] != together[0] != together[3]
    again, other = (talker(home / "hf", *DRAWN[:-1], f"seed={seed}").tokens([batch[0]] * 3) for seed in (3, -4))
    assert again[0] == together[0] and len({*map(tuple, again), *map(tuple, other)}) == 6, "each time another"


def test_tokens_are_drawn_as_likely_as_they_are():
    """Frequencies over 20,000 prompts, against temperature, top-k and top-p written out."""
    scores = torch.tensor([2.0, 1.5, 0.3, -1.0, -torch.inf, 0.9])
    options = Inference(temperature=0.8, top_k=4, top_p=0.9)
    shares = (scores / 0.8).softmax(0)
    shares[shares.topk(2, largest=False).indices] = 0
    shares /= shares.sum()
    assert shares.sort(descending=True).values[:3].sum() > 0.9 > shares.sort(descending=True).values[:2].sum()
    shares[shares.argsort(descending=True)[3]] = 0
    shares /= shares.sum()
    found = Draw(options, 5, range(20_000))(torch.zeros(20_000, 1).long(), scores.expand(20_000, -1))
    assert ((found == 0).sum(1) == 1).all() and ((found == -torch.inf).sum(1) == 5).all()
    counts = found.argmax(1).bincount(minlength=6) / 20_000
    assert (counts[shares == 0] == 0).all() and (counts - shares).abs().max() < 0.015


def test_an_impossible_token_is_never_drawn(monkeypatch):
    """Not even by the least and the largest number that a generator gives."""
    for number, expected in ((0.0, 2), (1 - 2**-53, 1)):
        draw = Draw(Inference(temperature=1.0, top_k=0, top_p=1.0), 0, [0])
        monkeypatch.setattr(draw, "_generators", [type("Fixed", (), {"random": lambda self, found=number: found})()])
        scores = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
        assert draw(torch.zeros(1, 1).long(), scores).argmax().item() == expected


# ------------------------------------------------------------------------------------------------------------- stdout


def test_answers_are_shown_below_their_prompts(models, capsys):  # noqa: F811
    home = models("gqa")
    texts = ["a b", "who is", "if"]
    words = [f"model.restore_from_path={home}/hf", f"prompts={json.dumps(texts)}", "inference.greedy=true"]
    assert main(["generate", *words, f"inference.tokens_to_generate={COUNT}", "batch_size=2"]) == 0
    first, second, third = (of_text(home, text, COUNT)["answer"] for text in texts)
    assert capsys.readouterr().out == plain(f"1. a b\n{first}\n\n2. who is\n{second}\n\n3. if\n{third}\n")


def test_a_prompt_that_the_model_cannot_take_is_named_before_any_is_answered(models, capsys, monkeypatch):  # noqa: F811
    def never(*given: Any) -> None:
        raise AssertionError("no weight is to be read")

    monkeypatch.setattr("nemo_minitron.generate.talker.load", never)
    long = json.dumps(["a", "x " * 400, "b"])
    assert main(["generate", f"model.restore_from_path={models('gqa')}/hf", f"prompts={long}"]) == 2
    shown = capsys.readouterr()
    assert "prompts[1]: expected less than 128 tokens" in shown.err and not shown.out
