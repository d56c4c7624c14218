"""A GGUF's tokenizer as HF's, from what the metadata says of its tokens and of how a text is cut for them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoint.gguf_pre import PRE, Pre, by_name
from nemo_minitron.checkpoint.gguf_vocab import CONTROL, NORMAL, SPECIAL, UNKNOWN, UNUSED, USER_DEFINED
from nemo_minitron.checkpoint.tokenizer_files import INPUTS
from nemo_minitron.checkpoint.tokenizer_open import foreign
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.processes import notice

if TYPE_CHECKING:
    from gguf import GGUFReader

_INSTEAD = "tokenizer.type=FOLDER gives a tokenizer"
_SENTENCEPIECE_UNDER = "llama"
"""Architecture under which transformers reads sentencepiece's kind; under others it takes it for byte-level BPE."""


class _Said:
    """What a file says of its tokenizer, by the keys after ``tokenizer.ggml.``."""

    def __init__(self, reader: GGUFReader, path: Path) -> None:
        self._reader, self.path = reader, path
        self.tokens: list[str] = []
        self.kinds: list[int] = []

    def value(self, name: str) -> Any:
        field = self._reader.get_field(f"tokenizer.ggml.{name}")
        return None if field is None else field.contents()

    def chat_template(self) -> str | None:
        field = self._reader.get_field("tokenizer.chat_template")
        return None if field is None else str(field.contents())

    def many(self, name: str, kind: type) -> list[Any]:
        value = self.value(name)
        if not isinstance(value, list) or not all(isinstance(one, kind) for one in value):
            found = "none" if value is None else f"{value!r:.80}"
            raise MinitronError(f"{self.path}: tokenizer.ggml.{name} must be a list of {kind.__name__}, found {found}")
        return value

    def read_tokens(self) -> None:
        """Texts and kinds of all tokens; without kinds all are normal, as llama.cpp has it."""
        self.tokens = self.many("tokens", str)
        self.kinds = [NORMAL] * len(self.tokens) if self.value("token_type") is None else self.many("token_type", int)
        if len(self.kinds) != len(self.tokens):
            raise MinitronError(
                f"{self.path}: tokenizer.ggml.token_type must have {len(self.tokens)} entries, one for each token, "
                f"found {len(self.kinds)}"
            )

    def special(self) -> dict[str, int]:
        """Ids of special tokens, by transformers' names; one beyond the tokens is left out, which is said."""
        found = {}
        for theirs, name in SPECIAL.items():
            number = self.value(f"{theirs}_token_id")
            if number is None:
                continue
            if isinstance(number, int) and 0 <= number < len(self.tokens):
                found[name] = number
            else:
                notice(
                    f"{self.path}: tokenizer.ggml.{theirs}_token_id must be below {len(self.tokens)}, found "
                    f"{number!r:.80}; the tokenizer has none"
                )
        return found


def save(reader: GGUFReader, architecture: str, path: Path, folder: Path) -> None:
    """Write a GGUF's tokenizer into an existing folder, as HF's files.

    Byte-level BPE (``gpt2`` in a GGUF) is made here: transformers' own conversion cuts every text as GPT-2 does and has
    few of the special tokens. Of sentencepiece's kind (``llama``), which nothing cuts, transformers makes it.

    Args:
        architecture: ``general.architecture``.
        path: names the file, of which transformers reads the metadata again.

    Raises:
        MinitronError: another kind, a way to cut that is not known, entries that contradict one another.
    """
    said = _Said(reader, path)
    kind = said.value("model")
    if kind not in ("gpt2", "llama"):
        found = "none" if kind is None else repr(kind)[:80]
        raise MinitronError(f"{path}: tokenizer.ggml.model must be gpt2 or llama to be read, found {found}; {_INSTEAD}")
    if kind == "llama" and architecture != _SENTENCEPIECE_UNDER:
        raise MinitronError(
            f"{path}: tokenizer.ggml.model must be gpt2 under architecture {architecture}, found 'llama'; {_INSTEAD}"
        )
    said.read_tokens()
    with foreign(f"{path}: expected a tokenizer that transformers reads"):
        tokenizer = _byte_level(said) if kind == "gpt2" else _sentencepiece(said)
        tokenizer.chat_template = said.chat_template()
        # The legacy format would copy the GGUF itself under the name tokenizer.model.
        tokenizer.save_pretrained(str(folder), legacy_format=False)


def _byte_level(said: _Said) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    special = said.special()
    backend = Tokenizer.from_str(json.dumps(_content(said, _pre(said), special)))
    for number in _added(said):
        found = backend.token_to_id(said.tokens[number])
        if found != number:
            raise MinitronError(
                f"{said.path}: tokenizer.ggml.tokens must have '{said.tokens[number]:.80}', which is not text, once; "
                f"found {number} and {found}"
            )
    names = {f"{name}_token": said.tokens[number] for name, number in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names, **INPUTS)


