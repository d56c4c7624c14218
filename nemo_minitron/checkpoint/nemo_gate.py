"""What an untrusted ``model_config.yaml`` may ask for, and the part of it that NeMo's model class gets to see.

NeMo opens, downloads, imports or unpickles what many of its keys name. What is listed, here and in ``known.NEMO``, is
therefore what is allowed: everything else in a checkpoint's config is kept and written out again, for it belongs to the
file, but gets no further than that.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from nemo_minitron.checkpoint.biases import biases_from_nemo, linear_names
from nemo_minitron.checkpoint.nemo_config import (
    SECTION,
    family_from_nemo,
    model_defaults,
    nemo_keys,
    window_from_nemo,
)
from nemo_minitron.errors import MinitronError

LIBRARIES = ("huggingface", "sentencepiece", "megatron")
"""Values of ``tokenizer.library`` that a checkpoint may have: ``tabular`` unpickles, the others are no Llama's."""

_TOKENIZER_FILES = ("model", "tokenizer_model", "vocab_file", "merge_file")
_NOT_TAKEN_OVER = ("vocab_file", "merge_file", "special_tokens", "additional_special_tokens", "chat_template")


_MEMBER = re.compile(r"[A-Za-z0-9_.-]{1,90}(?<!\.yaml)")  # beside the config, as NeMo packs it
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,32}")


def check_config(config: dict[str, Any], members: Collection[str], where: str) -> None:
    """Refuse what no checkpoint may ask for, and take away the leave to run a tokenizer's code.

    Args:
        members: names in the ``.nemo``: all that its tokenizer section may name.

    Raises:
        MinitronError: a section that is no mapping, a tokenizer of another kind, or a tokenizer file that is not a
            member of the ``.nemo``.
    """
    for key in (SECTION, "tokenizer"):
        if config.get(key) is not None and not isinstance(config[key], dict):
            raise MinitronError(f"{where}: {key} must be a mapping, found {type(config[key]).__name__}")
    for key in ("hf_config", "generation_config"):
        value = (config.get(SECTION) or {}).get(key)
        if value is not None and not isinstance(value, dict):
            raise MinitronError(f"{where}: {SECTION}.{key} must be a mapping, found {type(value).__name__}")
    tokenizer = config.get("tokenizer") or {}
    tokenizer.pop("trust_remote_code", None)  # NeMo would run code of a hub's repository for it
    library, name = tokenizer.get("library"), tokenizer.get("type")
    if library is not None and library not in LIBRARIES:
        raise MinitronError(f"{where}: tokenizer.library must be one of {', '.join(LIBRARIES)}, found {library!r:.80}")
    if name is not None and not (isinstance(name, str) and len(name) <= 4096 and name.isprintable()):
        raise MinitronError(f"{where}: tokenizer.type must be a name or path, found {name!r:.80}")
    for key, value in tokenizer.items():
        named = isinstance(value, str) and value.startswith("nemo:")
        member = value.removeprefix("nemo:") if named else ""
        if (named or (key in _TOKENIZER_FILES and value not in (None, ""))) and not (
            member in members and _MEMBER.fullmatch(member)
        ):
            raise MinitronError(f"{where}: tokenizer.{key} must name a member, found {value!r:.200}")


def tokenizer_model(config: Mapping[str, Any]) -> str | None:
    """The member that is the checkpoint's sentencepiece model, as :func:`check_config` has proven; None without one."""
    tokenizer = config.get("tokenizer") or {}
    value = tokenizer.get("model") or tokenizer.get("tokenizer_model")
    return value.removeprefix("nemo:") if value else None


def not_taken_over(config: Mapping[str, Any]) -> list[str]:
    """Keys of the tokenizer section that change a tokenizer in NeMo, and that are not understood here."""
    tokenizer = config.get("tokenizer") or {}
    return [f"tokenizer.{key}" for key in _NOT_TAKEN_OVER if tokenizer.get(key)]


def for_model_class(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The ``model`` section that NeMo's class gets of a checkpoint: its network, and defaults of ours for the rest.

    The network is the keys that have a kind in :data:`nemo_minitron.checkpoint.known.NEMO` or that the checkpoint's
    family names. No text passes but single words under keys that have words for values, and no ``tokenizer``.

    Raises:
        MinitronError: one of these keys has a value of another kind.
    """
    keys = nemo_keys(family_from_nemo(config, where))
    section = {key: value for key, value in model_defaults().items() if keys.kind(key) is None}
    for key, value in config.items():
        kind = keys.kind(key)
        if kind is None:
            continue
        number = isinstance(value, (int, float))
        word = isinstance(value, str) and _WORD.fullmatch(value)
        if not (value is None or number or (kind == "word" and word)):
            wanted = {"word": "a word", "number": "a number", "flag": "true or false"}[kind]
            raise MinitronError(f"{where}: {key} must be {wanted}, found {value!r:.80}")
        section[key] = value
    vocab = (config.get(SECTION) or {}).get("vocab_size")
    section[SECTION] = {} if vocab is None else {"vocab_size": int(vocab)}  # proven with the shape
    if config.get("bias", True):
        section[SECTION]["biases"] = linear_names(biases_from_nemo(config, config.get(SECTION) or {}, where))
    window = window_from_nemo(config, where)
    if window is not None:
        section[SECTION]["window_size"] = [window, 0]
    return section
