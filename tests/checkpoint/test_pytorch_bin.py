"""``pytorch_model.bin`` as transformers and torch write it, equal to the same model's safetensors."""

import shutil

import pytest
import torch

from nemo_minitron.checkpoint import HfReader
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.layout import EMBEDDING, OUTPUT
from nemo_minitron.synthetic import make_llama
from tests.llamas import DTYPES, SHAPES
from tests.test_convert import same_tensors, tensors_of


def as_bin(source, folder, change=dict):
    """The folder with its tensors in ``pytorch_model.bin``."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(change(tensors_of(source)), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("bin") / "hf", SHAPES["gqa"].replace(num_layers=2))


@pytest.mark.parametrize(("name", "size"), [("gqa", "100KB"), ("tied", "5GB"), ("bf16", "100KB"), ("fp16", "5GB")])
def test_what_transformers_saves(name, size, tmp_path):
    """Whole and sharded; a tied model's head is there too, and shares its values with the table."""
    from transformers import AutoModelForCausalLM

    source = make_llama(tmp_path / "hf", SHAPES[name], dtype=DTYPES[name])
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model.save_pretrained(tmp_path / "bin", safe_serialization=False, max_shard_size=size)
    files = sorted(path.name for path in (tmp_path / "bin").glob("pytorch_model*"))
    assert ("pytorch_model.bin" in files) == (size == "5GB") and not list((tmp_path / "bin").glob("*.safetensors"))
    nemo = convert(tmp_path / "bin", tmp_path / "m.nemo", verify=True)
    same_tensors(tensors_of(source), tensors_of(convert(nemo, tmp_path / "back")))
    if size == "100KB":
        (tmp_path / "bin" / "pytorch_model.bin.index.json").unlink()
        with HfReader(tmp_path / "bin") as reader, HfReader(source) as original:
            assert reader.fingerprint() == original.fingerprint()


def views(tensors):
    """The same values as parts of larger storages, transposed, as parameters, expanded."""
    queries = "model.layers.0.self_attn.q_proj.weight"
    together = torch.cat([tensors[queries], tensors[queries.replace("q_proj", "k_proj")]])
    changed = {
        queries: together[: len(tensors[queries])],
        queries.replace("q_proj", "k_proj"): together[len(tensors[queries]) :],
        "model.layers.1.mlp.down_proj.weight": tensors["model.layers.1.mlp.down_proj.weight"].T.contiguous().T,
        "model.norm.weight": torch.nn.Parameter(tensors["model.norm.weight"]),
    }
    return tensors | changed


def test_views_of_storages(llama, tmp_path):
    folder = as_bin(llama, tmp_path / "bin", views)
    assert not torch.load(folder / "pytorch_model.bin")["model.layers.1.mlp.down_proj.weight"].is_contiguous()
    with HfReader(folder) as reader, HfReader(llama) as original:
        assert reader.fingerprint() == original.fingerprint()


def test_a_tied_head_that_is_a_view(tmp_path):
    source = make_llama(tmp_path / "hf", SHAPES["tied"])

    def tied(tensors):
        table = tensors[EMBEDDING.hf[0]]
        return tensors | {OUTPUT.hf[0]: table}

    def transposed(tensors):
        return tensors | {OUTPUT.hf[0]: tensors[EMBEDDING.hf[0]].T.contiguous().T}

    def other(tensors):
        return tensors | {OUTPUT.hf[0]: tensors[EMBEDDING.hf[0]].T.contiguous().T + 1}

    for name, change in (("tied", tied), ("transposed", transposed)):
        HfReader(as_bin(source, tmp_path / name, change)).close()
    with pytest.raises(MinitronError, match=r"'lm_head.weight' differs"):
        HfReader(as_bin(source, tmp_path / "other", other))


def saved(thing, **options):
    return lambda folder: torch.save(thing(torch.load(folder)), folder, **options)


REFUSED = {
    "older than 1.6": (saved(dict, _use_new_zipfile_serialization=False), "expected a zip as torch has written since"),
    "a number inside": (saved(lambda t: t | {"step": 3}), "found int at 'step'"),
    "nested": (saved(lambda t: {"state_dict": t}), "expected a dict of tensors by name, found .* at 'state_dict'"),
    "one tensor": (saved(lambda t: t["model.norm.weight"]), "expected a dict of tensors by name, found a tensor"),
    "an integer buffer": (
        saved(lambda t: t | {"position_ids": torch.arange(3)}),
        "'position_ids' must be float32, bfloat16 or float16, found int64",
    ),
    "a tensor too many": (saved(lambda t: t | {"lora": torch.ones(3)}), "'lora' has no place"),
    "float8": (saved(lambda t: t | {"x": torch.ones(3).to(torch.float8_e4m3fn)}), "has no place in it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_models_state_dict(case, llama, tmp_path):
    change, message = REFUSED[case]
    folder = as_bin(llama, tmp_path / "bin")
    change(folder / "pytorch_model.bin")
    with pytest.raises(MinitronError, match=rf"pytorch_model.bin: .*{message}|{message}"):
        HfReader(folder)


def test_safetensors_go_before_pickles(llama, tmp_path):
    folder = as_bin(llama, tmp_path / "bin", lambda tensors: {"nonsense": torch.ones(1)})
    shutil.copy(llama / "model.safetensors", folder)
    HfReader(folder).close()
