"""The text of a page of documentation: a paragraph, a heading, an item of a list or a line of code per line."""

from __future__ import annotations

import re

from lxml import etree, html

_GONE = frozenset({"script", "style", "nav", "header", "footer", "form", "noscript"})
_GONE_CLASS = re.compile(r"(^| )(headerlink|linenos|toc)( |$)|sidebar|navheader|navfooter|toctree-wrapper")
_MAIN = ("//main", "//*[@role='main']", "//article", "//body")
_APART = re.compile(r"h[1-6]|pre|table|[uod]l")
_BLOCK = re.compile(
    r"h[1-6]|pre|table|[uod]l|address|article|blockquote|body|br|caption|d[dt]|div|fieldset|figcaption|figure|hr|li|main"
    r"|p|section|summary|tbody|t[dhr]|thead"
)
COMMON = frozenset({"the", "of", "to", "and", "a", "in", "is", "for", "that", "be"})
"""The ten commonest words of English technical text."""


def text_of(page: bytes) -> str:
    """Text of an HTML page without navigation; "" of one that has no elements."""
    try:
        root = html.document_fromstring(page, parser=html.HTMLParser(remove_comments=True, remove_pis=True))
    except (etree.ParserError, ValueError):
        return ""
    found = (element for path in _MAIN for element in root.xpath(path))
    main = next(found, None)
    return "" if main is None else _lines(main)


def _lines(main: etree._Element) -> str:
    lines: list[str] = []
    pieces: list[str] = []

    def end() -> None:
        if line := " ".join("".join(pieces).split()):
            lines.append(line)
        pieces.clear()

    walk = etree.iterwalk(main, events=("start", "end"))
    for event, element in walk:
        tag = element.tag
        if event == "start":
            if tag in _GONE or _GONE_CLASS.search(element.get("class", "")):
                walk.skip_subtree()
                continue
            if _BLOCK.fullmatch(tag):
                end()
            if _APART.fullmatch(tag) and lines and lines[-1]:
                lines.append("")
            if tag == "pre":
                lines += [line.rstrip() for line in str(element.text_content()).strip("\n").splitlines()]
                walk.skip_subtree()
            else:
                pieces.append(element.text or "")
        else:
            if _BLOCK.fullmatch(tag):
                end()
            if _APART.fullmatch(tag) and tag[0] != "h" and lines and lines[-1]:
                lines.append("")
            if element is not main:
                pieces.append(element.tail or "")
    end()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def is_english(text: str) -> bool:
    """Whether it has 50 words, and an eighth of them are among :data:`COMMON`."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return len(words) >= 50 and sum(word in COMMON for word in words) >= len(words) / 8
