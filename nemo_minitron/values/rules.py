"""What may stand for a key of NeMo's or Lightning's, and what becomes of it: the words that the tables are written in.

Standard library only. A key is *applied* (its value is checked and does what its documentation says), *neutral* (it
may be given and has no effect here), or *fixed* (refused unless it says what is done in any case).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Check = Callable[[Any], str | None]
"""What was expected where a value does not do, else None."""


@dataclass(frozen=True)
class Rule:
    """What is done with one key.

    Attributes:
        kind: ``applied``, ``neutral`` or ``fixed``.
        note: what it means here; for ``fixed`` the reason and the way out.
        check: of the value where it is not null.
        values: for ``fixed``, what is accepted beside null.
        needed: null is refused.
    """

    kind: str
    note: str = ""
    check: Check | None = None
    values: tuple[Any, ...] = ()
    needed: bool = False

    def complaint(self, value: Any) -> str | None:
        """Why ``value`` is refused, without the key's name; None where it is accepted."""
        if value is None:
            return f"expected {(self.check and self.check(None)) or 'a value'}, found nothing" if self.needed else None
        if self.kind == "fixed" and not any(same(value, allowed) for allowed in self.values):
            only = " or ".join(shown(allowed) for allowed in self.values) or "null"
            return f"only {only} is supported, found {shown(value)}: {self.note}"
        expected = self.check(value) if self.check else None
        return f"expected {expected}, found {shown(value)}" if expected else None


Rules = dict[str, Any]
"""Name to :class:`Rule`, or to the rules of the names below it."""


def applied(check: Check | None, note: str = "", needed: bool = False) -> Rule:
    return Rule("applied", note, check, needed=needed)


def neutral(note: str) -> Rule:
    return Rule("neutral", note)


def fixed(values: tuple[Any, ...], note: str) -> Rule:
    return Rule("fixed", note, values=values)


def each(names: str, rule: Rule) -> Rules:
    """The same rule for several names."""
    return dict.fromkeys(names.split(), rule)


def same(value: Any, allowed: Any) -> bool:
    """Equality that tells 1 from true and from 1.0, which Lightning does too, and looks into lists."""
    if isinstance(allowed, list | tuple):
        return isinstance(value, list | tuple) and list(value) == list(allowed)
    if isinstance(allowed, dict):
        return isinstance(value, Mapping) and dict(value) == allowed
    return type(value) is type(allowed) and value == allowed


def shown(value: Any) -> str:
    """A value as one would write it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, str) else str(value)


# ------------------------------------------------------------------------------------------------------------- checks


def whole(least: int) -> Check:
    """An integer of at least ``least``."""

    def check(value: Any) -> str | None:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return None if good else f"a whole number of at least {least}"

    return check


def number(least: float = -math.inf, below: float = math.inf, above: float | None = None) -> Check:
    """A finite number in [least, below), and more than ``above`` where that is given."""

    def check(value: Any) -> str | None:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if good and least <= value < below and (above is None or value > above):
            return None
        bounds = [f"more than {above}"] if above is not None else [f"at least {least}"] if least > -math.inf else []
        bounds += [f"below {below}"] if below < math.inf else []
        return "a number" + (f", {' and '.join(bounds)}" if bounds else "")

    return check


def boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "text"


def mapping(value: Any) -> str | None:
    return None if isinstance(value, Mapping) else "keys below it"


def choice(*allowed: Any) -> Check:
    """One of the values given, of the same type."""

    def check(value: Any) -> str | None:
        return None if any(same(value, one) for one in allowed) else f"one of {', '.join(map(str, allowed))}"

    return check


def either(*checks: Check) -> Check:
    """Whatever one of the checks accepts."""

    def check(value: Any) -> str | None:
        expected = [one(value) for one in checks]
        return None if None in expected else " or ".join(map(str, expected))

    return check


def list_of(item: Check, length: int | None = None) -> Check:
    """A list whose items pass, of ``length`` items where given."""

    def check(value: Any) -> str | None:
        good = isinstance(value, Sequence) and not isinstance(value, str) and length in (None, len(value))
        wrong = next((found for found in map(item, value) if found), None) if good else item(None)
        return None if good and wrong is None else f"a list of {length or 'items'}, each {wrong}"

    return check


def duration(value: Any) -> str | None:
    """Lightning's ``DAYS:HOURS:MINUTES:SECONDS``, more than nothing."""
    parts = value.strip().split(":") if isinstance(value, str) else []
    good = len(parts) == 4 and all(p.isdecimal() for p in parts) and all(len(p) == 2 for p in parts[1:])
    return None if good and any(map(int, parts)) else "a time DAYS:HOURS:MINUTES:SECONDS, as in 00:04:00:00"
