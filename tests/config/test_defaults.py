"""Defaults stand in the schema alone: nothing else repeats one as a literal."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from nemo_minitron.config.keys import keys
from nemo_minitron.config.schema import COMMANDS

PACKAGE = Path(__file__).parents[2] / "nemo_minitron"


def schema_defaults() -> dict[str, list]:
    """Defaults that say something, by the last part of the key and by the last two with an underscore between."""
    found: dict[str, list] = {}
    for schema in COMMANDS.values():
        for name, _, default, metadata in keys(schema):
            if metadata.get("foreign") or default is None or isinstance(default, bool | list | dict):
                continue
            for short in (name.rpartition(".")[2], "_".join(name.split(".")[-2:])):
                found.setdefault(short, []).append(default)
    return found


def repeats(source: str) -> list[str]:
    """``LINE: name`` of every argument, field, ``.get("name", …)`` and ``….name or …`` that repeats a schema default.

    The integers 0 and 1 are no evidence of a repetition.
    """
    defaults, found = schema_defaults(), []

    def note(name: str | None, node: ast.expr | None) -> None:
        value = node.value if isinstance(node, ast.Constant) else None
        if type(value) not in (str, int, float) or (type(value) is int and value in (0, 1)):
            return
        if any(value == default and type(value) is type(default) for default in defaults.get(name or "", ())):
            found.append(f"{node.lineno}: {name}")

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            positional = [*node.args.posonlyargs, *node.args.args]
            for argument, default in zip(positional[::-1], node.args.defaults[::-1], strict=False):
                note(argument.arg, default)
            for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
                note(argument.arg, default)
        elif isinstance(node, ast.ClassDef):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    note(field.target.id, field.value)
        elif isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            note(_key_read(node.values[0]), node.values[-1])
        elif isinstance(node, ast.Call) and len(node.args) == 2:
            note(_key_read(node), node.args[1])
    return found


def _key_read(node: ast.expr) -> str | None:
    """The key in ``….key``, ``…["key"]``, ``….get("key")``, ``select(…, "key")``; also inside of ``int(…)``."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return str(node.slice.value).rpartition(".")[2]
    if isinstance(node, ast.Call):
        for argument in node.args:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                return argument.value.rpartition(".")[2]
        return _key_read(node.args[0]) if node.args else None
    return None


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if "config" not in path.relative_to(PACKAGE).parts]


def test_no_module_repeats_a_default_of_the_schema():
    found = [f"{path.relative_to(PACKAGE)}:{line}" for path in MODULES for line in repeats(path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        'size = options.get("layer_tokens", 6144)',
        'size = int(options.get("layer_tokens") or 6144)',
        "width = prune.beam_width or 3",
        'way = cfg["layer_selection"] or "block_influence"',
        'text = _text(cfg, "tokenizer.library") or "huggingface"',
        'def convert(*, max_shard_size: str = "5GB"): ...',
        'def preprocess(input, tokenizer_library="huggingface"): ...',
        "class Mix:\n    temperature: float = 1.0",
    ],
)
def test_a_repeated_default_is_seen(line):
    assert len(repeats(line)) == 1


def test_other_values_and_other_names_are_no_repeats():
    assert repeats('a = cfg.split or "train"; b = cfg.get("layer_tokens", 2048); c = cfg.layers or 4096') == []
