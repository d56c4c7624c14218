"""Checkpoints of Megatron-Bridge, Megatron-LM and NeMo 2: what they say, and Megatron-Core's own loader on them.

transformers' logits of the source are the reference for a GPTModel that is built from what the checkpoint says.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from nemo_minitron.checkpoint import HfReader, each_tensor
from nemo_minitron.checkpoint.megatron_args import further_arguments
from nemo_minitron.checkpoint.megatron_fields import _ELSEWHERE, FIELDS, values
from nemo_minitron.checkpoint.megatron_folder import MegatronReader
from nemo_minitron.checkpoint.megatron_write import DRESSES, MegatronWriter
from nemo_minitron.checkpoint.nemo2_context import io_json, model_call
from nemo_minitron.checkpoint.nemo_config import padded_vocab
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import LinearScaling, ModelShape, RopeScaling
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA

ODD = GQA.replace(hidden_size=48, vocab_size=300, padded_vocab_size=300, rotary_base=1e6, layernorm_epsilon=2e-6)
"""Three layers, head_dim 8 where 48 / 8 heads would be 6, a vocabulary that is padded to 384."""
MODELS = {
    "untied": ODD,
    "tied": ODD.replace(share_embeddings_and_output_weights=True, num_query_groups=8),
    "scaled": ODD.replace(rotary_base=500000.0, rope_scaling=RopeScaling(factor=32.0), num_query_groups=2),
    "qkv_bias": ODD.replace(qkv_bias=True, rope_scaling=None),
    "scaled_by_8": ODD.replace(rope_scaling=RopeScaling(factor=8.0)),
    "linear": ODD.replace(rope_scaling=LinearScaling(2.0), share_embeddings_and_output_weights=True),
    "biases": ODD.replace(qkv_bias=True, proj_bias=True, mlp_bias=True),
    "qk_norms": ODD.replace(family="qwen3"),
}


def write(hf: Path, dress: str, out: Path, **changes) -> Path:
    """The folder of the weights of a checkpoint that is written from a HF folder."""
    with HfReader(hf) as reader:
        shape = reader.shape.replace(padded_vocab_size=padded_vocab(reader.shape.vocab_size, 128), **changes)
        tokenizer = reader.tokenizer_folder()
        with MegatronWriter(
            out, dress, shape, reader.dtype, divisor=128, tokenizer=tokenizer, hf_config=reader.hf_config
        ) as writer:
            for parameter, layer in each_tensor(shape):
                writer.write(parameter, reader.tensor(parameter, layer), layer)
    return out / DRESSES[dress].weights


def dresses(name: str) -> list[str]:
    """Those that can describe a model; Megatron-LM's GPT has no linear RoPE scaling."""
    return [dress for dress in DRESSES if (name, dress) != ("linear", "megatron")]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("hf") / "untied", ODD)


def test_every_fact_of_a_shape_has_its_place_or_is_refused():
    placed = {row.shape for row in FIELDS}.union(_ELSEWHERE)
    assert {field.name for field in fields(ModelShape)} == placed | {"sliding_window"}
    with pytest.raises(MinitronError, match="sliding_window must be null in a Megatron checkpoint, found 64"):
        list(values(GQA.replace(sliding_window=64), "there"))


