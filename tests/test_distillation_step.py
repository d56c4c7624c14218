"""docs/distillation_step.md walks through a step: every function that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", (ROOT / "docs" / "distillation_step.md").read_text())))


def qualified(tree: ast.Module) -> set[str]:
    """Functions of a module and methods of its classes, ``Class.method``."""
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("file", "function"), NAMED)
def test_the_function_is_there(file, function):
    path = ROOT / "nemo_minitron" / file
    assert function in qualified(ast.parse(path.read_text())), f"{file} has no {function}"


def test_the_walk_is_whole():
    assert len(NAMED) >= 20 and {file.split("/")[0] for file, _ in NAMED} >= {"nemo", "distill"}
