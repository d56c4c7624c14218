"""Which files of a HF folder hold its weights: one, an index's, or a whole numbered set; nothing is guessed at."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoint import HfReader
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA
from tests.test_convert import same_tensors, tensors_of

FILES = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def sharded(tmp_path):
    """A folder of three shards, with its index."""
    folder = make_llama(tmp_path / "hf", GQA)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number, file in enumerate(FILES):
        save_file(dict(list(tensors.items())[number::3]), folder / file)
    index = {name: FILES[number % 3] for number, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_shards_without_an_index_are_all_read(sharded, tmp_path):
    whole = convert(sharded, tmp_path / "whole.nemo")
    (sharded / "model.safetensors.index.json").unlink()
    save_file({"lora.weight": next(iter(tensors_of(sharded).values()))}, sharded / "adapter.safetensors")
    assert convert(sharded, tmp_path / "m.nemo", verify=True).read_bytes() == whole.read_bytes()
    (sharded / "adapter.safetensors").unlink()
    same_tensors(tensors_of(convert(tmp_path / "m.nemo", tmp_path / "back")), tensors_of(sharded))


def gone(folder):
    (folder / FILES[1]).unlink()


def another_set(folder):
    shutil.copy(folder / FILES[0], folder / "model-00001-of-00002.safetensors")


def one_too_many(folder):
    shutil.copy(folder / FILES[0], folder / "model-00000-of-00003.safetensors")


def renamed(folder):
    for number, file in enumerate(FILES):
        (folder / file).rename(folder / f"part{number}.safetensors")


REFUSED = {
    "incomplete": (gone, f"expected the shards 1 to 3 of 3, found no {FILES[1]}"),
    "two sets": (another_set, "expected one set of shards without an index, found model-…-of-00002.*-of-00003"),
    "numbered from 0": (one_too_many, "found model-00000-of-00003.safetensors"),
    "other names": (renamed, "expected model.safetensors, .* found part0.safetensors, which has another name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_set_that_is_not_whole_is_refused(case, sharded):
    spoil, message = REFUSED[case]
    (sharded / "model.safetensors.index.json").unlink()
    spoil(sharded)
    with pytest.raises(MinitronError, match=message):
        HfReader(sharded)


def test_an_index_decides_where_there_is_one(sharded, tmp_path):
    another_set(sharded)  # left over from another upload
    with HfReader(sharded) as reader:
        assert reader.shape == GQA
