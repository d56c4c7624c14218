"""Models of a shape with the random weights that their classes begin with: nothing is written, nothing read.

An 8B in a ``.nemo`` is 16 GB to make, to write and to read, and a speed or a size of memory does not depend on what
weights say. So the product's own :func:`load_model` and :class:`Teacher` run here with a reader that knows shape and
config but no tensor; all that follows is theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nemo_minitron.checkpoint import nemo_config_from_hf
from nemo_minitron.checkpoint.nemo_config import padded_vocab, vocab_divisor
from nemo_minitron.model.shape import ModelShape


class ShapeReader:
    """Stands for a :class:`NemoReader` of a file that holds a config and a tokenizer alone."""

    made: dict[str, ShapeReader] = {}  # noqa: RUF012 (by path, as load_model and Teacher ask)

    def __init__(self, path: str | Path) -> None:
        self.__dict__ = self.made[str(path)].__dict__

    @classmethod
    def make(cls, path: Path, shape: ModelShape, tokenizer: Path) -> Path:
        """Have ``path`` mean a model of ``shape`` in bf16; return it."""
        reader = object.__new__(cls)
        divisor = vocab_divisor(shape.vocab_size)
        reader.path, reader.dtype, reader._tokenizer = path, torch.bfloat16, tokenizer
        reader.shape = shape.replace(padded_vocab_size=padded_vocab(shape.vocab_size, divisor))
        reader.config = nemo_config_from_hf(
            None, reader.shape, dtype=reader.dtype, divisor=divisor, tokenizer=tokenizer, tokenizer_size=None
        )
        cls.made[str(path)] = reader
        return path

    def tokenizer_folder(self) -> Path:
        return self._tokenizer

    def named_tokenizer(self) -> str | None:
        return str(self._tokenizer)

    def fingerprint(self) -> str:
        return "random"

    def __enter__(self) -> ShapeReader:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


@contextmanager
def weightless() -> Iterator[None]:
    """Have models be built from what :meth:`ShapeReader.make` made, and keep the weights that they begin with."""
    from nemo_minitron.nemo import restore, teacher, weights

    with (
        mock.patch.object(restore, "NemoReader", ShapeReader),
        mock.patch.object(teacher, "NemoReader", ShapeReader),
        mock.patch.object(weights, "load", lambda model, reader: None),
    ):
        yield


def write_tokenizer(folder: Path, entries: int) -> Path:
    """A tokenizer of as many words; one of 128,256 that is trained takes longer than all the rest."""
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True, exist_ok=True)
    words = {f"<{number}>": number for number in range(entries)}
    Tokenizer(models.WordLevel(words, unk_token="<0>")).save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<0>", "unk_token": "<0>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
