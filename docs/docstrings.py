"""Docstrings of the code as the site's API reference wants them: one entry for each name.

In the code ``a, b: what both are`` and ``a: what it is. b: what it is`` save lines; griffe takes neither apart.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.M)
NEXT = r"^( +)(.*[.;]) ({names}): "


class Entries(griffe.Extension):
    """Puts names that share a description, or a line, into entries of their own."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring and re.search(r"^(Args|Attributes):", obj.docstring.value, re.M):
            text = SHARED.sub(_apart, obj.docstring.value)
            if names := [parameter.name for parameter in getattr(obj, "parameters", ())]:
                following = re.compile(NEXT.format(names="|".join(map(re.escape, names))), re.M)
                while (split := following.sub(_on_its_own_line, text)) != text:
                    text = split
            obj.docstring.value = text


def _apart(found: re.Match[str]) -> str:
    indent, names, said = found.groups()
    return "\n".join(f"{indent}{name}: {said}" for name in names.split(", "))


def _on_its_own_line(found: re.Match[str]) -> str:
    indent, before, name = found.groups()
    return f"{indent}{before}\n    {name}: "
