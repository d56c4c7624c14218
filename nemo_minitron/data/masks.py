"""Which tokens of a prefix a loss counts: a second ``.bin/.idx`` of the same documents, one byte per token.

``minitron preprocess`` writes it for conversations, and names it in the facts beside the tokens. Where there is none,
every token counts. A byte is of the token itself: a loss that predicts token ``t + 1`` at position ``t`` counts there
what the mask says of ``t + 1``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from nemo_minitron.data.index import read_index
from nemo_minitron.data.tokens import TokenStream, data_fingerprint, open_tokens, token_files
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import read_json

_MOST_FACTS = 1 << 20
_CHUNK = 1 << 22


def mask_prefix(prefix: str | Path) -> Path:
    """Where the mask of a prefix is written: ``x_messages_mask`` for ``x_messages_document``."""
    return Path(f"{str(prefix).removesuffix('_document')}_mask")


def mask_of(prefix: str | Path) -> Path | None:
    """The mask that a prefix's facts name; None where every token counts.

    Raises:
        MinitronError: facts that are damaged or name no file beside them, a mask that is not there, or one that lies
            there with no facts to say whose it is.
    """
    facts = Path(f"{prefix}.json")
    if not facts.is_file():
        lost = Path(f"{mask_prefix(prefix)}.bin")
        if lost.is_file() and lost != Path(f"{prefix}.bin"):
            raise MinitronError(
                f"{facts}: not found, and {lost} says which tokens of '{prefix}' count: the three belong together as "
                "`minitron preprocess` wrote them"
            )
        return None
    named = read_json(facts, _MOST_FACTS).get("mask")
    if named is None:
        return None
    name = named.get("name") if isinstance(named, dict) else None
    if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
        raise MinitronError(f"{facts}: mask: expected the name of a file beside it, found {name!r:.80}")
    found = facts.parent / name
    token_files(found, f"{facts} names a mask")
    return found


def open_mask(prefix: str | Path) -> TokenStream | None:
    """The mask of a prefix: a byte per token of :func:`open_tokens`, memory-mapped; None where every token counts.

    Raises:
        MinitronError: as :func:`mask_of`; other documents than the tokens have, or values that are no bytes.
    """
    found = mask_of(prefix)
    if found is None:
        return None
    mask = open_tokens(found)
    if mask.tokens.dtype != np.uint8:
        raise MinitronError(f"{found}.idx: expected one byte per token, found {mask.tokens.dtype}")
    ours, theirs = (read_index(*token_files(files)).lengths for files in (found, prefix))
    if not np.array_equal(ours, theirs):
        raise MinitronError(
            f"{found}: expected a mask of the same documents as '{prefix}' ({len(theirs)} with {theirs.sum()} tokens), "
            f"found {len(ours)} with {ours.sum()}"
        )
    return mask


def prove_mask(prefix: str | Path) -> str | None:
    """Check the whole mask of a prefix, and return the :func:`data_fingerprint` of it; None where there is none.

    Raises:
        MinitronError: as :func:`open_mask`; a value that is neither 0 nor 1, or no token that counts.
    """
    mask = open_mask(prefix)
    if mask is None:
        return None
    found, counted = mask_of(prefix), 0
    for start in range(0, len(mask.tokens), _CHUNK):
        part = mask.tokens[start : start + _CHUNK]
        if part.max() > 1:
            raise MinitronError(f"{found}.bin: expected 0 or 1 for each token, found {part.max()}")
        counted += int(part.sum(dtype=np.int64))
    if not counted:
        raise MinitronError(f"{found}.bin: expected tokens that count, found none of {len(mask.tokens)}")
    return data_fingerprint(str(found))


def with_masks(contents: dict[str, str], masks: dict[str, str | None]) -> dict[str, str]:
    """Fingerprints of token files and of what counts in them, by prefix; those without a mask as they are."""

    def joined(content: str, mask: str | None) -> str:
        return content if mask is None else hashlib.sha256(f"{content}\n{mask}".encode()).hexdigest()

    return {prefix: joined(content, masks.get(prefix)) for prefix, content in contents.items()}
