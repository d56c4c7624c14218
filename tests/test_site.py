"""The site of the documents builds without a warning: every link of every page, and every module of the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    said = built.stdout + built.stderr
    assert built.returncode == 0 and "WARNING" not in said, said
    return folder


class Places(HTMLParser):
    """Where a page's links and pictures lead."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("href", "src") and value]


def test_every_document_is_a_page(site):
    for document in (ROOT / "docs").rglob("*.md"):
        page = document.relative_to(ROOT / "docs").with_suffix(".html")
        assert (site / (page.with_stem("index") if page.stem == "README" else page)).is_file(), document
    for notebook in (ROOT / "tutorials").glob("*.ipynb"):
        assert (site / "tutorials" / f"{notebook.stem}.html").is_file()


def test_links_lead_to_files_of_the_site_and_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        for place in Places(page).found:
            parts = urlsplit(place)
            if not parts.scheme and not parts.netloc and parts.path:
                assert (page.parent / parts.path).exists(), f"{page.relative_to(site)}: {place}"
        text = page.read_text(encoding="utf-8")
        assert 'src="http' not in text and "fonts.googleapis" not in text, page.name


def test_the_reference_shows_docstrings(site):
    text = (site / "reference" / "plan.html").read_text(encoding="utf-8")
    assert 'id="nemo_minitron.prune.plan.Plan"' in text and ":class:" not in text and ":mod:" not in text


def test_what_is_installed_for_the_site_is_named_exactly():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    names = {"mkdocs", "mkdocs-material", "mkdocstrings", "mkdocstrings-python", "griffelib", "pymdown-extensions"}
    assert all(f'"{name}==' in setup for name in names)
    assert "strict: true" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8").splitlines()
