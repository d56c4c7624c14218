"""Hostile and broken folders of Megatron's three dresses, one line each: refused by name, nothing executed."""

import argparse
import os
import pickle
import re
import shutil

import pytest
import torch
import yaml

from nemo_minitron.checkpoint import HfReader
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.synthetic import make_llama
from tests.checkpoint.megatron_dresses import DRESSES, arguments
from tests.checkpoint.test_hostile import CANARY, Code
from tests.llamas import GQA

SHAPE = GQA.replace(num_layers=1)
ITERATION = {"bridge": "iter_0000000", "megatron": "release", "nemo2": "weights"}
FILE = {"bridge": "iter_0000000/run_config.yaml", "nemo2": "context/model.yaml"}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin")
    with HfReader(make_llama(folder / "hf", SHAPE)) as reader:
        for dress, write in DRESSES.items():
            write(reader, folder / dress, SHAPE)
    return folder


def text(change):
    """The dress's config changed as text."""

    def edit(folder, dress):
        path = folder / FILE[dress]
        path.write_text(change(path.read_text()))

    return edit


def keys(**changes):
    """Keys of the model changed; those of None are removed."""

    def edit(folder, dress):
        path = folder / FILE[dress]
        config = yaml.safe_load(path.read_text())
        section = config["config" if dress == "nemo2" else "model"]
        section |= changes
        for key in [key for key, value in changes.items() if value is None]:
            del section[key]
        path.write_text(yaml.safe_dump(config))

    return edit


def top(**changes):
    def edit(folder, dress):
        path = folder / FILE[dress]
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))

    return edit


def common(state):
    return lambda folder, dress: torch.save(state, folder / ITERATION[dress] / "common.pt")


def args(**changes):
    return common({"args": argparse.Namespace(**{**arguments(SHAPE), **changes})})


def blob(name, change):
    """A file of the iteration changed as bytes."""

    def edit(folder, dress):
        path = folder / ITERATION[dress] / name
        path.write_bytes(change(path.read_bytes()))

    return edit


def tracker(content):
    return lambda folder, dress: (folder / "latest_checkpointed_iteration.txt").write_bytes(content)


def remove(name):
    return lambda folder, dress: (folder / name).unlink()


def link(name):
    """A file replaced by a link to one outside of the folder."""

    def edit(folder, dress):
        outside = folder.parent / "outside"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return edit


def touch(name):
    def edit(folder, dress):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")

    return edit


