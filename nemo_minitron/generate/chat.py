"""A conversation in the terminal: lines in, answers out, and a history that fits the model's positions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from nemo_minitron.data.messages import Messages
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.plain import plain
from nemo_minitron.generate.request import Prompt
from nemo_minitron.generate.talker import Answer
from nemo_minitron.generate.words import Words
from nemo_minitron.jobs.processes import notice

QUIT = "/quit"


class Chat:
    """A conversation with its history.

    Args:
        system: what the model is told first; nothing when None.

    Raises:
        MinitronError: what cannot go on: no chat template, or one that does not take the system's message.
    """

    def __init__(self, words: Words, system: str | None) -> None:
        self._words = words
        self._system: Messages = [] if system is None else [{"role": "system", "content": system}]
        self._history: Messages = []
        self._fitting([{"role": "user", "content": "?"}])

    def talk(self, lines: Iterable[str], answer: Callable[[list[int]], Answer]) -> None:
        """Answer line after line to their end, or to one that says ``/quit``; a blank one says nothing.

        A line that cannot be answered is told on stderr, and the conversation goes on without it.
        """
        for line in lines:
            text = line.strip()
            if text == QUIT:
                return
            if not text:
                continue
            try:
                history, ids = self._fitting([*self._history, {"role": "user", "content": text}])
            except MinitronError as error:
                print(f"minitron: {plain(str(error))}", file=sys.stderr)
                continue
            if len(history) <= len(self._history):
                positions = self._words.positions
                notice(f"chat: what was said first no longer fits the model's {positions} positions, and is left out")
            self._history = [*history, {"role": "assistant", "content": answer(ids).answer}]

    def _fitting(self, history: Messages) -> tuple[Messages, list[int]]:
        """The conversation, without the oldest lines and answers where there is no room for another, and its ids."""
        words = self._words
        while len(history) > 1 and len(words.ids(self._prompt(history))) + words.room > words.positions:
            history = history[2:]
        return history, words.encode(self._prompt(history))

    def _prompt(self, history: Messages) -> Prompt:
        return Prompt([*self._system, *history], "chat")


def typed_lines() -> Iterator[str]:
    """Lines of stdin; in a terminal with a mark that waits for one, and the keys that edit it."""
    try:
        if not sys.stdin.isatty():
            yield from sys.stdin
            return
        with suppress(ImportError):
            import readline  # noqa: F401  # input() then has line editing
        print(f"minitron: {QUIT} or Ctrl-D ends the chat", file=sys.stderr)
        while True:
            yield input("> ")
    except EOFError:
        print()
    except UnicodeDecodeError as error:
        raise MinitronError(f"stdin: expected {error.encoding.upper()} text, found: {error.reason}") from None
