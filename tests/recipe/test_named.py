"""What a stage's configuration names as its inputs, beside those that are declared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_minitron.config.keys import keys, tree_of
from nemo_minitron.config.schema import COMMANDS
from nemo_minitron.recipe import named
from nemo_minitron.recipe.stage import Stage


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "teacher.nemo", "x_text_document.bin", "x_text_document.idx", "x_text_document.json"):
        Path(name).write_text(name)
    for name in ("y_messages_document.bin", "y_messages_document.idx", "y_messages_mask.bin", "y_messages_mask.idx"):
        Path(name).write_text(name)
    Path("tokenizer").mkdir()
    Path("tokenizer/tokenizer.json").write_text("{}")


def found(config: dict[str, Any], inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = ()) -> list[str]:
    return named.named_inputs(Stage("s", "c", OmegaConf.create(config), inputs, outputs, None))


X = ["x_text_document.bin", "x_text_document.idx"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"input": "a.jsonl"}, ["a.jsonl"]),
        ({"input": "pydoc_topics"}, []),
        ({"input": None}, []),
        ({"tokenizer": {"type": "tokenizer"}}, ["tokenizer"]),
        ({"model": {"restore_from_path": "teacher.nemo", "nemo_path": "a.jsonl"}}, ["teacher.nemo"]),
        ({"model": {"data": {"data_prefix": [1.0, "x_text_document"]}}}, X),
        ({"model": {"data": {"data_prefix": {"train": ["x_text_document"], "validation": ["z"], "test": None}}}}, X),
        ({"calibration": {"data_prefix": "x_text_document"}}, X),
        ({"prune": {"calib_dataset": "a.jsonl", "scores": "tokenizer", "plan": None}}, ["a.jsonl", "tokenizer"]),
        ({"prune": {"calib_dataset": "x_text_document"}}, X),
        ({"evaluate": {"lm_eval": {"tasks": ["arc_easy", "a.jsonl"]}}}, ["a.jsonl"]),
        ({"prompts": "a.jsonl"}, ["a.jsonl"]),
        ({"prompts": ["Once upon a time"]}, []),
    ],
)
def test_what_is_named_and_there(config, expected):
    assert found(config) == expected


def test_a_mask_goes_with_its_tokens():
    given = {"evaluate": {"data_prefix": "y_messages_document"}}
    assert found(given) == [f"y_messages_{part}.{kind}" for part in ("document", "mask") for kind in ("bin", "idx")]
    assert found(given, ("y_messages_document.*",)) == ["y_messages_mask.bin", "y_messages_mask.idx"]


def test_what_is_declared_or_written_is_not_said_twice():
    given = {"input": "a.jsonl", "tokenizer": {"type": "tokenizer"}}
    assert found(given, ("./a.jsonl", "tokenizer/")) == found(given, (str(Path.cwd()),)) == []
    assert found(given, ("*.jsonl",)) == ["tokenizer"]
    assert found(given, outputs=("a.jsonl", "tokenizer")) == []


def test_the_keys_are_those_of_commands():
    known = {name for schema in COMMANDS.values() for name, *_ in keys(schema)}
    trees = [tree_of(schema) for schema in COMMANDS.values()]
    for key in (*named._PATHS, *named._PREFIXES):
        assert key in known or any(_is_in(key, tree) for tree in trees), key


def _is_in(key: str, tree: Any) -> bool:
    first, _, rest = key.partition(".")
    return tree is None or (first in tree and (not rest or _is_in(rest, tree[first])))
