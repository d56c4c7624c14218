"""A tokenizer's chat template: a conversation as the model reads it, and which of its tokens the assistant says.

Where the template marks them with ``{% generation %}``, it is believed. Elsewhere they are found by rendering the
beginnings of the conversation: what the assistant says begins where the rendering of the messages before it, with the
generation prompt, ends, and ends where the rendering up to it does.

What is marked is what transformers' ``return_assistant_tokens_mask`` gives, but for its faults where a marked part
begins or ends with a blank: a byte-level tokenizer may leave that out of every token's offsets, and transformers then
drops all later parts, or counts everything to the end.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from nemo_minitron.data.messages import ASSISTANT, BadMessages, Messages
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import one_line

_MARK = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
_OPEN, _CLOSE = "\ue000\ue002", "\ue001\ue002"
"""Stand in a rendering where a marked part begins and ends: characters for private use, in no text together."""


class NoTemplate(MinitronError):
    """A tokenizer that cannot render any conversation: the fault of no record."""


class Said(NamedTuple):
    """A conversation in tokens.

    Attributes:
        ids: all its tokens.
        counts: per token 1 where the assistant says it, else 0; the end of its turn is said too.
    """

    ids: list[int]
    counts: list[int]


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: transformers'.
        name: of the tokenizer in messages.

    Raises:
        NoTemplate: it has none.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        if not getattr(tokenizer, "chat_template", None):
            raise NoTemplate(f"{name}: expected a tokenizer with a chat template for conversations, found none")
        added = tokenizer.added_tokens_decoder
        self._ends = {index for index, token in added.items() if token.content.strip()}
        special = [token.content for token in added.values() if token.special and token.content.strip()]
        self._control = re.compile("|".join(map(re.escape, special))) if special else None

    @property
    def fingerprint(self) -> str:
        """sha256 of the template's text."""
        return hashlib.sha256(self._tokenizer.get_chat_template().encode("utf-8", "surrogatepass")).hexdigest()

    def text(self, messages: Messages, prompt: bool = False) -> str:
        """The conversation as text.

        Args:
            prompt: whether the opening of the assistant's next turn is added.

        Raises:
            BadMessages: the template does not take it.
        """
        return str(self._apply(messages, add_generation_prompt=prompt, tokenize=False))

    def encode(self, messages: Messages, eod: int | None, responses: bool = True) -> Said:
        """The conversation in tokens, exactly those of transformers' ``apply_chat_template``, and which of them count.

        A token counts where it begins in what the assistant says; one that begins before, in the template's opening of
        the turn, does not. The turn's end counts as far as the last control token in it: a line break behind it, of
        which many templates have one, is the template's.

        Args:
            eod: the end-of-text token to end the document with, or None. It is left out where the template has ended
                the conversation with it, and counts where the template ends an assistant's last turn with no control
                token at all.
            responses: whether it matters which tokens the assistant says; else all count.

        Raises:
            BadMessages: the template does not take the conversation, or writes earlier turns otherwise once there are
                more; content spells a control token; the assistant says nothing.
            NoTemplate: the tokenizer cannot tell which characters a token is of.
        """
        for number, message in enumerate(messages):
            if self._control and (spelt := self._control.search(message["content"])):
                raise BadMessages(
                    f"message {number}: expected text, found the control token {spelt[0]!r} of {self._name}"
                )
        if not responses:
            ids = list(self._apply(messages, return_dict=False))
            counts = [1] * len(ids)
        elif not self._tokenizer.is_fast:
            raise NoTemplate(f"{self._name}: expected a tokenizer of the tokenizers library, found another")
        else:
            ids, counts = self._said(messages)
        if not any(counts):
            raise BadMessages("expected something that the assistant says, found nothing")
        return self._ended(Said(ids, counts), eod, messages[-1]["role"])

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of the conversation and of the opening of the assistant's answer to it.

        Raises:
            BadMessages: the template does not take it.
        """
        return list(self._apply(messages, add_generation_prompt=True, return_dict=False))

    def _apply(self, messages: Messages, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, **options)
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever a template raises of messages that it does not take
            raise BadMessages(
                f"expected messages that the chat template of {self._name} takes, found: {one_line(error)}"
            ) from None

    def _said(self, messages: Messages) -> Said:
        whole = self.text(messages)
        marked = bool(_MARK.search(self._tokenizer.get_chat_template()))
        parts = self._marked(messages, whole) if marked else self._beginnings(messages, whole)
        found = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(found["input_ids"]), found["offset_mapping"]
        # byte-level tokenizers leave the blank that a token begins with out of its offsets
        begins = [min(first, before[1]) for before, (first, _) in zip([(0, 0), *offsets], offsets, strict=False)]
        counts = [0] * len(ids)
        for begin, end in parts:
            said = [i for i, first in enumerate(begins) if begin <= first < end]
            if not marked:
                said = said[: self._turn([ids[i] for i in said], [whole[slice(*offsets[i])] for i in said])]
            for i in said:
                counts[i] = 1
        return Said(ids, counts)

    def _marked(self, messages: Messages, whole: str) -> list[tuple[int, int]]:
        """First character and end of each part of ``whole`` that the template marks."""

        def shown(mark: re.Match[str]) -> str:  # between two blocks, for what blocks do to the blanks around them
            sign = _CLOSE if mark[2] else _OPEN
            return f"{{%{mark[1]} if true %}}{{{{ '{sign}' }}}}{{% endif {mark[3]}%}}"

        template = _MARK.sub(shown, self._tokenizer.get_chat_template())
        before, *rest = str(self._apply(messages, tokenize=False, chat_template=template)).split(_OPEN)
        parts, text = [], before
        for piece in rest:
            said, _, other = piece.partition(_CLOSE)
            parts.append((len(text), len(text) + len(said)))
            text += said + other
        if text != whole:
            raise BadMessages(f"expected {{% generation %}} in {self._name} around text alone, found it to change text")
        return parts

    def _beginnings(self, messages: Messages, whole: str) -> list[tuple[int, int]]:
        """First character and end of each part of ``whole`` that an assistant's message makes."""
        return [
            (
                self._length(messages[:number], True, whole, number),
                self._length(messages[: number + 1], False, whole, number),
            )
            for number, message in enumerate(messages)
            if message["role"] == ASSISTANT
        ]

    def _length(self, beginning: Messages, prompt: bool, whole: str, number: int) -> int:
        """Characters of ``whole`` that a beginning of the conversation takes."""
        if not beginning:
            raise BadMessages("message 0: expected a conversation that the assistant does not begin")
        text = self.text(beginning, prompt)
        if not whole.startswith(text):
            raise BadMessages(
                f"message {number}: the chat template of {self._name} writes what comes before otherwise once the "
                "conversation goes on, so that it cannot be told which tokens the assistant says; expected one that "
                "only adds, or that marks them with {% generation %}"
            )
        return len(text)

    def _turn(self, ids: list[int], texts: list[str]) -> int:
        """How many of a turn's tokens are said: those up to its last control token, where only blank ones follow it."""
        last = _last(len(ids), lambda n: ids[n] in self._ends or texts[n].strip())
        return last if last and ids[last - 1] in self._ends else len(ids)

    def _ended(self, said: Said, eod: int | None, role: str) -> Said:
        if eod is None:
            return said
        ids, counts = said
        last = _last(len(ids), lambda n: ids[n] in self._ends or self._tokenizer.decode([ids[n]]).strip())
        closing = ids[last - 1] if last and ids[last - 1] in self._ends else None
        if closing == eod:
            return said
        return Said([*ids, eod], [*counts, int(closing is None and role == ASSISTANT)])


def _last(count: int, says: Callable[[int], object]) -> int:
    """How many of ``count`` tokens are left without the blank ones at the end."""
    while count and not says(count - 1):
        count -= 1
    return count
