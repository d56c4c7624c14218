"""Samples that know their documents, against Megatron's own dataset over documents whose tokens say where they are."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemo_minitron.data.tokens import TokenStream, open_tokens
from nemo_minitron.nemo.documents import DocumentedDataset, attention_mask, place_of

LENGTHS = {"a": [7, 1, 3, 30, 2, 12, 5, 4, 9], "b": [3, 3, 40, 2, 4]}
S = 8


@pytest.fixture
def data(tmp_path, trainer):
    """Megatron's blend of two prefixes; token = 1000 * prefix + 50 * document + place in it. Masks by prefix."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    masks: dict[str, TokenStream | None] = {}
    for number, (name, lengths) in enumerate(LENGTHS.items(), start=1):
        prefix = tmp_path / name
        for kind in ("", "_mask"):
            builder = IndexedDatasetBuilder(f"{prefix}{kind}.bin", dtype=np.uint8 if kind else np.int32)
            for document, length in enumerate(lengths):
                place = np.arange(length)
                builder.add_document(
                    counted(document, place) if kind else 1000 * number + 50 * document + place, [length]
                )
            builder.finalize(f"{prefix}{kind}.idx")
        masks[str(prefix)] = open_tokens(f"{prefix}_mask") if name == "a" else None
    config = GPTDatasetConfig(
        random_seed=3,
        sequence_length=S,
        blend_per_split=[([str(tmp_path / name) for name in LENGTHS], [0.6, 0.4]), None, None],
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=SimpleNamespace(eod=-5, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [40, 0, 0], lambda: True, config).build()
    return train, masks


def counted(document, place):
    return (place + document) % 3 == 0


def test_samples_say_which_tokens_count_and_which_document_they_are_of(data):
    train, masks = data
    found = DocumentedDataset(train, masks, apart=True, restart=True)
    assert len(found) == len(train) >= 40
    several = cut = 0
    for number in range(40):
        ours, theirs = found[number], train[number]
        text = torch.cat((theirs["tokens"], theirs["labels"][-1:]))
        assert (ours["tokens"] == theirs["tokens"]).all() and (ours["labels"] == theirs["labels"]).all()
        document, place = text % 1000 // 50, text % 50
        masked = counted(document, place)[1:] if text[0] < 2000 else torch.ones(S, dtype=torch.bool)
        assert (ours["loss_mask"] == masked.float()).all() and ours["loss_mask"].dtype == torch.float32
        steps = (place[1:] == 0).long().cumsum(0)  # a document begins where the place in it is 0
        documents = torch.cat((torch.zeros(1, dtype=torch.long), steps))[:-1]
        assert (ours["documents"] == documents).all()
        first = torch.tensor([(documents == one).nonzero()[0, 0] for one in documents])
        assert (ours["position_ids"] == torch.arange(S) - first).all()
        several, cut = several + (documents.max() > 1), cut + (place[0] > 0)
    assert several > 5 and cut > 5
    assert (train[0]["loss_mask"] == 1).all()  # Megatron keeps one for all samples, and it stays as it was


def test_samples_say_no_more_than_is_asked(data):
    train, masks = data
    found = DocumentedDataset(train, dict.fromkeys(masks), apart=False, restart=False)
    assert found[0].keys() == train[0].keys() and (found[0]["loss_mask"] == 1).all()
    alone, number = place_of(train, 5)
    assert place_of(alone, number) == (alone, number)


def test_attention_is_causal_within_documents():
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 3, 3]])
    mask = attention_mask(documents)
    assert mask.shape == (2, 1, 6, 6) and mask.dtype == torch.bool
    for row, numbers in enumerate(documents.tolist()):
        for i in range(6):
            for j in range(6):
                assert mask[row, 0, i, j].item() == (j > i or numbers[i] != numbers[j])
