"""WikiText: its lines joined into articles."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

from nemo_minitron.data.lines import MAX_RECORD
from nemo_minitron.data.messages import Conversation
from nemo_minitron.data.readers import Row, Text, is_blank

_HEADING = re.compile(r" = (?!= ).*\S = ?")
_SUBHEADING_END = re.compile(r".* = = ?")


def is_heading(line: Text) -> bool:
    """Whether a line is WikiText's level-1 heading, `` = Title = ``; `` = = Section = = `` is not."""
    if isinstance(line, Conversation):
        return False
    line = line.rstrip("\r\n")
    return bool(_HEADING.fullmatch(line)) and not _SUBHEADING_END.fullmatch(line)


def join_articles(rows: Iterable[Row]) -> Iterator[Row]:
    """Join WikiText lines into articles: one document from each level-1 heading to the next.

    Blank lines are dropped (the HF layout stores them empty, the original one as a space), so both layouts give the
    same articles. Lines before the first heading, as in a shard cut inside an article, are a document of their own.
    An article with a line that cannot be taken is one that cannot.
    """
    lines: list[str] = []
    size, where, done, bad = 0, "", 0.0, None
    for row in rows:
        line = row.texts[0] if row.texts else ""
        if isinstance(line, Conversation):
            yield row
            continue
        if is_heading(line) and (lines or bad):
            yield bad or Row(("".join(lines),), done, where)
            lines, size, bad = [], 0, None
        where = where if lines else row.where
        size += len(line)
        if size > MAX_RECORD:
            row = row._replace(fault=f"expected an article of at most {MAX_RECORD >> 20} MiB, found a longer one")
        if row.fault:
            bad = bad or row._replace(texts=())
            lines = []
        elif line.strip() and not bad:
            lines.append(line if line.endswith("\n") else line + "\n")
        done = row.done
    if lines or bad:
        yield bad or Row(("".join(lines),), done, where)


def looks_like_wikitext(rows: Iterator[Row]) -> tuple[bool, Iterator[Row]]:
    """Whether the first row that is not blank is a level-1 heading, and the rows, without the blank ones before it."""
    for row in rows:
        if row.fault or not all(map(is_blank, row.texts)):
            return len(row.texts) == 1 and is_heading(row.texts[0]), itertools.chain([row], rows)
    return False, rows
