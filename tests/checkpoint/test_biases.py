"""Linear layers with a bias: Llama's ``attention_bias`` and ``mlp_bias``, NeMo's ``bias``, and zeros in their place."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from nemo_minitron.checkpoint import HfReader, HfWriter, NemoReader
from nemo_minitron.checkpoint.canonical import each_tensor
from nemo_minitron.checkpoint.hf_config import hf_config_from_shape, shape_from_hf
from nemo_minitron.checkpoint.nemo_config import nemo_config_from_hf, shape_from_nemo, update_shape
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.layout import PROJ_BIAS
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA, SHAPES

QWEN2 = SHAPES["qkv_bias"]
TOKENS = torch.arange(40)[None] * 7 % 320
KINDS = {name: SHAPES[name] for name in ("biases", "attention_bias", "mlp_bias")}


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float64).eval()(TOKENS).logits


def in_a_llamas_dress(folder, target, zero=0.0):
    """The Qwen2 of a folder as a ``LlamaForCausalLM`` with ``attention_bias``, saved by transformers."""
    source = AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True}
    model = LlamaForCausalLM(LlamaForCausalLM.config_class.from_dict(config))
    missing = model.load_state_dict(source.state_dict(), strict=False).missing_keys
    assert len(missing) == 3 and all(name.endswith("o_proj.bias") for name in missing)
    for name in missing:
        torch.nn.init.constant_(model.get_parameter(name), zero)
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize("name", KINDS)
def test_transformers_has_the_parameters_that_are_counted(name, tmp_path):
    shape = KINDS[name]
    folder = make_llama(tmp_path / "hf", shape)
    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.num_parameters() == shape.num_parameters()
    config = json.loads((folder / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (shape.qkv_bias, shape.mlp_bias)


def test_a_qwen2_in_a_llamas_dress_is_read_as_one(tmp_path, capsys):
    dressed = in_a_llamas_dress(make_llama(tmp_path / "qwen2", QWEN2), tmp_path / "llama")
    nemo = convert(dressed, tmp_path / "m.nemo", verify=True)
    assert "every o_proj.bias is zero; read as a model with a bias on queries, keys" in capsys.readouterr().err
    with NemoReader(nemo) as reader, HfReader(tmp_path / "qwen2") as plain:
        assert reader.shape == QWEN2 and reader.fingerprint() == plain.fingerprint()
        assert (reader.config["bias"], reader.config["qkv_bias"]) == (False, True)
    back = convert(nemo, tmp_path / "back", verify=True)
    said, says = (json.loads((folder / "config.json").read_text()) for folder in (dressed, back))
    assert {key: says[key] for key in said} == said
    before, after = load_file(dressed / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(logits(back), logits(tmp_path / "qwen2"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("zero", [1e-30, -0.0])
def test_an_output_bias_that_is_not_all_zero_bits_stays(zero, tmp_path, capsys):
    dressed = in_a_llamas_dress(make_llama(tmp_path / "qwen2", QWEN2), tmp_path / "llama", zero)
    with HfReader(dressed) as reader:
        assert reader.shape == QWEN2.replace(proj_bias=True)
        assert (reader.tensor(PROJ_BIAS, 2) == zero).all()
    assert "o_proj" not in capsys.readouterr().err


def test_zeros_of_another_size_are_no_bias(tmp_path):
    folder = make_llama(tmp_path / "hf", SHAPES["attention_bias"])
    weights = load_file(folder / "model.safetensors")
    zeros = {name: torch.zeros(65) for name in weights if name.endswith("o_proj.bias")}
    save_file(weights | zeros, folder / "model.safetensors")
    with pytest.raises(MinitronError, match=r"o_proj\.bias' must have the size \(64,\), found \(65,\)"):
        HfReader(folder)


def test_zeros_are_written_where_the_config_asks_for_them(tmp_path):
    """A Qwen2 as the Llama that a config says: the writer needs no tensor that the model does not have."""
    source = make_llama(tmp_path / "qwen2", QWEN2)
    config = hf_config_from_shape(QWEN2.replace(proj_bias=True), torch.float32)
    assert config["architectures"] == ["LlamaForCausalLM"] and config["attention_bias"]
    with HfReader(source) as reader, HfWriter(tmp_path / "out", config, QWEN2, torch.float32) as writer:
        for parameter, layer in each_tensor(QWEN2):
            writer.write(parameter, reader.tensor(parameter, layer), layer)
    _, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_a_nemo_config_says_which_layers_have_one(name):
    shape = KINDS[name]
    hf = hf_config_from_shape(shape, torch.float32)
    config = nemo_config_from_hf(hf, shape, dtype=torch.float32, divisor=64, tokenizer=None)
    assert config["bias"] is True  # so that NeMo itself misses what a partial model has not, and stops
    named = {"attention_bias": ["linear_qkv", "linear_proj"], "mlp_bias": ["linear_fc1", "linear_fc2"]}.get(name)
    assert config["minitron"].get("biases") == named
    assert shape_from_nemo(config, shape.padded_vocab_size) == shape
    plain = update_shape(config, GQA)
    assert plain["bias"] is False and "biases" not in plain["minitron"]


def nemo_config(**changes):
    hf = hf_config_from_shape(GQA, torch.float32)
    return nemo_config_from_hf(hf, GQA, dtype=torch.float32, divisor=64, tokenizer=None) | changes


def test_bias_alone_means_every_linear_layer():
    for config in (nemo_config(bias=True), {key: value for key, value in nemo_config().items() if key != "bias"}):
        shape = shape_from_nemo(config, 320)
        assert (shape.qkv_bias, shape.proj_bias, shape.mlp_bias) == (True, True, True)


@pytest.mark.parametrize(
    ("biases", "changes"),
    [
        (["linear_qkv", "linear_proj"], {"bias": False, "qkv_bias": True}),
        (["linear_qkv", "linear_proj"], {"bias": True, "qkv_bias": False}),
        (["linear_fc1", "linear_fc2"], {"bias": True, "qkv_bias": True}),
        (["linear_fc1"], {"bias": True}),
        ("linear_fc1", {"bias": True}),
        ([], {"bias": True}),
        ({"linear_qkv": "linear_proj"}, {"bias": True}),
    ],
)
def test_biases_that_contradict_each_other_are_refused(biases, changes):
    config = nemo_config(**changes)
    config["minitron"] = {**config["minitron"], "biases": biases}
    with pytest.raises(MinitronError, match=r"model_config.yaml: minitron\.biases must be one of .*linear_fc1"):
        shape_from_nemo(config, 320)


def test_families_whose_layers_have_none_refuse_the_keys():
    for name, kind in (("MistralForCausalLM", "mistral"), ("Qwen2ForCausalLM", "qwen2")):
        base = hf_config_from_shape(GQA, torch.float32) | {"architectures": [name], "model_type": kind}
        for key in ("attention_bias", "mlp_bias"):
            with pytest.raises(MinitronError, match=f"{key} must be false, found true"):
                shape_from_hf(base | {"sliding_window": None, key: True})


@pytest.mark.parametrize("name", KINDS)
def test_no_bias_is_lost_on_the_way_out(name):
    shape = KINDS[name]
    source = hf_config_from_shape(shape.replace(qkv_bias=False, proj_bias=False, mlp_bias=False), torch.float32)
    with pytest.raises(MinitronError, match=r"architectures .* must be of a model with a bias on .*, as its weights"):
        hf_config_from_shape(shape, torch.float32, source)


def test_shapes_of_older_files_say_nothing_of_biases():
    assert "proj_bias" not in QWEN2.to_dict() and "mlp_bias" not in QWEN2.to_dict()
    assert type(GQA).from_dict(KINDS["biases"].to_dict()) == KINDS["biases"]
    assert type(GQA).from_dict(GQA.to_dict()) == GQA
