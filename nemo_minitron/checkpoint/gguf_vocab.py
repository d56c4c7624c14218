"""A HF tokenizer as the metadata that llama.cpp reads: tokens, their kinds, merges or scores, special ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoint import gguf_pre
from nemo_minitron.checkpoint.tokenizer_open import SENTENCEPIECE, foreign, library_of, load_hf, load_sentencepiece
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.processes import notice

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens, as sentencepiece and llama.cpp number them."""
SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad"}
"""llama.cpp's names, one misspelt there, by transformers'."""


@dataclass
class Vocabulary:
    """What a GGUF says of a tokenizer, by the keys after ``tokenizer.``."""

    model: str
    tokens: list[str]
    kinds: list[int]
    pre: str | None = None
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    flags: dict[str, bool] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    chat_template: str | None = None

    def padded(self, rows: int) -> Vocabulary:
        """Itself, with as many tokens as the table has rows, as llama.cpp asks; those that are added mean nothing."""
        for number in range(len(self.tokens), rows):
            self.tokens.append(f"[PAD{number}]")
            self.kinds.append(UNUSED)
            if self.scores:
                self.scores.append(self.scores[-1])
        return self


def vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The vocabulary of a folder's tokenizer, for a table of ``rows`` rows.

    Raises:
        MinitronError: a tokenizer that is neither byte-level BPE nor sentencepiece's BPE, one that cuts a text in a way
            for which llama.cpp has no name that we know, or one larger than the table.
    """
    if library_of(folder) == "sentencepiece":
        found = _of_sentencepiece(folder)
    else:
        backend = load_hf(folder, str(folder))
        with foreign(f"{folder}: expected a tokenizer with a tokenizer.json, which a GGUF can hold"):
            content = json.loads(backend.backend_tokenizer.to_str())
            found = _of_json(content, folder)
            _add_special(found, backend, folder)
    if len(found.tokens) > rows:
        raise MinitronError(
            f"{folder}: expected at most {rows} tokens, the rows of the table, found {len(found.tokens)}"
        )
    return found.padded(rows)


def _of_json(content: Mapping[str, Any], folder: Path) -> Vocabulary:
    model = content["model"]
    if model.get("type") != "BPE":
        raise MinitronError(f"{folder}: a tokenizer must be BPE to go into a GGUF, found {model.get('type')!r:.80}")
    tokens: list[str | None] = [None] * (1 + max(model["vocab"].values(), default=-1))
    for token, number in model["vocab"].items():
        tokens[number] = token
    added = sorted(content.get("added_tokens") or [], key=lambda one: one["id"])
    if added:
        tokens += [None] * (added[-1]["id"] + 1 - len(tokens))
    # transformers' tokenizer of a Llama's GGUF says byte_fallback also where bytes are letters, which never need it
    letters = any(json.loads(step)["type"] == "ByteLevel" for step in gguf_pre.steps(content.get("pre_tokenizer")))
    bytes_too = bool(model.get("byte_fallback")) and not letters
    kinds = [UNUSED if token is None else _kind(token, bytes_too) for token in tokens]
    for one in added:
        tokens[one["id"]] = one["content"]
        kinds[one["id"]] = CONTROL if one["special"] else USER_DEFINED
    whole = [f"[PAD{number}]" if token is None else token for number, token in enumerate(tokens)]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    if bytes_too:
        return _like_sentencepiece(content, whole, kinds, merges, folder)
    pre = gguf_pre.named(content)
    if pre is None:
        raise MinitronError(
            f"{folder}: a tokenizer must cut its text as one of {', '.join(gguf_pre.PRE)} does to go into a GGUF, "
            f"found pre_tokenizer {json.dumps(content.get('pre_tokenizer'))!s:.300}"
        )
    return Vocabulary("gpt2", whole, kinds, pre=pre, merges=merges)


def _kind(token: str, bytes_too: bool) -> int:
    return BYTE if bytes_too and len(token) == 6 and token.startswith("<0x") and token.endswith(">") else NORMAL


def _like_sentencepiece(
    content: Mapping[str, Any], tokens: list[str], kinds: list[int], merges: list[str], folder: Path
) -> Vocabulary:
    """Llama 2's kind. llama.cpp merges by the score of what comes out: the earlier a merge, the higher."""
    steps = [json.loads(step) for step in gguf_pre.steps(content.get("normalizer"), content.get("pre_tokenizer"))]
    kinds_of_steps = {step["type"] for step in steps}
    if not kinds_of_steps <= {"Prepend", "Replace", "Metaspace"}:
        raise MinitronError(
            f"{folder}: a tokenizer with bytes as tokens must turn spaces into '▁' alone to go into a GGUF, found "
            f"{', '.join(sorted(kinds_of_steps))}"
        )
    space = any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always") for step in steps)
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", ""), number)
    scores = [-float(rank.get(token, len(merges))) for token in tokens]
    unknown = content["model"].get("unk_token")
    kinds = [UNKNOWN if token == unknown else kind for token, kind in zip(tokens, kinds, strict=True)]
    return Vocabulary("llama", tokens, kinds, pre="default", scores=scores, flags={"add_space_prefix": space})


def _of_sentencepiece(folder: Path) -> Vocabulary:
    model = load_sentencepiece(folder / SENTENCEPIECE, str(folder))
    with foreign(f"{folder}: expected a sentencepiece model"):
        numbers = range(model.GetPieceSize())
        kinds = [
            UNKNOWN
            if model.IsUnknown(n)
            else CONTROL
            if model.IsControl(n)
            else UNUSED
            if model.IsUnused(n)
            else BYTE
            if model.IsByte(n)
            else NORMAL
            for n in numbers
        ]
        found = Vocabulary("llama", [model.IdToPiece(n) for n in numbers], kinds, pre="default")
        found.scores = [float(model.GetScore(n)) for n in numbers]
        ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unknown": model.unk_id(), "padding": model.pad_id()}
        found.ids = {name: number for name, number in ids.items() if number >= 0}
        found.flags = {"add_bos_token": False, "add_eos_token": False}
    return found


def _add_special(found: Vocabulary, backend: Any, folder: Path) -> None:
    """Special ids, what is put around a text, and the chat template, as transformers has them of the folder."""
    for name, theirs in SPECIAL.items():
        number = getattr(backend, f"{theirs}_token_id", None)
        if number is not None:
            found.ids[name] = number
    ids = backend("a").input_ids
    found.flags["add_bos_token"] = bool(ids) and ids[0] == found.ids.get("bos")
    found.flags["add_eos_token"] = bool(ids) and ids[-1] == found.ids.get("eos")
    template = backend.chat_template
    if isinstance(template, Mapping):
        notice(f"{folder}: of its chat templates the one named 'default' goes into the GGUF")
        template = template.get("default")
    found.chat_template = template
