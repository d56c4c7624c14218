"""Tutorials run top to bottom in a fresh kernel, and their notebooks are what their sources say."""

from __future__ import annotations

import os
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "tutorials"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_is_paired_with_its_source(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    expected = jupytext.read(source)
    assert [c.source for c in notebook.cells] == [c.source for c in expected.cells]
    assert any(c.get("outputs") for c in notebook.cells), "committed without outputs"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_tutorial_executes_on_the_tiny_model(source, tmp_path, monkeypatch):
    path = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = jupytext.read(source)
    assert any('MODEL = "tiny"' in cell.source for cell in notebook.cells)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    (result,) = [c for c in notebook.cells if c.cell_type == "code" and "closed" in c.source]
    printed = "".join(output.get("text", "") for output in result.outputs)  # it may come in several pieces
    assert "distillation closed" in printed
