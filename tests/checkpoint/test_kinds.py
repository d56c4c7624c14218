"""Folders of kinds that are not read are named, with the way out, before anything else of them is opened."""

import pytest

from nemo_minitron.checkpoint import HfReader, NemoReader
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA

KINDS = {
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "a PEFT adapter, .*merge_and_unload"),
    "adapter beside its model": (["config.json", "model.safetensors", "adapter_config.json"], "a PEFT adapter"),
    "several GGUFs": (["a.gguf", "b.GGUF"], r"2 models as \.gguf files; name one"),
    "its maker's own": (["params.json", "consolidated.00.pth"], "in their maker's own format"),
    "no config": (["model.safetensors"], "weights without a config.json"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_another_kind_is_named(kind, tmp_path):
    files, message = KINDS[kind]
    for file in files:
        (tmp_path / "m" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / file).write_text("{}")
    with pytest.raises(MinitronError, match=message) as caught:
        convert(tmp_path / "m", tmp_path / "out.nemo")
    assert "\n" not in str(caught.value) and not (tmp_path / "out.nemo").exists()
    if "config.json" not in files:
        with pytest.raises(MinitronError, match=message):
            NemoReader(tmp_path / "m")


MEGATRON = {
    "NeMo 2": ["context/model.yaml", "weights/.metadata"],
    "Megatron-Bridge": ["latest_train_state.pt", "iter_0000010/run_config.yaml"],
    "Megatron-LM": ["latest_checkpointed_iteration.txt", "iter_0000010/common.pt"],
}


@pytest.mark.parametrize("kind", MEGATRON)
def test_a_folder_of_megatron_where_a_nemo_is_wanted(kind, tmp_path):
    for file in MEGATRON[kind]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(MinitronError, match=f"expected a .nemo, found a checkpoint of {kind}.*`minitron convert`"):
        NemoReader(tmp_path)


def test_a_hf_folder_where_a_nemo_is_wanted(tmp_path):
    folder = make_llama(tmp_path / "hf", GQA.replace(num_layers=1))
    with pytest.raises(MinitronError, match=r"expected a .nemo, found a HF folder; .*minitron convert"):
        NemoReader(folder)
    with pytest.raises(MinitronError, match="found one file of a folder"):
        HfReader(folder / "model.safetensors")


def test_folders_of_links_to_a_model(tmp_path):
    """As people make them, and as a hub's cache has them: links into blobs named by their content."""
    source = make_llama(tmp_path / "hf", GQA.replace(num_layers=1))
    (tmp_path / "links").mkdir()
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "1").mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        (cache / "blobs" / f"{number:040x}").write_bytes(file.read_bytes())
        (cache / "snapshots" / "1" / file.name).symlink_to(f"../../blobs/{number:040x}")
        (tmp_path / "links" / file.name).symlink_to(cache / "snapshots" / "1" / file.name)
    for name, folder in (("a", tmp_path / "links"), ("b", cache / "snapshots" / "1")):
        convert(folder, tmp_path / f"{name}.nemo", verify=True)
        assert (convert(tmp_path / f"{name}.nemo", tmp_path / name) / "tokenizer.json").read_bytes() == (
            source / "tokenizer.json"
        ).read_bytes()
