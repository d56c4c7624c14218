"""What the rows of ``benchmarks/zero_shot.py`` see."""

from __future__ import annotations

import itertools
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_minitron.data.blocks import token_blocks

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import zero_shot_bench
import zero_shot_texts


@pytest.mark.parametrize("name", zero_shot_texts.SETTINGS)
def test_calibration_is_of_other_files_in_every_draw(name):
    numbers = np.arange(500)
    choose = zero_shot_texts.SETTINGS[name].calibration
    draws = [choose(numbers[numbers % 25 != 0], draw)[: zero_shot_bench.SAMPLES] for draw in range(3)]
    for chosen in draws:
        assert 0 < len(chosen) <= 64
        assert len(set(chosen)) == len(chosen)
        assert not set(chosen) & set(numbers[::25])
    for one, other in itertools.combinations(draws, 2):
        assert len(set(one) & set(other)) < len(one) / 2


def test_sentences(tmp_path):
    (tmp_path / "ca01").write_text("\n\n\tA/at dog/nn ,/, ``/`` 1/2/cd ''/'' ./. \n\n\n\tTwo/cd ;/. ?/.\n")
    (tmp_path / "ca02").write_text("Hello/uh")
    lines = zero_shot_texts.sentences(tmp_path, tmp_path / "brown.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["A dog, `` 1/2 ''.\nTwo ; ?", "Hello"]


def test_dialogues(tmp_path):
    def said(*messages):
        return {"messages": [[{"sender": sender, "text": text} for sender, text in messages]]}

    with zipfile.ZipFile(tmp_path / "chat.whl", "w") as wheel:
        conversations = {"2": said(("x", "Bye.")), "1": said(("y", "Hi!"), ("x", "Oh."), ("y", "Well?"))}
        wheel.writestr("chitchat_dataset/dataset.json", json.dumps(conversations))
    assert list(zero_shot_texts.dialogues(tmp_path / "chat.whl")) == ["A: Hi!\nB: Oh.\nA: Well?", "A: Bye."]


def test_a_draw_of_written_blocks_is_all_of_them(tmp_path):
    blocks = torch.randint(70_000, (5, 16), generator=torch.Generator().manual_seed(0))
    prefix = zero_shot_texts.write_blocks(blocks, tmp_path / "blocks")
    drawn = token_blocks(prefix, 16, num_samples=5, seed=3)[:, :-1]
    assert sorted(drawn.tolist()) == sorted(blocks.tolist())