def aliases(open_text):
    bomb = "a: &a [0,0,0,0,0,0,0,0,0]\n" + "".join(
        f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    return open_text + bomb


# Keys of the model, the same for both dresses that have a YAML
MODEL = {
    "no layers": (keys(num_layers=None), "expected the key 'num_layers'"),
    "layers of text": (keys(num_layers="3"), "num_layers must be a positive integer"),
    "absurd layers": (keys(num_layers=10**18), "must have the size"),
    "no heads": (keys(num_attention_heads=0), "num_attention_heads must be a positive integer"),
    "another width": (keys(hidden_size=128), "must have the size"),
    "groups that divide nothing": (keys(num_query_groups=3), "num_query_groups"),
    "a larger vocabulary": (keys(vocab_size=10**6), "vocab_size must be at most the rows of the table, 320"),
    "infinite base": (keys(rotary_base=float("inf")), "rotary_base must be a number"),
    "base of nan": (keys(rotary_base=float("nan")), "rotary_base must be a number"),
    "tied by a text": (keys(share_embeddings_and_output_weights="yes"), "must be true or false"),
    "tied by the config alone": (
        keys(share_embeddings_and_output_weights=True),
        "'(module.)?output_layer.weight' differs from the embedding table",
    ),
    "GELU": (keys(activation_func={"_target_": "torch.nn.functional.gelu", "_call_": False}), "activation_func must"),
    "a called activation": (
        keys(activation_func={"_target_": "torch.nn.functional.silu", "_call_": True}),
        "activation_func must",
    ),
    "an activation that runs": (
        keys(activation_func={"_target_": "os.mkdir", "_args_": [CANARY], "_call_": True}),
        "activation_func must",
    ),
    "no activation": (keys(activation_func=None), "activation_func must be 'torch.nn.functional.silu', found 'gelu'"),
    "LayerNorm": (keys(normalization="LayerNorm"), "normalization must"),
    "no normalization": (keys(normalization=None), "normalization must"),
    "no gate": (keys(gated_linear_unit=None), "gated_linear_unit must"),
    "biases by default": (
        keys(add_bias_linear=None),
        r"expected the tensor '(module.)?decoder.*linear_qkv.bias', found",
    ),
    "learned positions": (keys(position_embedding_type=None), "position_embedding_type must"),
    "half of RoPE": (keys(rotary_percent=0.5), "rotary_percent must"),
    "one-centered norms": (keys(layernorm_zero_centered_gamma=True), "layernorm_zero_centered_gamma must"),
    "a window": (keys(window_size=[64, 0]), "window_size must"),
    "NoPE": (keys(no_rope_freq=4), "no_rope_freq must"),
    "norms of queries": (keys(qk_layernorm=True), "qk_layernorm must|q_layernorm.weight', found none"),
    "experts": (keys(num_moe_experts=8), "num_moe_experts must"),
    "attention sinks": (keys(softmax_type="learnable"), "softmax_type must"),
    "multi-token heads": (keys(mtp_num_layers=1), "mtp_num_layers must"),
    "layers of one's own": (
        keys(transformer_layer_spec={"_target_": "os.system", "_call_": False}),
        "transformer_layer_spec must be null, found 'system'",
    ),
    "a class that runs": (
        keys(_target_="os.system"),
        "_target_ must name a model class of the Llama kind, found 'system'",
    ),
    "a Gemma": (
        keys(_target_="nemo.collections.llm.gpt.model.gemma.GemmaConfig2B"),
        "_target_ must .* 'GemmaConfig2B'",
    ),
    "no class": (keys(_target_=None), "_target_ must name"),
    "aliases": (text(aliases), "aliases for more"),
    "an alias of itself": (text(lambda t: t + "self: &s [*s]\n"), "an alias of what it is in"),
    "a tag": (text(lambda t: t + "x: !!python/object/apply:os.system [id]\n"), "the tag tag:yaml.org"),
    "a huge file": (text(lambda t: t + "#" * (2 << 20)), "expected at most 1048576 bytes"),
    "depth": (text(lambda t: t + "x: " + "[" * 500 + "]" * 500 + "\n"), "nested more than"),
    "not YAML": (text(lambda t: "\0\1"), "expected YAML"),
    "a list": (text(lambda t: "[1]"), "expected a mapping"),
    "a key twice": (text(lambda t: t + "_target_: x\n"), "given twice"),
}

CASES = {f"{dress}: {name}": (dress, *case) for dress in ("bridge", "nemo2") for name, case in MODEL.items()}
CASES |= {
    "bridge: no model": ("bridge", top(model=None), "expected the mapping model, found NoneType"),
    "bridge: adapters": ("bridge", top(peft={"_target_": "megatron.bridge.peft.lora.LoRA"}), "found adapters"),
    "bridge: both scalings": ("bridge", keys(scale_factor=8.0, rope_scaling=True), "rope_scaling must be false beside"),
    "bridge: two kinds of scaling": (
        "bridge",
        keys(seq_len_interpolation_factor=4.0, rope_scaling=True),
        "seq_len_interpolation_factor must be at least 1, and 1 beside",
    ),
    "bridge: two values": ("bridge", keys(transformer={"num_layers": 9}), "num_layers must be one value"),
    "bridge: a text for layers": ("bridge", keys(transformer="x"), "transformer must be a mapping"),
    "bridge: config by a link": (
        "bridge",
        link(FILE["bridge"]),
        "'run_config.yaml' must be a plain file, found a link",
    ),
    "bridge: iteration by a link": ("bridge", link("iter_0000000"), "found a link out of"),
    "nemo2: no config": ("nemo2", top(config=[]), "expected the mapping config, found list"),
    "nemo2: no model.yaml": ("nemo2", remove(FILE["nemo2"]), "context/model.yaml: expected it beside the weights"),
    "nemo2: adapters": ("nemo2", top(model_transform={"_target_": "nemo.collections.llm.peft.lora.LoRA"}), "adapters"),
    "nemo2: adapters alone": ("nemo2", touch("weights/adapter_metadata.json"), "found adapters without their model"),
    "nemo2: scaling that rises": (
        "nemo2",
        keys(scale_factor=8.0, low_freq_factor=4.0, high_freq_factor=1.0),
        "high_freq_factor must be larger",
    ),
    "megatron: number outside": ("megatron", tracker(b"../../etc"), "expected an iteration's number or 'release'"),
    "megatron: absolute": ("megatron", tracker(b"/etc"), "expected an iteration's number or 'release'"),
    "megatron: a long number": ("megatron", tracker(b"9" * 60), "expected an iteration's number or 'release'"),
    "megatron: not there": ("megatron", tracker(b"12"), "it names 12, expected the folder iter_0000012, found none"),
    "megatron: huge tracker": ("megatron", tracker(b"1" * 100), "expected at most 64 bytes"),
    "megatron: binary tracker": ("megatron", tracker(b"\xff\xfe"), "expected an iteration's number"),
    "megatron: no tracker": ("megatron", remove("release/metadata.json"), "expected metadata.json"),
    "megatron: args that run": (
        "megatron",
        common({"args": Code()}),
        "is refused: '(os|posix).mkdir' has no place in it",
    ),
    "megatron: code beside args": (
        "megatron",
        common({"args": argparse.Namespace(), "x": [Code()]}),
        "is refused: '(os|posix).mkdir' has no place in it",
    ),
    "megatron: code in an argument": ("megatron", args(lr=Code()), "is refused: '(os|posix).mkdir' has no place in it"),
    "megatron: no args": ("megatron", common({}), "expected args in the common state, .* model=NAME"),
    "megatron: args of a dict": ("megatron", common({"args": {"num_layers": 1}}), "args must be an argparse.Namespace"),
    "megatron: a list": ("megatron", common([1, 2]), "expected a dict in common.pt, found list"),
    "megatron: empty args": ("megatron", common({"args": argparse.Namespace()}), "normalization must"),
    "megatron: layers of text": ("megatron", args(num_layers="x"), "args: num_layers must be a positive integer"),
    "megatron: layers of an object": (
        "megatron",
        args(num_layers=argparse.Namespace()),
        "args: num_layers must be a positive integer",
    ),
    "megatron: GELU": ("megatron", args(swiglu=False), "args: swiglu must"),
    "megatron: LayerNorm": ("megatron", args(normalization="LayerNorm"), "args: normalization must"),
    "megatron: learned positions": ("megatron", args(position_embedding_type="none"), "position_embedding_type must"),
    "megatron: experts": ("megatron", args(num_experts=4), "args: num_experts must"),
    "megatron: layers of one's own": ("megatron", args(spec=["a", "b"]), "args: spec must"),
    "megatron: another table": (
        "megatron",
        args(padded_vocab_size=640),
        "padded_vocab_size must be the rows of the table, 320",
    ),
    "megatron: two epsilons": ("megatron", args(layernorm_epsilon=1e-3), "must agree"),
    "megatron: RoPE that shrinks": (
        "megatron",
        args(rotary_seq_len_interpolation_factor=0.5),
        "interpolation_factor must be 1",
    ),
    "megatron: damaged common.pt": (
        "megatron",
        blob("common.pt", lambda b: b[: len(b) // 2]),
        "common.pt.* is refused",
    ),
    "megatron: damaged metadata": ("megatron", blob(".metadata", lambda b: b[:-40]), "metadata"),
    "megatron: metadata of code": (
        "megatron",
        blob(".metadata", lambda b: pickle.dumps(Code())),
        r"\.metadata is refused: '(os|posix).mkdir' has no place in it",
    ),
    "megatron: records elsewhere": (
        "megatron",
        blob(".metadata", lambda b: b.replace(b"__0_0.distcp", b"../../secret")),
        r"no member '\.\./\.\./secret'",
    ),
    "megatron: shorter weights": ("megatron", blob("__0_0.distcp", lambda b: b[:-9000]), "bytes .* of member '__0_0"),
    "megatron: zarr": (
        "megatron",
        blob("metadata.json", lambda b: b'{"sharded_backend": "zarr"}'),
        "expected weights in the format torch_dist, found 'zarr'",
    ),
    "megatron: zarr folders": ("megatron", touch("release/x/.zarray"), "in the format zarr"),
    "megatron: torch alone": ("megatron", remove("release/metadata.json"), "torch alone wrote"),
    "megatron: legacy": ("megatron", touch("release/mp_rank_00/model_optim_rng.pt"), "legacy format .*mp_rank"),
    "megatron: weights by a link": ("megatron", link("release/__0_0.distcp"), "found a link out of the folder"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name, origin, tmp_path):
    dress, edit, message = CASES[name]
    shutil.copytree(origin / dress, tmp_path / "in")
    edit(tmp_path / "in", dress)
    (tmp_path / "out").mkdir()
    with pytest.raises(MinitronError, match=message) as caught:
        convert(tmp_path / "in", tmp_path / "out" / "out.nemo")
    assert not list((tmp_path / "out").iterdir())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert re.match(f"{tmp_path}|num_query_groups", str(caught.value)), caught.value
    assert not os.path.exists(CANARY)
