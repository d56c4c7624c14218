import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MistralConfig

from nemo_minitron.checkpoint import HfReader, NemoReader, NemoWriter, each_tensor, verify
from nemo_minitron.config.schema import ConvertConfig
from nemo_minitron.convert import compare, convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.layout import FC1_WEIGHT, FC2_WEIGHT
from nemo_minitron.stages import convert as stage
from nemo_minitron.synthetic import make_llama
from tests.llamas import DTYPES, GQA, SHAPES


def tensors_of(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
    return found


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def llama(tmp_path):
    return make_llama(tmp_path / "hf", GQA)


@pytest.mark.parametrize("name", SHAPES)
def test_round_trip_is_bit_identical(name, tmp_path):
    source = make_llama(tmp_path / "hf", SHAPES[name], dtype=DTYPES[name])
    rows = 128 if name == "padded" else None
    nemo = convert(source, tmp_path / "m.nemo", make_vocab_size_divisible_by=rows, verify=True)
    with NemoReader(nemo) as reader:
        padded = 256 if rows else SHAPES[name].vocab_size
        assert reader.shape == SHAPES[name].replace(padded_vocab_size=padded) and reader.dtype == DTYPES[name]
    back = convert(nemo, tmp_path / "back", verify=True)
    same_tensors(tensors_of(source), tensors_of(back))
    before, after = tree(source), tree(back)
    assert before.keys() | {"README.md"} == after.keys()
    for file in before:  # config, generation config and tokenizer byte for byte
        assert file.endswith(".safetensors") or before[file] == after[file], file
    verify(nemo)


@pytest.mark.parametrize("name", ["gqa", "tied", "bf16"])
def test_sharded_both_ways(name, tmp_path):
    from transformers import AutoModelForCausalLM

    source = make_llama(tmp_path / "hf", SHAPES[name], dtype=DTYPES[name])
    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype="auto")
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="100KB")  # transformers' own shards as input
    assert len(list(sharded.glob("*.safetensors"))) > 2
    nemo = convert(sharded, tmp_path / "m.nemo")
    back = convert(nemo, tmp_path / "back", max_shard_size="100KB")
    same_tensors(tensors_of(source), tensors_of(back))
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors_of(source))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(source).values())
    for name_, file in index["weight_map"].items():
        assert name_ in load_file(back / file)
    reloaded = AutoModelForCausalLM.from_pretrained(back, torch_dtype="auto")
    same_tensors(model.state_dict(), reloaded.state_dict())


@pytest.mark.parametrize("format", ["nemo", "bridge", "megatron", "nemo2"])
def test_shards_are_of_hf_folders_alone(format, tmp_path):
    source = make_llama(tmp_path / "hf", SHAPES["gqa"])
    with pytest.raises(MinitronError, match=f"^max_shard_size must be absent towards {format}, found '100KB'"):
        convert(source, tmp_path / "out", format=format, max_shard_size="100KB")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mha", "gqa", "head_dim", "qkv_bias"])
def test_fused_qkv_is_group_major(name, tmp_path):
    shape = SHAPES[name]
    source = make_llama(tmp_path / "hf", shape)
    nemo = convert(source, tmp_path / "m.nemo")
    hf, d, r = tensors_of(source), shape.kv_channels, shape.heads_per_group
    with NemoReader(nemo) as reader:
        rows = next(p for p, _ in each_tensor(shape) if p.key.endswith("linear_qkv.weight"))
        fused = reader.tensor(rows, 1)
    at = 0
    for group in range(shape.num_query_groups):
        for head in range(group * r, (group + 1) * r):
            assert torch.equal(
                fused[at : at + d], hf["model.layers.1.self_attn.q_proj.weight"][head * d : (head + 1) * d]
            )
            at += d
        for part in "kv":
            weight = hf[f"model.layers.1.self_attn.{part}_proj.weight"]
            assert torch.equal(fused[at : at + d], weight[group * d : (group + 1) * d])
            at += d
    assert at == len(fused)


@pytest.mark.parametrize("name", ["gqa", "tied", "bf16"])
def test_gate_and_up_are_what_transformers_makes_of_them(name, tmp_path):
    """SiLU on the first half of the fused rows, as Megatron-Core has it: both halves swapped would round-trip too."""
    from transformers import AutoModelForCausalLM

    shape = SHAPES[name]
    source = make_llama(tmp_path / "hf", shape, dtype=DTYPES[name])
    mlp = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32).model.layers[1].mlp
    x = torch.randn(5, shape.hidden_size, generator=torch.Generator().manual_seed(0))
    with NemoReader(convert(source, tmp_path / "m.nemo")) as reader:
        fc1, fc2 = (reader.tensor(row, 1).float() for row in (FC1_WEIGHT, FC2_WEIGHT))
    gate, up = (x @ fc1.T).chunk(2, dim=-1)
    found = torch.nn.functional.silu(gate) * up @ fc2.T
    torch.testing.assert_close(found, mlp(x).detach(), rtol=1e-4, atol=1e-6)
    assert float((torch.nn.functional.silu(up) * gate @ fc2.T - found).abs().max()) > 1e-3 * float(found.abs().max())


