"""Conversations as records hold them: lists of messages, each with its ``role`` and its ``content``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, str]]
"""A conversation, as chat templates take it: each message with its ``role`` and ``content``."""

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")

_MEANT = ("tool_calls", "function_call", "reasoning_content", "weight")
"""What other tools say of a message beside its content; left out, a conversation would be another one."""


class BadMessages(Exception):
    """What is wrong with a conversation, without the name of its record."""


@dataclass(frozen=True)
class Conversation:
    """A document that is no text but messages.

    Attributes:
        messages: at least one.
    """

    messages: Messages

    def __len__(self) -> int:
        """Characters of all that is said."""
        return sum(len(message["content"]) for message in self.messages)


def messages_of(value: Any, name: str = "messages") -> Messages:
    """Take messages out of what JSON or a table holds; names beside ``role`` and ``content`` are left out.

    Args:
        name: of the value in messages of errors.

    Raises:
        BadMessages: no list of objects, an empty one, or a role or content that is no text.
    """
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise BadMessages(f"{name}: expected a list of objects with role and content, found {value!r:.80}")
    for number, one in enumerate(value):
        for part in ("role", "content"):
            if not isinstance(one.get(part), str):
                raise BadMessages(f"{name}[{number}].{part}: expected text, found {one.get(part)!r:.80}")
    return [{part: one[part] for part in ("role", "content")} for one in value]


def conversation_of(value: Any, name: str) -> Conversation:
    """A conversation to be learned from: :func:`messages_of`, where each message has a known role and says something.

    Raises:
        BadMessages: as there; a role that is none of :data:`ROLES`, content that is blank, or a part of a message that
            cannot be left out.
    """
    messages = messages_of(value, name)
    for number, (message, given) in enumerate(zip(messages, value, strict=True)):
        where = f"{name}[{number}]"
        if message["role"] not in ROLES:
            raise BadMessages(f"{where}.role: expected one of {', '.join(ROLES)}, found {message['role']!r:.80}")
        if not message["content"].strip():
            raise BadMessages(f"{where}.content: expected text, found none")
        for part in _MEANT:
            if given.get(part) not in (None, [], ""):
                raise BadMessages(f"{where}.{part}: expected role and content alone, found {given[part]!r:.80}")
    return Conversation(messages)
