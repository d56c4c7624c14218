"""Megatron's index: read as Megatron reads it, and refused where a number in it is not borne out."""

import tracemalloc

import numpy as np
import pytest

from nemo_minitron.data.blocks import token_blocks
from nemo_minitron.data.index import read_index
from nemo_minitron.errors import MinitronError


@pytest.fixture
def files(tmp_path):
    """Three documents, of which the second is two sequences, written by Megatron."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.uint16)
    for lengths in ([3], [2, 4], [1]):
        builder.add_document(np.arange(sum(lengths)), lengths)
    builder.finalize(str(tmp_path / "d.idx"))
    return tmp_path / "d.bin", tmp_path / "d.idx"


def parts(index, sequences=(3, 2, 4, 1), pointers=(0, 6, 10, 18), documents=(0, 1, 3, 4), **changes):
    """Write an ``.idx``; the defaults are those of :func:`files`."""
    fields = {"magic": b"MMIDIDX\0\0", "version": 1, "code": 8, "count": len(sequences), "marks": len(documents)}
    fields |= changes
    head = fields["magic"] + fields["version"].to_bytes(8, "little") + bytes([fields["code"]])
    head += fields["count"].to_bytes(8, "little") + fields["marks"].to_bytes(8, "little")
    body = [np.array(sequences, "<i4"), np.array(pointers, "<i8"), np.array(documents, "<i8")]
    index.write_bytes(head + b"".join(part.tobytes() for part in body) + fields.get("rest", b""))


def test_as_megatron_reads_it(files):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data, index = files
    before = index.read_bytes()
    found, theirs = read_index(data, index), IndexedDataset(str(data.with_suffix("")))
    assert found.dtype == theirs.index.dtype and list(found.lengths) == list(theirs.sequence_lengths) == [3, 2, 4, 1]
    assert list(found.ends) == [3, 9, 10]
    parts(index)
    assert index.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"MMIDIDX\0\1"}, "a foreign file"),
        ({"version": 2}, "another version"),
        ({"code": 7}, "tokens of kind 7"),
        ({"code": 0}, "tokens of kind 0"),
        ({"code": 200}, "tokens of kind 200"),
        ({"code": 4}, "its index says 40 bytes, found 20"),
        ({"count": 2**63}, "sequences and 4 marks take"),
        ({"count": 3}, "sequences and 4 marks take"),
        ({"marks": 2**61}, "marks take"),
        ({"marks": 0}, "marks take"),
        ({"rest": b"\0"}, "found 115 bytes"),
        ({"sequences": (3, 2, 4, -1)}, "a sequence of -1 tokens"),
        ({"sequences": (3, 2, 4, 2)}, "its index says 22 bytes, found 20"),
        ({"sequences": (3, 2, 4, 0)}, "its index says 18 bytes, found 20"),
        ({"sequences": (2**31 - 1,) * 4}, "found 20"),
        ({"pointers": (0, 6, 10, 19)}, "do not follow one another in d.bin"),
        ({"pointers": (0, 6, 6, 18)}, "do not follow one another in d.bin"),
        ({"pointers": (0, 6, 10, 10**15)}, "do not follow one another in d.bin"),
        ({"pointers": (0, 6, 10, -2)}, "do not follow one another in d.bin"),
        ({"documents": (0, 3, 1, 4)}, "documents that do not follow"),
        ({"documents": (0, 1, 3, 5)}, "up to sequence 4"),
        ({"documents": (0, 1, 3, 10**15)}, "up to sequence 4"),
        ({"documents": (1, 2, 3, 4)}, "documents that do not follow"),
        ({"documents": (-1, 1, 3, 4)}, "documents that do not follow"),
        ({"documents": ()}, "documents that do not follow"),
        ({"sequences": (), "pointers": (), "documents": (0,)}, "no sequence"),
    ],
)
def test_hostile_indices(files, changes, message):
    data, index = files
    parts(index, **changes)
    tracemalloc.start()
    with pytest.raises(MinitronError, match=message):
        token_blocks(data.with_suffix(""), 2)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("size", [0, 9, 33, 34, 40])
def test_truncated(files, size):
    data, index = files
    index.write_bytes(index.read_bytes()[:size])
    with pytest.raises(MinitronError, match=r"d\.idx: expected a Megatron index, found"):
        token_blocks(data.with_suffix(""), 2)
