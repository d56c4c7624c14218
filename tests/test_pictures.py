"""The pictures of the documents are drawn from what they show: each holds a digest of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pictures():
    spec = importlib.util.spec_from_file_location("docs_pictures", ROOT / "docs" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_up_to_date_and_small(pictures):
    files = {path.stem: path for path in pictures.FOLDER.iterdir()}
    assert files.keys() == pictures.digests().keys()
    for name, digest in pictures.digests().items():
        text = files[name].read_text(encoding="utf-8")
        assert digest in text, f"{name}: run python docs/pictures.py"
        assert len(text.encode()) <= 150 << 10


def test_other_figures_give_another_digest(pictures, monkeypatch):
    before = pictures.digests()
    monkeypatch.setattr(pictures, "figures", lambda: {"brown": {"ffn 1536→1024": (0.9, 0.42)}})
    after = pictures.digests()
    assert after["journey"] == before["journey"] and after["result"] != before["result"]


def test_they_are_drawn(pictures, tmp_path):
    pictures.main(folder=tmp_path)
    for name, digest in pictures.digests().items():
        assert digest in (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
