"""Whole token files: each id is proven, and the content alone tells two of them apart."""

from __future__ import annotations

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nemo_minitron.data import tokens
from nemo_minitron.data.tokens import data_fingerprint, prove_tokens
from nemo_minitron.errors import MinitronError


def build(prefix, documents):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(np.array(document, dtype=np.uint16), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("chunk", [3, 1 << 22])
def test_an_id_out_of_range_is_named_wherever_it_is(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(tokens, "_CHUNK", chunk)
    prefix = build(tmp_path / "a", [[1, 2, 3, 4], [5, 6], [7, 8, 9, 320]])
    assert prove_tokens(prefix, 321) == data_fingerprint(prefix)
    with pytest.raises(MinitronError, match="document 2 has token 320, out of range for the model's vocabulary of 320"):
        prove_tokens(prefix, 320)


def test_the_fingerprint_is_of_the_content(tmp_path):
    one, same = build(tmp_path / "one", [[1, 2], [3]]), build(tmp_path / "same", [[1, 2], [3]])
    cut_elsewhere, other = build(tmp_path / "cut", [[1], [2, 3]]), build(tmp_path / "other", [[1, 2], [4]])
    found = [prove_tokens(prefix, 10) for prefix in (one, same, cut_elsewhere, other)]
    assert found[0] == found[1] and len(set(found)) == 3
