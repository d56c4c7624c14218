"""What ``minitron generate`` is asked for, checked before anything heavy is imported or read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.config.schema import GenerateConfig
from nemo_minitron.config.sections import Inference
from nemo_minitron.data.lines import COMPRESSIONS, Line, read_lines
from nemo_minitron.data.messages import BadMessages, Messages, messages_of
from nemo_minitron.data.readers import not_unicode
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.files.staging import Staging
from nemo_minitron.jobs.processes import place


@dataclass(frozen=True)
class Prompt:
    """What is to be answered.

    Attributes:
        said: a text to go on with, or a conversation to answer.
        where: names it in messages: a key, or a file and its line.
    """

    said: str | Messages
    where: str

    @property
    def text(self) -> str:
        """What was said last."""
        return self.said if isinstance(self.said, str) else self.said[-1]["content"]

    def record(self) -> dict[str, str | Messages]:
        """The object of a ``.jsonl`` that asks the same."""
        return {"text" if isinstance(self.said, str) else "messages": self.said}


def requested(cfg: GenerateConfig) -> list[Prompt]:
    """The prompts to answer, in order; none for a chat.

    Raises:
        MinitronError: no such model, not exactly one of prompt, prompts and chat, a key that does not go with it, a
            value that cannot be, an output that cannot be written, a file of prompts that cannot be read, or several
            processes.
    """
    source = Path(required(cfg, "model.restore_from_path"))
    if not source.exists():
        raise MinitronError(
            f"model.restore_from_path: expected a .nemo, an HF folder or a GGUF, found nothing at {source}"
        )
    given = {"prompt": cfg.prompt is not None, "prompts": cfg.prompts is not None, "chat": cfg.chat}
    if sum(given.values()) != 1:
        found = " and ".join(name for name, there in given.items() if there) or "none"
        raise MinitronError(f"generate: expected one of prompt, prompts and chat=true, found {found}")
    if cfg.system is not None and not cfg.chat:
        raise MinitronError("system: goes with chat=true; in a .jsonl of prompts it is a message of the role system")
    if cfg.output_path and cfg.chat:
        raise MinitronError("output_path: goes with prompt or prompts, found chat=true")
    if cfg.batch_size < 1:
        raise MinitronError(f"batch_size: expected at least 1, found {cfg.batch_size}")
    _check_numbers(cfg.inference)
    here = place()
    if here is not None and here.world_size > 1:
        raise MinitronError(f"generate: runs in one process, found {here.world_size}")
    if cfg.output_path:
        Staging(cfg.output_path).abort()  # proves that it can be written, before the work
    if cfg.prompt is not None:
        return [Prompt(cfg.prompt, "prompt")]
    return [] if cfg.chat else _prompts(cfg.prompts)


def _check_numbers(options: Inference) -> None:
    most = "a number above 0 and at most 1"
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "temperature": (lambda value: 0 <= value < math.inf, "a number of at least 0"),
        "top_k": (lambda value: value >= 0, "at least 0"),
        "top_p": (lambda value: 0 < value <= 1, most),
        "repetition_penalty": (lambda value: 0 < value < math.inf, "a number above 0"),
        "tokens_to_generate": (lambda value: value >= 1, "at least 1"),
    }
    for name, (holds, expected) in rules.items():
        value = getattr(options, name)
        if not holds(value):
            raise MinitronError(f"inference.{name}: expected {expected}, found {value}")


def _prompts(given: Any) -> list[Prompt]:
    """A list of texts as it is, or the prompts in a file."""
    if isinstance(given, str):
        found = list(_read(Path(given)))
        if not found:
            raise MinitronError(f"prompts: expected a prompt in each line of {given}, found none")
        return found
    if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
        raise MinitronError(f"prompts: expected a file or a list of texts, found {given!r:.80}")
    return [Prompt(text, f"prompts[{number}]") for number, text in enumerate(given)]


def _read(path: Path) -> Iterator[Prompt]:
    """Prompts of a file, one per line that is not blank; of a ``.jsonl`` (packed or not) from its objects."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    is_jsonl = suffixes[-1:] in ([".jsonl"], [".json"])
    for line in _lines(path):
        where = f"prompts: {path}:{line.number}"
        if line.fault:
            raise MinitronError(f"{where}: {line.fault}")
        text = line.text.rstrip("\r\n")
        if text.strip():
            yield Prompt(_of_json(text, where) if is_jsonl else text, where)


def _lines(path: Path) -> Iterator[Line]:
    """Lines of a file, whose every error names the key."""
    if not path.exists():
        raise MinitronError(f"prompts: expected a file of prompts, found nothing at {path}")
    try:
        yield from read_lines(path)
    except MinitronError as error:
        raise MinitronError(f"prompts: {error}") from None


def _of_json(line: str, where: str) -> str | Messages:
    """``text`` or ``messages`` of one JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MinitronError(f"{where}: expected a JSON object, found: {error}") from None
    if not isinstance(record, dict):
        raise MinitronError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if ("text" in record) == ("messages" in record):
        raise MinitronError(f"{where}: expected one of text and messages, found {sorted(record)!s:.80}")
    if record.get("messages") is None:
        return _text(record.get("text"), f"{where}: text")
    try:
        messages = messages_of(record["messages"])
    except BadMessages as error:
        raise MinitronError(f"{where}: {error}") from None
    for number, one in enumerate(messages):
        for name, said in one.items():
            _text(said, f"{where}: messages[{number}].{name}")
    return messages


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise MinitronError(f"{where}: expected text, found {value!r:.80}")
    if fault := not_unicode(value):
        raise MinitronError(f"{where}: {fault}")
    return value
