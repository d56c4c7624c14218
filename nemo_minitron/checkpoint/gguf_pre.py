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
        split: regular expression by which the text is cut; None for GPT-2's, which tokenizers has built in.
        digits: whether each digit is cut off first.
        ignore_merges: whether a piece that is a token is not merged at all.
        normalizer: of ``tokenizer.json``; llama.cpp has none, and the composed form changes few texts.
    """

    split: str | None = None
    digits: bool = False
    ignore_merges: bool = False
    normalizer: str | None = None

    def sections(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """``normalizer`` and ``pre_tokenizer`` of a ``tokenizer.json``."""
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": self.split is None}
        level["use_regex"] = self.split is None
        before: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if self.digits else []
        if self.split is not None:
            cut = {"Regex": self.split}
            before.append({"type": "Split", "pattern": cut, "behavior": "Isolated", "invert": False})
        cutting = {"type": "Sequence", "pretokenizers": [*before, level]} if before else level
        return None if self.normalizer is None else {"type": self.normalizer}, cutting


PRE: dict[str, Pre] = {
    "llama-bpe": Pre(
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
        ignore_merges=True,
    ),
    "qwen2": Pre(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST, normalizer="NFC"),
    "smollm": Pre(digits=True),
    "gpt-2": Pre(),
}
"""Ways to cut, each under llama.cpp's name."""

ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "starcoder": "smollm", "refact": "smollm", "gpt2": "gpt-2"}
"""Further names under which llama.cpp does the same."""


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
