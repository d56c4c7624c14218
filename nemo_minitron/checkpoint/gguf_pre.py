"""How byte-level BPE cuts a text before it merges: llama.cpp's names (``tokenizer.ggml.pre``) beside tokenizers' parts.

llama.cpp finds the name by a hash over the ids of a fixed text, which holds for one vocabulary alone. Here it is told
from what ``tokenizer.json`` does, whatever the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Pre:
    """One way to cut.

    Attributes:
        splits: regular expressions by which the text is cut, each what the one before left; none for GPT-2's, which
            tokenizers has built in.
        digits: whether each digit is cut off first.
        ignore_merges: whether a piece that is a token is not merged at all.
        normalizer: of ``tokenizer.json``; llama.cpp has none, and the composed form changes few texts.
        add_bos: whether llama.cpp begins a text with the beginning-of-text token where the file does not say.
    """

    splits: tuple[str, ...] = ()
    digits: bool = False
    ignore_merges: bool = False
    normalizer: str | None = None
    add_bos: bool = False

    def sections(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """``normalizer`` and ``pre_tokenizer`` of a ``tokenizer.json``."""
        level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": not self.splits}
        level["use_regex"] = not self.splits
        before: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if self.digits else []
        for split in self.splits:
            cut = {"Regex": split}
            before.append({"type": "Split", "pattern": cut, "behavior": "Isolated", "invert": False})
        cutting = {"type": "Sequence", "pretokenizers": [*before, level]} if before else level
        return None if self.normalizer is None else {"type": self.normalizer}, cutting


PRE: dict[str, Pre] = {
    "llama-bpe": Pre(
        (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,),
        ignore_merges=True,
        add_bos=True,
    ),
    "qwen2": Pre((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,), normalizer="NFC"),
    "smollm": Pre(digits=True),
    "gpt-2": Pre(),
    "default": Pre(
        (
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            r"[0-9][0-9][0-9]",
        )
    ),
}
"""Ways to cut, each under llama.cpp's name; ``default`` is also what it does where a file has no name."""

ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "phi-2": "gpt-2",
}
"""Further names under which llama.cpp does the same."""


def by_name(name: str) -> Pre | None:
    """The way to cut that llama.cpp has under a name; None for one that we do not know."""
    return PRE.get(ALIASES.get(name, name))


def named(content: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of what a ``tokenizer.json`` does; None where it has none that we know."""
    merges = bool((content.get("model") or {}).get("ignore_merges"))
    found = (steps(content.get("normalizer")), steps(content.get("pre_tokenizer")))
    for name, pre in PRE.items():
        normalizer, cutting = map(steps, pre.sections())
        if found[1] == cutting and found[0] in (normalizer, []) and merges == pre.ignore_merges:
            return name
    return None


def steps(*sections: Any) -> list[str]:
    """The steps of sections of a ``tokenizer.json``, a JSON text each, without what changes offsets alone."""
    found: list[str] = []
    for section in sections:
        if section is not None and section.get("type") == "Sequence":
            found += steps(*(section.get("pretokenizers") or section.get("normalizers") or []))
        elif section is not None:
            found.append(json.dumps({k: v for k, v in section.items() if k != "trim_offsets"}, sort_keys=True))
    return found
