"""Keys of one kind of config or header: those that are applied, neutral, or refused unless they say little."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.processes import notice


@dataclass(frozen=True)
class Keys:
    """The keys of one kind of file.

    Attributes:
        applied: read, and part of what is built.
        neutral: without effect on what the model computes: training, sampling, names, how fast.
        neutral_beginnings: the same, for all names that begin so.
        only: values under which we build what the file means; any other is refused.
        absent: what a key of ``only`` means where the file does not have it, if not its first value.
        kinds: for keys that NeMo's model class is told of: ``number``, ``flag`` or ``word``. Those of ``only`` have the
            kind of their first value, and go no further where that is none.
    """

    applied: frozenset[str]
    neutral: frozenset[str]
    only: Mapping[str, tuple[Any, ...]]
    neutral_beginnings: tuple[str, ...] = ()
    absent: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)

    def having(self, only: Mapping[str, tuple[Any, ...]], neutral: Iterable[str] = (), required: bool = False) -> Keys:
        """These keys as a family has them: with further conditions, and without those on its ``neutral`` ones.

        Args:
            required: whether the keys of ``only`` must be there; else what is absent has their first value.
        """
        conditions = {key: allowed for key, allowed in self.only.items() if key not in neutral} | dict(only)
        absent = {**self.absent, **(dict.fromkeys(only) if required else {})}
        return replace(self, only=conditions, neutral=self.neutral.union(neutral), absent=absent)

    def renamed(self, begins: str, other: str) -> Keys:
        """These keys with another beginning of those names that begin with ``begins``."""

        def new(key: str) -> str:
            return other + key.removeprefix(begins) if key.startswith(begins) else key

        return replace(
            self,
            applied=frozenset(map(new, self.applied)),
            neutral=frozenset(map(new, self.neutral)),
            only={new(key): allowed for key, allowed in self.only.items()},
            neutral_beginnings=tuple(map(new, self.neutral_beginnings)),
        )

    def kind(self, key: str) -> str | None:
        """Kind of the values of a key that NeMo's model class is told of; None for all others."""
        first = self.only.get(key, (None,))[0]
        kind = {bool: "flag", int: "number", float: "number", str: "word"}.get(type(first))
        return self.kinds.get(key, kind)

    def check(self, found: Mapping[str, Any], where: str) -> None:
        """Refuse a value that is not ours, by name; say which keys are unknown.

        Args:
            found: the keys with their values.
            where: the file, in messages.

        Raises:
            MinitronError: a key of ``only`` with another value.
        """
        for key, allowed in self.only.items():
            if problem := self.problem(key, found.get(key, self.absent.get(key, allowed[0]))):
                raise MinitronError(f"{where}: {key} {problem}")
        unknown = [key for key in found if key not in self and not key.startswith(self.neutral_beginnings)]
        if unknown:
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            names = ", ".join(f"'{key:.60}'" if key.isprintable() else repr(key)[:60] for key in unknown[:8])
            notice(f"{where}: unknown and not used: {names}{more}")

    def problem(self, key: str, value: Any) -> str | None:
        """What is wrong with the value of a key: "must be X, found Y"; None where nothing is."""
        allowed = self.only.get(key, (value,))
        if any(value == one and isinstance(value, str) == isinstance(one, str) for one in allowed):
            return None
        return f"must be {_plain(allowed[0])}, found {_plain(value)}"

    def __contains__(self, key: str) -> bool:
        return key in self.applied or key in self.neutral or key in self.only


def has_no_place(where: str, name: str, expected: Iterable[str]) -> MinitronError:
    """The error of a tensor that this architecture does not have, whose use would so be lost."""
    return MinitronError(f"{where}: tensor '{name}' has no place in this architecture, which has {', '.join(expected)}")


def other_head(where: str, name: str, key: str, how: str = "") -> MinitronError:
    """The error of a tied model whose file has another head: of two models, which one is meant is not known."""
    return MinitronError(
        f"{where}: tensor '{name}' differs from the embedding table, which {key} ties it to; set {key} to false{how} "
        "to use it, or take it out of the file"
    )


def _plain(value: Any) -> str:
    """A value as config files have it, of bounded length."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else f"{value!r:.80}"