def test_mistral_round_trip(llama, tmp_path):
    edit(llama / "config.json", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None)
    back = convert(convert(llama, tmp_path / "m.nemo"), tmp_path / "back")
    assert (back / "config.json").read_bytes() == (llama / "config.json").read_bytes()
    same_tensors(tensors_of(llama), tensors_of(back))


def test_a_mistral_that_is_silent_has_the_window_that_transformers_assumes(llama, tmp_path):
    edit(llama / "config.json", architectures=["MistralForCausalLM"], model_type="mistral")
    with NemoReader(convert(llama, tmp_path / "m.nemo")) as reader:
        assert reader.shape.sliding_window == MistralConfig().sliding_window == 4096


def test_precision_and_padding(llama, tmp_path):
    nemo = convert(llama, tmp_path / "m.nemo", precision="bf16-mixed", make_vocab_size_divisible_by=128, verify=True)
    with NemoReader(nemo) as reader:
        assert reader.dtype == torch.bfloat16 and reader.config["precision"] == "bf16"
        assert (reader.shape.vocab_size, reader.shape.padded_vocab_size) == (320, 384)
        table = reader.tensor(next(each_tensor(reader.shape))[0])
        assert table.shape == (384, 64) and not table[320:].any()
    back = convert(nemo, tmp_path / "back", verify=True)
    same_tensors(
        {name: tensor.bfloat16() for name, tensor in tensors_of(llama).items()},
        tensors_of(back),
    )
    config = json.loads((back / "config.json").read_text())
    assert config == json.loads((llama / "config.json").read_text()) | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}


def test_verify_sees_the_sign_of_a_zero(llama, tmp_path):
    put(llama, **{"model.norm.weight": torch.zeros(64)})
    nemo = convert(llama, tmp_path / "m.nemo")
    put(llama, **{"model.norm.weight": -torch.zeros(64)})
    with HfReader(llama) as before, NemoReader(nemo) as after, pytest.raises(MinitronError, match="final_layernorm"):
        compare(before, after)


def test_mixed_dtypes_widen(llama, tmp_path):
    tensors = load_file(llama / "model.safetensors")
    mixed = {name: t if "norm" in name else t.bfloat16() for name, t in tensors.items()}
    save_file(mixed, llama / "model.safetensors")
    back = convert(convert(llama, tmp_path / "m.nemo"), tmp_path / "back")
    same_tensors({name: t.float() for name, t in mixed.items()}, tensors_of(back))


def test_foreign_nemo_exports_a_loadable_llama(llama, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = convert(llama, tmp_path / "foreign")
    shutil.rmtree(folder / "minitron")
    config = OmegaConf.load(folder / "model_config.yaml")
    del config["minitron"]
    config.kv_channels = None  # as NeMo's converter leaves it
    OmegaConf.save(config, folder / "model_config.yaml")
    back = convert(folder, tmp_path / "back")
    a, b = (AutoModelForCausalLM.from_pretrained(p) for p in (llama, back))
    ids = torch.arange(40)[None]
    assert torch.equal(a(ids).logits, b(ids).logits)


def test_pruned_shape_overlays_the_config(llama, tmp_path):
    from transformers import AutoModelForCausalLM

    shape = GQA.replace(hidden_size=48, ffn_hidden_size=32, num_layers=2)
    with HfReader(llama) as reader:
        nemo = convert(llama, tmp_path / "m.nemo")
        with (
            NemoReader(nemo) as teacher,
            NemoWriter(tmp_path / "s.nemo", teacher.config, shape, torch.float32) as writer,
        ):
            for parameter, layer in each_tensor(shape):
                tensor = reader.tensor(parameter, layer)
                writer.write(parameter, tensor[tuple(slice(0, n) for n in parameter.size(shape))], layer)
    back = convert(tmp_path / "s.nemo", tmp_path / "back")
    changed = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2}
    assert json.loads((back / "config.json").read_text()) == json.loads((llama / "config.json").read_text()) | changed
    model, info = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert model.config.head_dim == 8 and not info["missing_keys"] and not info["mismatched_keys"]


