"""An override says what was meant, whatever the text; and a hint's quotes work in a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from nemo_minitron.config.words import how_to_quote, word

TEXTS = [
    "/models/ü",
    "a=b",
    "a(1), [2]",
    "it's",
    'a "b"',
    r"back\slash",
    r"both\" of",
    "end\\",
    "",
    "null",
    "1",
    "{x: y}",
]


def parsed(text):
    return OverridesParser.create().parse_override(text).value()


@pytest.mark.parametrize("value", [*TEXTS, True, None, 3, 1e-5, [1, "x", None], ["a,b", "c]"]])
def test_any_value(value):
    assert parsed(word("a.b", value)) == value


def test_a_path():
    assert parsed(word("a", Path("x") / "ü")) == "x/ü"


@pytest.mark.parametrize("text", ["/models/ü", "a=b", "a(1)", "it's", "a b(c)"])
def test_hints_work_in_a_shell(text):
    [shown] = shlex.split(how_to_quote(f"a.b={text}").removeprefix("; as plain text it is "))
    assert parsed(shown) == text


@pytest.mark.parametrize("text", ["a=[1,2", "a={x", "a='b", "a", "a="])
def test_no_hint_where_no_text_is_meant(text):
    assert how_to_quote(text) == ""