def test_bridge(hf, tmp_path):
    folder = write(hf, "bridge", tmp_path / "out")
    root = folder.parent
    assert sorted(p.name for p in root.iterdir()) == [
        "iter_0000000", "latest_checkpointed_iteration.txt", "latest_train_state.pt"
    ]  # fmt: skip
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "0"
    state = torch.load(root / "latest_train_state.pt", weights_only=True)
    counts = {name: value for name, value in state.items() if not name.startswith("do_")}
    assert {(value.dtype, value.item()) for value in counts.values()} == {(torch.int64, 0)} and len(counts) == 5
    assert not any(state[f"do_{part}"] for part in ("train", "valid", "test"))
    assert (folder / "train_state.pt").read_bytes() == (root / "latest_train_state.pt").read_bytes()
    config = yaml.safe_load((folder / "run_config.yaml").read_text())
    assert config["model"]["_target_"] == "megatron.bridge.models.gpt_provider.GPTModelProvider"
    assert (config["model"]["vocab_size"], config["model"]["kv_channels"]) == (300, 8)
    assert config["model"]["rotary_base"] == 1000000 and isinstance(config["model"]["rotary_base"], int)
    assert config["checkpoint"]["save_optim"] is config["checkpoint"]["save_rng"] is False
    tokenizer = Path(config["tokenizer"]["tokenizer_model"])
    assert tokenizer == folder / "tokenizer"
    assert (tokenizer / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    assert json.loads((folder / "minitron" / "hf_config.json").read_text())["vocab_size"] == 300


def test_megatron(hf, tmp_path):
    folder = write(hf, "megatron", tmp_path / "out")
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release"
    common = torch.load(folder / "common.pt", weights_only=False)
    args = common["args"]
    assert type(args).__module__ == "argparse" and common["checkpoint_version"] == 3.0
    assert (args.num_layers, args.hidden_size, args.kv_channels, args.padded_vocab_size) == (3, 48, 8, 384)
    assert (args.untie_embeddings_and_output_weights, args.swiglu, args.add_bias_linear) == (True, True, False)
    assert (args.norm_epsilon, args.normalization) == (2e-6, "RMSNorm")
    assert args.tokenizer_model == str(folder / "tokenizer")


def test_nemo2(hf, tmp_path):
    folder = write(hf, "nemo2", tmp_path / "out")
    context = folder.parent / "context"
    assert sorted(p.name for p in context.iterdir()) == ["io.json", "model.yaml", "nemo_tokenizer"]
    model = yaml.safe_load((context / "model.yaml").read_text())
    assert model["_target_"] == "nemo.collections.llm.gpt.model.llama.LlamaModel"
    assert (model["config"]["vocab_size"], model["config"]["kv_channels"]) == (384, 8)
    (file,) = folder.glob("*.distcp")
    assert b"module.decoder" in (folder / ".metadata").read_bytes() and file.stat().st_size


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "llama.LlamaConfig"),
        ({"rope_scaling": RopeScaling(4.0, 1.5, 3.0, 64)}, "llama.Llama31Config"),
        ({"qkv_bias": True}, "qwen2.Qwen2Config"),
        ({"family": "qwen3"}, "qwen3.Qwen3Config"),
    ],
)
def test_fiddle_reads_the_calls_of_nemo2(changes, expected, monkeypatch):
    """Fiddle's own reader, with the classes of NeMo 2, which need packages that are not here, by their names alone."""
    import fiddle
    from fiddle._src.experimental import serialization

    class Anything(SimpleNamespace):
        def __init__(self, model=None, config=None, tokenizer=None, trainer=None, **rest):
            super().__init__(model=model, config=config, tokenizer=tokenizer, trainer=trainer, **rest)

    imported = []

    def find(policy, module, symbol):
        if module.startswith("nemo."):
            imported.append(f"{module}.{symbol}")
            return type(symbol, (Anything,), {})
        return importlib.import_module(module).__dict__[symbol]

    monkeypatch.setattr(serialization, "import_symbol", find)
    shape = GQA.replace(**changes)
    call = model_call(shape, torch.bfloat16, 128, True, "out")
    context = fiddle.build(serialization.load_json(io_json(call).decode()))
    config = context.model.config
    assert f"nemo.collections.llm.gpt.model.{expected}" in imported and len(imported) == 4
    assert (config.num_layers, config.ffn_hidden_size, config.vocab_size) == (3, 96, 320)
    assert config.activation_func is torch.nn.functional.silu and config.params_dtype is torch.bfloat16
    assert context.model.tokenizer.pretrained_model_name == "nemo_tokenizer"
    if shape.rope_scaling is not None:
        assert (config.scale_factor, config.low_freq_factor, config.old_context_len) == (4.0, 1.5, 64)