def test_tokenizer_travels_inside(llama, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = AutoTokenizer.from_pretrained(llama)("some text").input_ids
    nemo = convert(llama, tmp_path / "m.nemo")
    (llama / "tokenizer.json").write_text("{}")  # another's, at the path that the config names
    with NemoReader(nemo) as reader:
        packed = reader.tokenizer_folder()
        assert packed == reader.tokenizer_folder()
    assert packed.is_relative_to(tmp_path / "cache")
    assert AutoTokenizer.from_pretrained(packed)("some text").input_ids == expected


def test_a_tokenizer_whose_path_nemo_would_resolve_is_refused(tmp_path):
    source = make_llama(tmp_path / "${run}" / "hf", GQA)
    with pytest.raises(MinitronError, match=r"\$\{run\}/hf: expected a tokenizer whose folder's path has no"):
        convert(source, tmp_path / "m.nemo")
    assert [file.name for file in tmp_path.iterdir()] == ["${run}"]


def test_stage(llama, tmp_path):
    stage.run(ConvertConfig(input_name_or_path=str(llama), output_path=str(tmp_path / "deep/er/m.nemo")))
    with NemoReader(tmp_path / "deep/er/m.nemo") as reader:
        assert reader.shape == GQA


def test_bare_file_name(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert(llama, "m.nemo")
    convert("m.nemo", "back")
    assert (tmp_path / "m.nemo").is_file() and (tmp_path / "back" / "config.json").is_file()


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")


def truncate(path, by=1000):
    path.write_bytes(path.read_bytes()[:-by])


def drop(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def put(folder, **tensors):
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")


BAD_HF = {
    "missing": (shutil.rmtree, "nothing at"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "bad json": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "architecture": (
        lambda f: edit(f / "config.json", architectures=["BloomForCausalLM"]),
        "BloomForCausalLM",
    ),
    "attention bias": (lambda f: edit(f / "config.json", attention_bias=True), "expected the tensor .*q_proj.bias"),
    "mlp bias": (lambda f: edit(f / "config.json", mlp_bias=True), "expected the tensor .*gate_proj.bias"),
    "rope": (lambda f: edit(f / "config.json", rope_scaling={"rope_type": "yarn", "factor": 2.0}), "yarn"),
    "activation": (lambda f: edit(f / "config.json", hidden_act="gelu"), "hidden_act"),
    "window of no size": (
        lambda f: edit(f / "config.json", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=0),
        "sliding_window must be a positive integer, found 0",
    ),
    "sizes": (lambda f: edit(f / "config.json", intermediate_size=95), "gate_proj.weight' must have the size"),
    "truncated": (lambda f: truncate(f / "model.safetensors"), "truncated inside tensor"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "safetensors header"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin",
    ),
    "tensor missing": (lambda f: drop(f, "model.norm.weight"), "expected the tensor 'model.norm.weight'"),
    "tensor unknown": (
        lambda f: put(f, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
        "q_proj.bias' has no place",
    ),
    "nan": (
        lambda f: put(f, **{"model.layers.1.mlp.up_proj.weight": torch.full((96, 64), float("nan"))}),
        "tensor 'decoder.layers.1.mlp.linear_fc1.weight' must be finite",
    ),
    "tokenizer": (
        lambda f: shutil.copy(
            make_llama(f.parent / "other", GQA.replace(vocab_size=400, padded_vocab_size=400)) / "tokenizer.json", f
        ),
        "the tokenizer has 400 entries, the model's table 320 rows",
    ),
}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("case", BAD_HF)
def test_bad_input_leaves_the_destination_alone(case, existing, llama, tmp_path):
    spoil, message = BAD_HF[case]
    spoil(llama)
    target = tmp_path / "out" / "m.nemo"
    if existing:
        target.parent.mkdir()
        target.write_bytes(b"precious")
    with pytest.raises(MinitronError, match=message) as caught:
        convert(llama, target)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path / "out") == ({"m.nemo": b"precious"} if existing else {})
    assert existing or not target.parent.exists()


def test_unwritable_destination_is_refused_before_work(llama, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(MinitronError, match="expected a writable destination"):
        convert(llama, tmp_path / "file" / "m.nemo")
    assert (tmp_path / "file").read_text() == "x"


def test_foreign_folder_is_never_replaced(llama, tmp_path):
    nemo = convert(llama, tmp_path / "m.nemo")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(MinitronError, match=r"thesis\.tex"):
        convert(nemo, tmp_path / "out")
    assert tree(tmp_path / "out") == {"thesis.tex": b"years"}
    (tmp_path / "out" / "thesis.tex").unlink()
    convert(nemo, tmp_path / "out")
    convert(nemo, tmp_path / "out")  # our own earlier output is
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_overflow_in_half_precision_names_the_tensor(llama, tmp_path):
    put(llama, **{"model.layers.2.mlp.down_proj.weight": torch.full((64, 96), 1e6)})
    with pytest.raises(MinitronError, match=r"layers\.2\.mlp\.linear_fc2\.weight' must be finite in float16"):
        convert(llama, tmp_path / "m.nemo", precision=16)
    assert not (tmp_path / "m.nemo").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "8"}, "precision must be one of"),
        ({"make_vocab_size_divisible_by": 0}, "at least 1"),
    ],
)
def test_bad_arguments(arguments, message, llama, tmp_path):
    with pytest.raises(MinitronError, match=message):
        convert(llama, tmp_path / "m.nemo", **arguments)
    assert not (tmp_path / "m.nemo").exists()
