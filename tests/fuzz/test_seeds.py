"""Inputs that the fuzzer started from and those that once broke a reader: read, or refused by a MinitronError."""

from pathlib import Path

import pytest

from tests.fuzz.readers import Readers

SEEDS = sorted((Path(__file__).parent / "seeds").iterdir())


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return Readers(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: path.name)
def test_seed(seed, readers):
    assert readers.read(seed.read_bytes()) == seed.name.startswith("good-")


def test_good_files_are_read_and_any_cut_of_them_is_refused(readers):
    for kind, data in readers.good.items():
        assert readers.read(bytes([kind]) + data) or kind in (2,)
        for part in (0, 1, len(data) // 3, len(data) // 2, len(data) - 1):
            readers.read(bytes([kind]) + data[:part])
