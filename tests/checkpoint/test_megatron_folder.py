"""Folders of NeMo 2, Megatron-Bridge and Megatron-LM: the model that they hold, by tensors and by logits."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoint import HfReader, each_tensor
from nemo_minitron.checkpoint.megatron_config import shape_from_model
from nemo_minitron.checkpoint.megatron_folder import MegatronReader
from nemo_minitron.checkpoint.megatron_keys import ARGS, MODEL
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import parse_object_yaml
from nemo_minitron.model.shape import LinearScaling, ModelShape, RopeScaling, shape_of
from nemo_minitron.synthetic import make_llama
from tests.checkpoint.megatron_dresses import DRESSES
from tests.llamas import GQA
from tests.llamas import SHAPES as ALL

DATA = Path(__file__).parent / "data"
AWKWARD = GQA.replace(
    hidden_size=40, num_attention_heads=6, num_query_groups=2, kv_channels=16, vocab_size=310, padded_vocab_size=310,
    ffn_hidden_size=56, rotary_base=1e6, layernorm_epsilon=1e-6,
)  # fmt: skip
SHAPES = {
    "plain": AWKWARD,
    "factor 8, tied": AWKWARD.replace(rope_scaling=RopeScaling(), share_embeddings_and_output_weights=True),
    "factor 32": AWKWARD.replace(rope_scaling=RopeScaling(factor=32.0), num_layers=1),
    "qkv bias": AWKWARD.replace(qkv_bias=True, num_query_groups=6),
    "biases": AWKWARD.replace(qkv_bias=True, proj_bias=True, mlp_bias=True, num_layers=1, hidden_size=48),
    "norms of queries and keys": AWKWARD.replace(family="qwen3"),
}


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokens = (torch.arange(2 * 40).reshape(2, 40) * 7) % 300
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("dress", DRESSES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_model_comes_in_as_it_was(dress, name, tmp_path):
    shape = SHAPES[name]
    source = make_llama(tmp_path / "hf", shape)
    padded = shape.replace(padded_vocab_size=320)
    with HfReader(source) as original:
        folder = DRESSES[dress](original, tmp_path / "megatron", padded)
        with MegatronReader(folder) as reader:
            assert reader.dress == dress and reader.dtype == torch.float32
            vocab = 320 if dress == "nemo2" else 310  # NeMo 2 leaves it to its tokenizer
            assert reader.shape == padded.replace(vocab_size=vocab)
            assert reader.hf_config is None and reader.tokenizer_folder() is None
        with MegatronReader(folder, {"vocab_size": 310}) as reader:
            assert reader.fingerprint() == original.fingerprint()
    out = convert(folder, tmp_path / "out", format="hf", tokenizer={"type": str(source)}, verify=True)
    assert (logits(out)[..., :310] - logits(source)).abs().max() < 1e-4


SHAPE_OF_THEIRS = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 16,
    "rotary_base": 500000.0,
    "vocab_size": 120,
}


def test_a_checkpoint_of_megatron_core_0_19():
    """Written by it on a later Python: it has no ``args``, so the user gives the shape, and no ``common.pt``."""
    folder = DATA / "megatron-core-0.19.2"
    expected = shape_of(SHAPE_OF_THEIRS).replace(padded_vocab_size=128)
    with MegatronReader(folder, SHAPE_OF_THEIRS) as reader:
        assert (reader.dress, reader.shape, reader.dtype) == ("megatron", expected, torch.float32)
        total = sum(reader.tensor(parameter, layer).numel() for parameter, layer in each_tensor(reader.shape))
        assert total * 4 == reader.num_bytes() and total == reader.shape.num_parameters(padded=True)
    with pytest.raises(MinitronError, match=r"expected args in the common state, .*model=NAME"):
        MegatronReader(folder)
    with pytest.raises(MinitronError, match=r"linear_qkv\.weight' must have the size \(2, 192, 64\), found"):
        MegatronReader(folder, SHAPE_OF_THEIRS | {"num_query_groups": 3})


def test_a_config_that_nemo_2_wrote(capfd):
    """``context/model.yaml`` of ``Llama31Config8B`` in NeMo 2.4.1, with all of its defaults: every key is known."""
    file = DATA / "nemo2_model.yaml"
    config = parse_object_yaml(file.read_bytes(), str(file))["config"]
    assert shape_from_model(config, 320, "model.yaml") == ModelShape(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=80,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=320,
        padded_vocab_size=320,
        rotary_base=1e6,
        rope_scaling=RopeScaling(factor=32.0),
        max_position_embeddings=128,
    )
    assert "unknown" not in capfd.readouterr().err


def test_the_fields_of_megatron_core_are_known():
    """Every field of the Megatron-Core that is installed is applied, neutral or a condition; sizes are applied."""
    from megatron.core.transformer import TransformerConfig

    names = [field.name for field in dataclasses.fields(TransformerConfig)]
    assert len(names) > 150
    for keys in (MODEL, ARGS):
        assert [n for n in names if n not in keys and not n.startswith(keys.neutral_beginnings)] == []
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "kv_channels", "num_query_groups", "layernorm_epsilon")
    assert all(name in MODEL.applied and name in ARGS.applied for name in sizes)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("small") / "hf", AWKWARD.replace(num_layers=1))


def written(dress, source, target, **changes):
    with HfReader(source) as reader:
        return DRESSES[dress](reader, target, reader.shape.replace(padded_vocab_size=320), **changes)


def test_an_iteration_is_found(small, tmp_path):
    """The tracker's, the only one, or the one that is named."""
    folder = written("bridge", small, tmp_path / "m")
    for path in (folder, folder / "iter_0000000"):
        with MegatronReader(path) as reader:
            assert reader.dress == "bridge"
    (folder / "latest_checkpointed_iteration.txt").unlink()
    with MegatronReader(folder) as reader:
        assert reader.path == folder
    shutil.copytree(folder / "iter_0000000", folder / "iter_0000020")
    with pytest.raises(MinitronError, match="found iter_0000000, iter_0000020; name the iteration"):
        MegatronReader(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("20\n")
    with MegatronReader(folder) as reader:
        assert reader._place.root == folder / "iter_0000020"
    nemo = written("nemo2", small, tmp_path / "n")
    with MegatronReader(nemo / "weights") as reader:
        assert reader.dress == "nemo2"


def test_generations_of_rope_scaling(small, tmp_path):
    """Classes that always scale, with and without their keys, and those that are told to."""
    target = "megatron.bridge.models.llama.llama_provider."
    for number, (changes, expected) in enumerate(
        {
            "older": ({"_target_": target + "Llama31ModelProvider"}, RopeScaling()),
            "its keys": (
                {"_target_": target + "Llama32ModelProvider1B", "scale_factor": 32.0, "old_context_len": 4096},
                RopeScaling(factor=32.0, original_max_position_embeddings=4096),
            ),
            "of 3.0": ({"_target_": target + "Llama3ModelProvider8B"}, None),
            "newer": ({"rope_scaling": True, "rope_scaling_factor": 32.0}, RopeScaling(factor=32.0)),
            "linear": ({"seq_len_interpolation_factor": 4.0}, LinearScaling(4.0)),
            "off": ({"rope_scaling": False, "rope_scaling_factor": 32.0}, None),
        }.values()
    ):
        with MegatronReader(written("bridge", small, tmp_path / str(number), **changes)) as reader:
            assert reader.shape.rope_scaling == expected


def test_a_builder_config_keeps_layers_in_a_section(small, tmp_path):
    folder = written("bridge", small, tmp_path / "m")
    path = folder / "iter_0000000" / "run_config.yaml"
    config = yaml.safe_load(path.read_text())
    outer = ("_target_", "vocab_size", "seq_length", "rotary_base", "position_embedding_type", "rotary_percent",
             "rope_scaling", "share_embeddings_and_output_weights")  # fmt: skip
    model = config["model"]
    config["model"] = {key: model[key] for key in outer} | {
        "_target_": "megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig",
        "_builder_": "megatron.bridge.models.gpt.gpt_builder.GPTModelBuilder",
        "transformer": {key: value for key, value in model.items() if key not in outer}
        | {"activation_func": "silu", "_target_": "megatron.bridge.models.transformer_config.TransformerConfig"},
    }
    with MegatronReader(folder) as before:
        path.write_text(yaml.safe_dump(config))
        with MegatronReader(folder) as after:
            assert after.shape == before.shape


def test_aliases_of_a_config_are_followed(small, tmp_path):
    """PyYAML writes an object that is there twice as an anchor and an alias."""
    folder = written("bridge", small, tmp_path / "m")
    text = (folder / "iter_0000000" / "run_config.yaml").read_text()
    assert "&id001" in text and "*id001" in text


def test_an_unknown_key_is_said(small, tmp_path, capfd):
    with MegatronReader(written("bridge", small, tmp_path / "m", telepathy=True)):
        assert "run_config.yaml: model: unknown and not used: 'telepathy'" in capfd.readouterr().err


def test_what_lies_beside_the_weights_is_taken_over(small, tmp_path, capfd):
    """Tokenizer and HF config as Megatron-Bridge leaves them, the generation config in its own."""
    generation = {"_target_": "transformers.GenerationConfig.from_dict", "config_dict": {"eos_token_id": 7}}
    folder = written("bridge", small, tmp_path / "m", seq_length=16, generation_config=generation)
    shutil.copytree(small, folder / "iter_0000000" / "hf")
    with MegatronReader(folder) as reader:
        assert reader.generation_config == {"eos_token_id": 7}
        assert reader.hf_config == json.loads((small / "config.json").read_text())
        assert reader.shape.max_position_embeddings == AWKWARD.max_position_embeddings
        names = {file.name for file in reader.tokenizer_folder().iterdir()}
        assert "tokenizer.json" in names
    other = folder / "iter_0000000" / "hf" / "config.json"
    other.write_text(other.read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'))
    with MegatronReader(folder) as reader:
        assert reader.hf_config is None and reader.shape.max_position_embeddings == 16
    assert "num_layers" in capfd.readouterr().err


def test_arguments_of_both_namings(small, tmp_path, capfd):
    """0.16 renamed some; groups count only where they are asked for; a vocabulary must explain the padding."""
    newer = {"norm_epsilon": None, "layernorm_epsilon": 1e-6, "num_query_groups": 2, "group_query_attention": True}
    with MegatronReader(written("megatron", small, tmp_path / "a", **newer)) as reader:
        assert (reader.shape.layernorm_epsilon, reader.shape.vocab_size) == (1e-6, 310)
    with MegatronReader(written("megatron", small, tmp_path / "b", vocab_size=None)) as reader:
        assert reader.shape.vocab_size == 320
    with MegatronReader(written("megatron", small, tmp_path / "c", vocab_size=100)) as reader:
        assert reader.shape.vocab_size == 320
    null = {"tokenizer_type": "NullTokenizer", "vocab_size": 309}
    with MegatronReader(written("megatron", small, tmp_path / "d", **null)) as reader:
        assert reader.shape.vocab_size == 310
    scaled = {"use_rope_scaling": True, "rope_scaling_factor": 32.0}
    with MegatronReader(written("megatron", small, tmp_path / "e", **scaled)) as reader:
        assert reader.shape.rope_scaling == RopeScaling(factor=32.0)
    assert "Megatron-LM itself (0.13 to 0.19) builds a GPT with 8 whatever it says" in capfd.readouterr().err


@pytest.mark.parametrize("dress", DRESSES)
@pytest.mark.parametrize("name", ["gqa", "linear_rope", "biases", "qkv_bias"])
def test_what_we_write_comes_in_again(dress, name, tmp_path):
    """``verify`` reads it before it appears; back in HF it is byte for byte what it was."""
    if (dress, name) == ("megatron", "linear_rope"):
        pytest.skip("Megatron-LM builds no model with it")
    source = make_llama(tmp_path / "hf", ALL[name].replace(num_layers=1, vocab_size=330, padded_vocab_size=330))
    folder = convert(source, tmp_path / dress, format=dress, make_vocab_size_divisible_by=64, verify=True)
    out = convert(folder, tmp_path / "out", format="hf", verify=True)
    for file in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (out / file).read_bytes() == (source / file).read_bytes(), file


def test_what_the_user_says_must_agree(small, tmp_path):
    folder = written("bridge", small, tmp_path / "m")
    with MegatronReader(folder, {"vocab_size": 300, "max_position_embeddings": 64}) as reader:
        assert (reader.shape.vocab_size, reader.shape.max_position_embeddings) == (300, 64)
    with pytest.raises(MinitronError, match="model: asked for a model with num_layers 4, but this checkpoint has 1"):
        MegatronReader(folder, {"num_layers": 4})
