"""A checkpoint with more rows in its tables of the vocabulary, for a tokenizer that has more tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoint.formats import Reader
from nemo_minitron.model.layout import VOCAB, Parameter


class Grown:
    """``reader`` with a vocabulary of ``vocab_size`` tokens; implements ``formats.Reader``.

    A new row of the table, and of an output head of its own, is the mean of the rows that are there, rounded to their
    dtype. transformers' ``resize_token_embeddings`` draws new rows around that mean.

    Attributes:
        before: tokens that the checkpoint's own tables have.
    """

    def __init__(self, reader: Reader, vocab_size: int) -> None:
        self._reader = reader
        self.path, self.dtype, self.before = reader.path, reader.dtype, reader.shape.vocab_size
        self.shape = reader.shape.replace(vocab_size=vocab_size, padded_vocab_size=vocab_size)

    @property
    def hf_config(self) -> Mapping[str, Any] | None:
        config = self._reader.hf_config
        return None if config is None else {**config, "vocab_size": self.shape.vocab_size}

    @property
    def generation_config(self) -> Mapping[str, Any] | None:
        return self._reader.generation_config

    def num_bytes(self) -> int:
        """Bytes of the model's tensors, the new rows included."""
        return self.shape.num_parameters() * self.dtype.itemsize

    def tensor(self, parameter: Parameter, layer: int | None = None, rows: slice | None = None) -> torch.Tensor:
        """One canonical tensor; tables have the new rows after those of the checkpoint."""
        if parameter.axes[0] != VOCAB:
            return self._reader.tensor(parameter, layer, rows)
        table = self._reader.tensor(parameter, layer)[: self._reader.shape.vocab_size]
        mean = table.mean(dim=0, keepdim=True, dtype=torch.float64).to(table.dtype)
        table = torch.cat([table, mean.expand(self.shape.vocab_size - len(table), -1)])
        return table if rows is None else table[rows]

    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer that the checkpoint carries."""
        return self._reader.tokenizer_folder()

    def save_tokenizer(self, folder: Path) -> bool:
        """Write a tokenizer that lies in no files of its own."""
        return self._reader.save_tokenizer(folder)

    def close(self) -> None:
        """Release the files."""
        self._reader.close()

    def __enter__(self) -> Grown:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
