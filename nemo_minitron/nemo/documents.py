"""Samples that know their documents: which of their tokens a loss counts, and which may attend to which.

Megatron's GPTDataset lays documents end to end and cuts them into samples. It knows of their ends what the end-of-text
token says, which in a conversation ends every turn; here they are those of the index that the samples were cut by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.data.tokens import TokenStream

CARRIED = ("documents", "sample_id")
"""What a sample may have beside what NeMo passes on of a batch."""


class DocumentedDataset:
    """A data set of Megatron's whose samples say more of their documents.

    Args:
        dataset: a GPTDataset, or a blend of them.
        masks: by prefix, which of its tokens count; None where all do. A loss at position t, which predicts token
            t + 1, counts where that token does, and Megatron's own ``loss_mask`` allows it.
        apart: samples have ``documents [s]``, a number per token that is the same within a document.
        restart: ``position_ids [s]`` begin at 0 in every document, and at the start of the sample.
    """

    def __init__(self, dataset: Any, masks: Mapping[str, TokenStream | None], apart: bool, restart: bool) -> None:
        self._dataset, self._masks, self._apart, self._restart = dataset, masks, apart, restart
        self._begins: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int | None) -> dict[str, Any]:
        sample = dict(self._dataset[number])
        dataset, index = place_of(self._dataset, 0 if number is None else number)
        pieces = list(pieces_of(dataset, index))
        mask = self._masks.get(str(dataset.dataset_path))
        if mask is not None:
            begins = self._begins_of(dataset)
            counts = [mask.tokens[begins[n] + offset :][:length] for n, offset, length in pieces]
            sample["loss_mask"] = sample["loss_mask"] * torch.from_numpy(np.concatenate(counts)[1:].astype(np.float32))
        lengths = torch.tensor([length for _, _, length in pieces])
        if self._apart:
            sample["documents"] = torch.arange(len(pieces)).repeat_interleave(lengths)[:-1]
        if self._restart:
            sample["position_ids"] = torch.cat([torch.arange(int(length)) for length in lengths])[:-1]
        return sample

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def _begins_of(self, dataset: Any) -> np.ndarray:
        """First token of each sequence in the stream of a prefix."""
        path = str(dataset.dataset_path)
        if path not in self._begins:
            lengths = dataset.dataset.sequence_lengths.astype(np.int64)
            self._begins[path] = np.cumsum(lengths) - lengths
        return self._begins[path]


def place_of(dataset: Any, number: int) -> tuple[Any, int]:
    """The GPTDataset that a sample of a blend is of, and its number there."""
    if not hasattr(dataset, "dataset_sample_index"):
        return dataset, number
    return dataset.datasets[dataset.dataset_index[number]], int(dataset.dataset_sample_index[number])


def pieces_of(dataset: Any, number: int) -> Iterator[tuple[int, int, int]]:
    """(sequence, offset, length) of each piece of a GPTDataset's sample, as Megatron reads it: ``s + 1`` tokens all."""
    shuffled = int(dataset.shuffle_index[number])
    (first, begin), (last, end) = (map(int, dataset.sample_index[n]) for n in (shuffled, shuffled + 1))
    for place in range(first, last + 1):
        sequence = int(dataset.document_index[place])
        offset = begin if place == first else 0
        stop = end + 1 if place == last else int(dataset.dataset.sequence_lengths[sequence])
        yield sequence, offset, stop - offset


def attention_mask(documents: Tensor) -> Tensor:
    """Which tokens may not be attended to, by Megatron's convention: bool ``[b, 1, s, s]`` of ``documents [b, s]``.

    True for tokens behind a token, and for those of other documents. The same on every tensor-parallel rank and
    pipeline stage; it takes a byte per pair of tokens.
    """
    length = documents.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return ~((documents[:, None, :, None] == documents[:, None, None, :]) & earlier)
