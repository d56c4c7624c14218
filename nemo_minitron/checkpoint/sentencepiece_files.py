"""A sentencepiece model, all that NeMo packs of a tokenizer, as the files from which transformers loads the same.

What is made is ``tokenizer.json``, which every version reads as it stands, and its two configs. No token is added at
either end of a text, as NeMo's own tokenizer adds none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoint import tokenizer_files
from nemo_minitron.checkpoint.sentencepiece_model import (
    BPE,
    CONTROL,
    UNIGRAM,
    UNKNOWN,
    USER_DEFINED,
    SentencepieceModel,
    parse,
)
from nemo_minitron.checkpoint.tokenizer_open import SENTENCEPIECE, foreign, load_sentencepiece
from nemo_minitron.errors import MinitronError

_SPACE = "▁"
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    " a space before,  two  between, one behind ",
    "def f(x):\n\treturn x ** 2  # 1,234.5\r\n\n",
    "naïve café, Ångström ﬁ ½ ＡＢＣ",
    "東京は日本の首都です。Москва, القاهرة, ไทย",
    "🗼👩‍👩‍👧 a\u0301 \u00a0\u3000\u200b|",
    "",
    " ",
)
"""Texts that must have the same ids by sentencepiece and by what is made of it."""


def with_hf_files(folder: Path) -> Path:
    """A folder in the user's cache with a sentencepiece model and the files that transformers loads.

    Texts get the ids that sentencepiece gives them, but where a unigram model holds two divisions of a text for equally
    likely.

    Raises:
        MinitronError: a model of words or characters, or one whose rules the files would not keep: then some text has
            other ids.
    """
    data = (folder / SENTENCEPIECE).read_bytes()
    where = str(folder / SENTENCEPIECE)
    processor = load_sentencepiece(folder / SENTENCEPIECE, where)
    with foreign(f"{where}: expected a sentencepiece model"):
        tokenizer, config = _convert(parse(data), where)
        for text in PROBES:
            if tokenizer.encode(text).ids != processor.encode(text):
                raise MinitronError(f"{where}: transformers would give other ids than sentencepiece to {text!r}")
    special = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
    files = {
        SENTENCEPIECE: data,
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
    }
    return tokenizer_files.lay_out(files)


def _convert(model: SentencepieceModel, where: str) -> tuple[Any, dict[str, Any]]:
    """The ``tokenizers.Tokenizer`` of a sentencepiece model, and its ``tokenizer_config.json``."""
    from tokenizers import AddedToken, Tokenizer, decoders

    if model.kind not in (UNIGRAM, BPE) or model.suffix or not model.escape:
        kind = {3: "whole words", 4: "characters"}.get(model.kind, "another kind")
        raise MinitronError(f"{where}: expected pieces of words, found {kind}, of which transformers has no files")
    tokenizer = Tokenizer(_bpe(model) if model.kind == BPE else _unigram(model))
    tokenizer.normalizer = _normalizer(model)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if model.dummy_prefix else [])])
    special = [piece.text for piece in model.pieces if piece.kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    own = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in own])
    count = len(model.pieces)
    named = {f"{name}_token": model.pieces[i].text for name, i in model.ids.items() if 0 <= i < count}
    fixed = {"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    return tokenizer, named | fixed | tokenizer_files.INPUTS | {"tokenizer_class": "PreTrainedTokenizerFast"}


def _bpe(model: SentencepieceModel) -> Any:
    """Merges are not in the file: any two pieces that make a third, that of the largest score first."""
    from tokenizers import models

    vocabulary = {piece.text: number for number, piece in enumerate(model.pieces)}
    merges: list[tuple[str, str]] = []
    for piece in sorted(model.pieces, key=lambda piece: -piece.score):
        pairs = [(piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text))]
        found = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
        merges += sorted(found, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    unknown = model.pieces[model.ids["unk"]].text
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)


def _unigram(model: SentencepieceModel) -> Any:
    from tokenizers import models

    scores = [(piece.text, piece.score) for piece in model.pieces]
    return models.Unigram(scores, model.ids["unk"], model.byte_fallback)


def _normalizer(model: SentencepieceModel) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.squeeze:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
