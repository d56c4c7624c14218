"""Tokenizers for preprocessing: Hugging Face (by name, folder, or out of a ``.nemo``) and sentencepiece."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoint.tokenizer_open import (
    SENTENCEPIECE,
    find_folder,
    foreign,
    library_of,
    load_hf,
    load_sentencepiece,
)
from nemo_minitron.config import sections
from nemo_minitron.data.chat import ChatTemplate, NoTemplate
from nemo_minitron.errors import MinitronError, check_choice


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer; small and picklable, so that every worker loads its own.

    Attributes:
        library: ``huggingface`` or ``sentencepiece``.
        type: for huggingface a hub name, a local folder, or a ``.nemo`` (its packed tokenizer).
        model: for sentencepiece the ``.model`` file.
        split_special_tokens: special tokens that are written in text are text, not one control token each. In
            sentencepiece, control symbols always are.
    """

    library: str = sections.Tokenizer.library
    type: str | None = None
    model: str | None = None
    split_special_tokens: bool = sections.Tokenizer.split_special_tokens

    def __post_init__(self) -> None:
        check_choice("tokenizer.library", self.library, sections.TOKENIZER_LIBRARIES)
        wanted, unused = ("type", "model") if self.library == "huggingface" else ("model", "type")
        if not getattr(self, wanted):
            hint = "a Hugging Face name, folder or .nemo" if wanted == "type" else "the sentencepiece .model file"
            raise MinitronError(f"tokenizer.{wanted} must name {hint} for tokenizer.library={self.library}, found none")
        if getattr(self, unused):
            raise MinitronError(
                f"tokenizer.{unused} does not apply to tokenizer.library={self.library}, "
                f"found {getattr(self, unused)!r}; use tokenizer.{wanted} or another library"
            )

    def load(self) -> TextTokenizer:
        """Load it. Local folders, and everything when ``HF_HUB_OFFLINE`` is set, are read without the network.

        Raises:
            MinitronError: a missing file or folder, a hub name that cannot be loaded, unreadable tokenizer files.
        """
        if self.library == "sentencepiece":
            tokenizer = _load_sentencepiece(str(self.model))
        else:
            tokenizer = _load_hf(str(self.type))
        if self.split_special_tokens:
            tokenizer.split_special_tokens()
        return tokenizer


class TextTokenizer:
    """Text to ids with no special tokens added, and what the data's record says about the tokenizer.

    Attributes:
        library: ``huggingface`` or ``sentencepiece``.
        vocab_size: one more than the largest id, so that every id fits a table of that many rows.
        eod: id appended after a document (the EOS token, as NeMo takes it), or None when there is none.
        fingerprint: sha256 of the vocabulary, see :func:`vocabulary_fingerprint`.
        splits_special_tokens: whether special tokens written in text are text; see :meth:`split_special_tokens`.
    """

    def __init__(self, library: str, backend: Any, vocabulary: Mapping[str, int], eod: int | None, name: str) -> None:
        self.library, self._name = library, name
        self._backend = backend
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod = eod
        self.fingerprint = vocabulary_fingerprint(vocabulary)
        self.splits_special_tokens = False
        self._chat: ChatTemplate | None = None

    @property
    def chat(self) -> ChatTemplate:
        """How conversations become tokens.

        Raises:
            NoTemplate: not with this tokenizer, or not where special tokens are split, the template's own among them.
        """
        if self._chat is None:
            if self.splits_special_tokens:
                raise NoTemplate(
                    "tokenizer.split_special_tokens: expected false for conversations, whose chat template writes "
                    "control tokens, found true"
                )
            self._chat = ChatTemplate(self._backend if self.library == "huggingface" else None, self._name)
        return self._chat

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text. No BOS, as NeMo's preprocessing.

        Special tokens that are written in the text, such as ``<|endoftext|>``, become control tokens where the library
        is huggingface, unless they are split.
        """
        if not texts:
            return []
        with foreign(f"{self._name}: expected a tokenizer that can make tokens of this text"):
            return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if self.library == "huggingface":
            options = {"split_special_tokens": True} if self.splits_special_tokens else {}
            return self._backend(list(texts), add_special_tokens=False, verbose=False, **options)["input_ids"]
        return [self._backend.EncodeAsIds(text) for text in texts]

    def split_special_tokens(self) -> None:
        """Take special tokens that are written in a text as any other text from here on.

        Raises:
            MinitronError: this tokenizer has one that it cannot take as text.
        """
        self.splits_special_tokens = True
        special = self._special_tokens()
        for (token, index), ids in zip(special.items(), self.encode(list(special)), strict=True):
            if index in ids:
                raise MinitronError(
                    f"tokenizer.split_special_tokens: {token!r} in a text becomes control token {index} all the same "
                    "with this tokenizer"
                )

    def _special_tokens(self) -> dict[str, int]:
        """Control tokens with their ids; not the one that stands for what is unknown, which text may well become."""
        if self.library == "huggingface":
            unknown = self._backend.unk_token_id
            tokens = self._backend.added_tokens_decoder.items()
            return {token.content: index for index, token in tokens if token.special and index != unknown}
        pieces = range(self._backend.GetPieceSize())
        return {self._backend.IdToPiece(index): index for index in pieces if self._backend.IsControl(index)}


def vocabulary_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """sha256 over the (id, token) pairs in order of id: equal for equal vocabularies, wherever they are stored."""
    digest = hashlib.sha256()
    for token, index in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _load_hf(name: str) -> TextTokenizer:
    folder = find_folder(name, "tokenizer.type")
    if library_of(folder) == "sentencepiece" and not (folder / "config.json").is_file():
        return _load_sentencepiece(str(folder / SENTENCEPIECE))
    for file in ("tokenizer.json", "tokenizer_config.json"):  # a truncated one would surface as a bare Exception
        if (folder / file).is_file():
            try:
                json.loads((folder / file).read_text(encoding="utf-8"))
            except ValueError as error:
                raise MinitronError(f"tokenizer.type: '{name}': {file} is not valid JSON: {error}") from None
    backend = load_hf(folder, f"tokenizer.type: '{name}'")
    return TextTokenizer("huggingface", backend, backend.get_vocab(), backend.eos_token_id, name)


def _load_sentencepiece(name: str) -> TextTokenizer:
    path = Path(name).expanduser()
    if not path.is_file():
        raise MinitronError(f"tokenizer.model: no sentencepiece file at '{name}'")
    backend = load_sentencepiece(path, f"tokenizer.model: '{name}'")
    pieces: Iterable[int] = range(backend.GetPieceSize())
    eos = backend.eos_id()
    vocabulary = {backend.IdToPiece(i): i for i in pieces}
    return TextTokenizer("sentencepiece", backend, vocabulary, eos if eos >= 0 else None, name)