def _pre(said: _Said) -> Pre:
    name = said.value("pre")
    if name is None:
        notice(
            f"{said.path}: tokenizer.ggml.pre is absent; texts are cut as llama.cpp cuts them then, which is no known "
            f"model's way; {_INSTEAD} that does it right"
        )
        return PRE["default"]
    pre = by_name(str(name))
    if pre is None:
        raise MinitronError(
            f"{said.path}: tokenizer.ggml.pre must be one of {', '.join(PRE)} to be read, found "
            f"{name!r:.80}; {_INSTEAD}"
        )
    return pre


def _added(said: _Said) -> list[int]:
    """Ids of tokens that are found in a text before it is cut."""
    return [n for n, kind in enumerate(said.kinds) if kind in (CONTROL, USER_DEFINED, UNKNOWN) and said.tokens[n]]


def _content(said: _Said, pre: Pre, special: dict[str, int]) -> dict[str, Any]:
    """A ``tokenizer.json``. Added tokens are in the model's vocabulary too, so that they have the file's ids."""
    normalizer, cutting = pre.sections()
    size = _without_padding(said, special)
    merges = []
    for merge in said.many("merges", str):
        cut = merge.find(" ", 1)
        if cut < 0:
            raise MinitronError(f"{said.path}: tokenizer.ggml.merges must be pairs of tokens, found {merge!r:.80}")
        merges.append([merge[:cut], merge[cut + 1 :]])
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": n, "content": said.tokens[n], **plain, "special": said.kinds[n] != USER_DEFINED}
            for n in _added(said)
        ],
        "normalizer": normalizer,
        "pre_tokenizer": cutting,
        "post_processor": _around(said, pre, special),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": {token: number for number, token in enumerate(said.tokens[:size])},
            "merges": merges,
        },
    }


def _without_padding(said: _Said, special: dict[str, int]) -> int:
    """How many tokens there are without those at the end that llama.cpp's converter put there for the table's rows."""
    size, kept = len(said.tokens), max(special.values(), default=-1) + 1
    while size > kept and said.kinds[size - 1] == UNUSED and said.tokens[size - 1] == f"[PAD{size - 1}]":
        size -= 1
    return size


def _around(said: _Said, pre: Pre, special: dict[str, int]) -> dict[str, Any]:
    """The section that puts a token before a text, after it, or neither."""
    wanted = {}
    for name, default in (("bos", pre.add_bos), ("eos", False)):
        flag = said.value(f"add_{name}_token")
        if default if flag is None else flag:
            if name not in special:
                raise MinitronError(
                    f"{said.path}: tokenizer.ggml.{name}_token_id must be there where every text gets it, found none"
                )
            wanted[name] = special[name]
    if not wanted:
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}

    def template(parts: Sequence[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for number, part in enumerate(parts):
            found += (
                [{"SpecialToken": {"id": said.tokens[wanted["bos"]], "type_id": number}}] if "bos" in wanted else []
            )
            found.append({"Sequence": {"id": part, "type_id": number}})
            found += (
                [{"SpecialToken": {"id": said.tokens[wanted["eos"]], "type_id": number}}] if "eos" in wanted else []
            )
        return found

    tokens = {said.tokens[n]: {"id": said.tokens[n], "ids": [n], "tokens": [said.tokens[n]]} for n in wanted.values()}
    return {"type": "TemplateProcessing", "single": template("A"), "pair": template("AB"), "special_tokens": tokens}


def _sentencepiece(said: _Said) -> Any:
    from tokenizers import AddedToken
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it advises on a Llama tokenizer's "legacy" switch, which a GGUF does not have
    try:
        with tempfile.TemporaryDirectory() as alone:
            # by itself: transformers would take configs that lie beside the file for its own
            (Path(alone) / "model.gguf").symlink_to(said.path.absolute())
            tokenizer = AutoTokenizer.from_pretrained(
                alone, gguf_file="model.gguf", local_files_only=True, trust_remote_code=False
            )
    finally:
        logging.set_verbosity(verbosity)
    add_bos = said.value("add_bos_token")
    if add_bos is not None:
        tokenizer.add_bos_token = bool(add_bos)  # transformers assumes true for every Llama
    # transformers' conversion drops the special tokens that differ from its defaults for a Llama, so the file's own ids
    # are set over them.
    for name, number in said.special().items():
        setattr(tokenizer, f"{name}_token", said.tokens[number])
    users = [n for n, kind in enumerate(said.kinds) if kind == USER_DEFINED and said.tokens[n]]
    tokenizer.add_tokens([AddedToken(said.tokens[n], normalized=False, special=False) for n in users])
    return tokenizer
