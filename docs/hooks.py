"""What ``mkdocs.yml`` cannot say: pages and files from outside of ``docs/``, and links to them.

Links in the pages are those that work in a checkout (``../tutorials/00_journey.ipynb``). On the site notebooks are
pages, made by nbconvert from their committed outputs, and results of benchmarks are files to download. A link to any
other file of the checkout, such as a script, becomes its text.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Path in the checkout → path on the site, beside ``docs/NAME`` → ``NAME`` and notebooks."""
LINK = re.compile(r"\[([^\[\]]*)\]\(([^)#:\s]+)(#[^)]*)?\)")
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):<code>(.*?)</code>")


def on_config(config: Any) -> Any:
    """Put the pages of commands into the navigation, in the order of their index."""
    index = (ROOT / "docs" / "commands" / "README.md").read_text(encoding="utf-8")
    for section in config.nav:
        if pages := section.get("Commands"):
            pages[1:1] = [f"commands/{name}" for name in re.findall(r"\]\((\w+\.md)\)", index)]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside of ``docs/``."""
    from nbconvert import MarkdownExporter

    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for notebook in sorted((ROOT / "tutorials").glob("*.ipynb")):
        resources = {"output_files_dir": f"{notebook.stem}_files"}
        text, found = MarkdownExporter().from_filename(str(notebook), resources=resources)
        files.append(File.generated(config, f"tutorials/{notebook.stem}.md", content=text))
        for name, content in found["outputs"].items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    for folder in ("tutorials/pictures", "benchmarks/results"):
        for file in sorted((ROOT / folder).iterdir()):
            files.append(File.generated(config, f"{folder}/{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Point links at places on the site."""
    here = page.file.src_uri
    origin = next((source for source, target in PAGES.items() if target == here), None)
    origin = origin or (here if here.startswith("tutorials/") else f"docs/{here}")

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        there = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        place = site_path(there)
        if place is not None and files.get_file_from_path(place) is not None:
            return f"[{text}]({posixpath.relpath(place, posixpath.dirname(here) or os.curdir)}{anchor})"
        return text if place is None and (ROOT / there).is_file() else match[0]  # mkdocs says that it leads nowhere

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def site_path(path: str) -> str | None:
    """Where a path of the checkout is on the site; None where it is not there."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("tutorials/"):
        return path.removesuffix(".ipynb").removesuffix(".md") + ".md" if path.endswith((".ipynb", ".md")) else path
    return path if path.startswith("benchmarks/results/") else None


def on_page_content(html: str, **_: Any) -> str:
    """Show ``:class:`X``` of docstrings as code."""
    return ROLE.sub(lambda match: f"<code>{match[1].lstrip('~')}</code>", html)