@pytest.mark.parametrize("name", ["tied", "scaled", "qk_norms", "linear"])
def test_what_is_written_is_read_back(name, tmp_path):
    """Through every dress to a HF folder again, whose config and tensors are the source's."""
    hf = make_llama(tmp_path / "hf", MODELS[name])
    for dress in dresses(name):
        back = convert(convert(hf, tmp_path / dress, format=dress, verify=True), tmp_path / f"{dress}_hf", format="hf")
        for file in ("config.json", "generation_config.json", "tokenizer.json"):
            assert json.loads((back / file).read_text()) == json.loads((hf / file).read_text()), (dress, file)
        assert (back / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def states(folder: Path) -> set[str]:
    """Keys of the objects that a checkpoint's metadata name, by torch's own reader."""
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {key for key, value in found.items() if isinstance(value, BytesStorageMetadata)}


def test_states_of_transformer_engine(tmp_path):
    """Names as in checkpoints that were trained with it, of a Qwen3 with 28 layers for one."""
    hf = make_llama(tmp_path / "hf", ODD.replace(num_layers=1, family="qwen3"))
    plain, whole = (
        states(convert(hf, tmp_path / str(te), format="bridge", transformer_engine=te) / "iter_0000000")
        for te in (False, True)
    )
    attention = "decoder.layers.self_attention."
    more = {f"{attention}{name}._extra_state/shard_0_1" for name in ("core_attention", "q_layernorm", "k_layernorm")}
    assert len(plain) == 4 and whole - plain == more | {"decoder.final_layernorm._extra_state/shard_0_1"}
    with pytest.raises(MinitronError, match="transformer_engine must be false towards nemo"):
        convert(hf, tmp_path / "m.nemo", transformer_engine=True)


def test_convert_says_what_megatron_lm_does_not_read(tmp_path, capfd):
    hf = make_llama(tmp_path / "hf", MODELS["scaled"])
    assert convert(hf, tmp_path / "out", format="megatron") == tmp_path / "out"
    said = capfd.readouterr().err
    assert "must say --norm-epsilon 2e-06 --use-rope-scaling --rope-scaling-factor 32" in said
    assert "the factor 32, which is in the checkpoint" in said
    write(hf, "megatron", tmp_path / "again")
    for file in (tmp_path / "again").rglob("*"):
        if file.is_file() and file.name != "common.pt":  # which names the folder of the tokenizer
            assert file.read_bytes() == (tmp_path / "out" / file.relative_to(tmp_path / "again")).read_bytes()


def test_what_the_command_line_must_say():
    assert further_arguments(MODELS["scaled"], "x") == [
        "--norm-epsilon 2e-06", "--use-rope-scaling", "--rope-scaling-factor 32"
    ]  # fmt: skip
    assert further_arguments(MODELS["qk_norms"], "x")[1:] == ["--qk-layernorm"]


@pytest.mark.parametrize("dress", ["bridge", "megatron"])
def test_a_scaling_that_megatron_core_has_not_built_in_is_refused(hf, dress, tmp_path):
    with pytest.raises(MinitronError, match="low_freq_factor of the RoPE scaling must be 1"):
        write(hf, dress, tmp_path / "out", rope_scaling=RopeScaling(low_freq_factor=2.0))
    assert not list(tmp_path.iterdir())


def test_a_scaling_that_megatron_lm_builds_without_is_refused(hf, tmp_path):
    with pytest.raises(MinitronError, match="RoPE scaling must be none or Llama 3's in format=megatron, found linear"):
        write(hf, "megatron", tmp_path / "out", rope_scaling=LinearScaling(2.0))


@pytest.mark.parametrize("dress", DRESSES)
def test_a_bias_on_some_layers_is_refused(dress, tmp_path):
    hf = make_llama(tmp_path / "hf", ODD.replace(qkv_bias=True, proj_bias=True))
    with pytest.raises(MinitronError, match="found one with a bias on queries, keys and values and the attent"):
        write(hf, dress, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dress", DRESSES)
def test_only_our_own_output_is_replaced(hf, dress, tmp_path):
    out = tmp_path / "out"
    write(hf, dress, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    write(hf, dress, out)  # again
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    (out / DRESSES[dress].sidecar / "checksums.json").unlink()
    with pytest.raises(MinitronError, match="found a checkpoint that minitron did not write"):
        write(hf, dress, out)
    assert len([p for p in out.rglob("*") if p.is_file()]) == len(before) - 1


@pytest.mark.parametrize("dress", DRESSES)
def test_a_training_beside_ours_is_left_alone(hf, dress, tmp_path):
    write(hf, dress, tmp_path / "out")
    (tmp_path / "out" / "iter_0000100").mkdir()
    with pytest.raises(MinitronError, match="found also 'iter_0000100'"):
        write(hf, dress, tmp_path / "out")


def test_a_file_s_name_is_refused(hf, tmp_path):
    with pytest.raises(MinitronError, match="expected the name of a folder"):
        write(hf, "bridge", tmp_path / "m.nemo")


def test_a_tensor_that_never_came_leaves_nothing(hf, tmp_path):
    with (
        HfReader(hf) as reader,
        pytest.raises(MinitronError, match="expected every tensor"),
        MegatronWriter(tmp_path / "out", "bridge", reader.shape, reader.dtype, divisor=1) as writer,
    ):
        for parameter, layer in list(each_tensor(reader.shape))[:-1]:
            writer.write(parameter, reader.tensor(parameter, layer), layer)
    assert not list(tmp_path.iterdir())


def expected_logits(hf: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(hf, torch_dtype=torch.float32).eval()(tokens).logits


def run_ranks(python: str, first: list[str], world: int, cases: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    env |= {"PYTHONPATH": os.pathsep.join([*first, str(root)]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [python, "-m", "tests.checkpoint.megatron_dress_rank", str(cases)],
            cwd=root,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [rank.communicate(timeout=900)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, outputs[0][-3000:]


@pytest.fixture(scope="module")
def newest(tmp_path_factory) -> list[str]:
    """A folder with Megatron-Core 0.16.1; skips where no package index has it."""
    folder = tmp_path_factory.mktemp("core")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder), "megatron-core==0.16.1"]
    pip = subprocess.run(install, capture_output=True, text=True)
    if pip.returncode:
        pytest.skip(f"no megatron-core 0.16.1: {pip.stderr.strip().splitlines()[-1]}")
    return [str(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_megatron_core_builds_loads_and_runs_what_we_write(newest, world, tmp_path):
    cases, expected = [], {}
    for name, shape in MODELS.items():
        hf = make_llama(tmp_path / "hf" / name, shape)
        tokens = torch.randint(0, shape.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))
        torch.save(tokens, tmp_path / f"{name}.pt")
        logits = expected_logits(hf, tokens)
        for dress in dresses(name):
            source = write(hf, dress, tmp_path / name / dress)
            target = tmp_path / "saved" / dress / name
            cases.append([dress, str(source), str(tmp_path / f"{name}.pt"), str(target)])
            expected[target] = logits, hf
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_ranks(sys.executable, newest, world, tmp_path / "cases.json")
    for target, (logits, hf) in expected.items():
        found = torch.load(f"{target}.logits.pt")
        torch.testing.assert_close(found[..., : logits.shape[-1]], logits, atol=1e-4, rtol=0, msg=str(target))
        assert not found[..., logits.shape[-1] :].any()  # of rows of padding
        with HfReader(hf) as before, MegatronReader(target, before.shape.to_dict()) as after:
            assert after.fingerprint() == before.fingerprint()  # what it saved itself comes in
