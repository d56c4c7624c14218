"""Which folder serves as an index: arrays alone, all of them whole."""

from __future__ import annotations

import numpy as np

from nemo_minitron.nemo.index_cache import is_whole


def test_only_whole_arrays_are_an_index(tmp_path):
    assert not is_whole(tmp_path / "absent") and not is_whole(tmp_path)
    np.save(tmp_path / "document_index.npy", np.arange(100))
    assert is_whole(tmp_path)
    pickled = tmp_path / "sample_index.npy"
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert not is_whole(tmp_path)
    np.save(pickled, np.arange(100))
    assert is_whole(tmp_path)
    pickled.write_bytes(pickled.read_bytes()[:-8])  # as a job that is killed leaves it
    assert not is_whole(tmp_path)
