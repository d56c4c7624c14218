"""Overrides, ``KEY=VALUE`` in Hydra's grammar: written for any value, and explained where one was written wrongly."""

from __future__ import annotations

import json
import os
import re
import shlex
from typing import Any


def word(key: str, value: Any) -> str:
    """The override that sets ``key`` to ``value``: text or a path, a number, a bool, None, or a list of these."""
    return f"{key}={_quoted(value)}"


def _quoted(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_quoted, value))}]"
    # backslashes count where a quote follows them, and nowhere else
    text = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), os.fspath(value))
    return f'"{text}"'


def how_to_quote(override: str) -> str:
    """Hint at the quotes, for the shell and for Hydra, that make a value plain text; "" where it may be meant as a
    list, a mapping or something quoted already."""
    key, equals, value = override.partition("=")
    if not equals or not value or value[0] in "[{'\"" or not re.fullmatch(r"[+~]{0,2}[\w.@/]+", key):
        return ""
    return f"; as plain text it is {shlex.quote(word(key, value))}"
