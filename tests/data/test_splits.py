"""Splits of a run's data: every one has a sample, or is refused by name before Megatron looks for one."""

from __future__ import annotations

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nemo_minitron.data.splits import check_splits
from nemo_minitron.errors import MinitronError


def write(path, documents: int, length: int = 10) -> str:
    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
    for _ in range(documents):
        builder.add_document(np.ones(length, dtype=np.uint16), [length])
    builder.finalize(f"{path}.idx")
    return str(path)


@pytest.fixture
def p(tmp_path):
    return write(tmp_path / "p", 63)


def splits(data, string="98,1,1", limit=2, length=16, batch=8):
    return check_splits(data, string, length, batch, limit)


def test_default_shares_of_few_documents_are_refused(p):
    with pytest.raises(MinitronError, match=r"splits_string=98,1,1 \(validation\).*0 of its 63 documents"):
        splits([p])


@pytest.mark.parametrize("string", ["98,1,1", "90,8,2", "900,50,50", "98,2,0", "60,40,0", "0.5,0.4,0.1"])
@pytest.mark.parametrize("documents", [40, 63, 101, 200])
def test_what_is_accepted_leaves_megatron_no_empty_split(tmp_path, string, documents):
    """The ranges that Megatron itself makes of the string returned, and the documents of those asked for."""
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    def ranges(text):
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(text))
        return [part and tuple(round(bound * documents) for bound in part) for part in matrix]

    try:
        found = splits([write(tmp_path / "q", documents)], string)
    except MinitronError:
        train, val, _ = ranges(string)
        assert (val[1] - val[0]) * 10 < 17 or (train[1] - train[0]) * 10 < 17
        return
    ours = ranges(found.splits_string)
    assert ours[:2] == ranges(string)[:2]
    assert all(part is None or part[1] > part[0] for part in ours)


@pytest.mark.parametrize("string", ["100,0,0", "0,100,0", "1,1", "a,b,c", "98;1;1", "-1,1,1", "nan,1,1", "", None])
def test_shares_without_training_or_validation_are_refused(p, string):
    with pytest.raises(MinitronError, match=r"model\.data\.splits_string: expected three shares"):
        splits([p], string)


def test_files_shorter_than_a_sample_are_refused(p, tmp_path):
    short = write(tmp_path / "short", 1)
    for data, split in (
        ({"train": [short], "validation": [p]}, "train"),
        ({"train": [p], "validation": [short]}, "val"),
    ):
        with pytest.raises(MinitronError, match=rf"data_prefix\.{split}.*10 tokens, fewer than a sample"):
            splits(data)


def test_a_share_of_validation_batches_needs_one(p, tmp_path):
    few = write(tmp_path / "few", 8)  # 79 // 16 = 4 samples
    assert splits({"train": [p], "validation": [few]}, limit=1).data_prefix["validation"] == [few]
    with pytest.raises(MinitronError, match=r"trainer\.limit_val_batches=1\.0: of 4 validation samples"):
        splits({"train": [p], "validation": [few]}, limit=1.0)
    assert splits({"train": [p], "validation": [1.0, few]}, limit=1.0, batch=4).data_prefix["validation"] == [few]
    with pytest.raises(MinitronError, match="leave the weights out"):
        splits({"train": [p], "validation": [0.5, p, 0.5, few]}, limit=0.5)


def test_blends_without_weights_get_those_of_their_sizes(p, tmp_path):
    q = write(tmp_path / "q", 17)
    found = splits({"train": [p, q], "validation": [p]})
    assert found.data_prefix == {"train": [39.0, p, 10.0, q], "validation": [p], "test": None}
    assert splits([p, q], "50,50,0").data_prefix == [38.0, p, 9.0, q]
