"""The architecture under which a student is exported: its own, or one that more readers load, with equal logits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoint import HfReader, HfWriter, NemoReader, each_tensor
from nemo_minitron.checkpoint.hf_config import dressed_config, hf_config_from_shape
from nemo_minitron.convert import convert
from nemo_minitron.convert.temporary import exported
from nemo_minitron.synthetic import make_llama
from tests.compat.models import logits, prune
from tests.llamas import GQA

SMALL = GQA.replace(num_layers=2, share_embeddings_and_output_weights=True)
QWEN2 = SMALL.replace(qkv_bias=True)
OF = {"llama": hf_config_from_shape(SMALL, torch.float32), "qwen2": hf_config_from_shape(SMALL, torch.float32)}
OF["qwen2"] |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
WORN = {  # family, hidden size of the student: its architecture
    ("llama", 48): "LlamaForCausalLM",
    ("llama", 52): "MistralForCausalLM",
    ("qwen2", 64): "Qwen2ForCausalLM",
    ("qwen2", 48): "LlamaForCausalLM",
    ("qwen2", 52): "Qwen2ForCausalLM",
}


@pytest.mark.parametrize(("family", "hidden"), WORN)
def test_architecture(family, hidden):
    shape = (SMALL if family == "llama" else QWEN2).replace(hidden_size=hidden)
    config, dress = dressed_config(shape, torch.float32, OF[family])
    assert config["architectures"] == [WORN[family, hidden]]
    own = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[family]
    told = WORN[family, hidden] != own or (family, hidden) == ("qwen2", 52)
    assert f"hidden_size {hidden}" in dress.note if told else not dress.note
    if WORN[family, hidden] != own:
        assert config["head_dim"] == 8 and config["num_key_value_heads"] == 4
    assert dressed_config(shape, torch.float32, config)[0] == config  # of its own accord, it is worn on


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_that_was_not_pruned_keeps_its_config_and_is_spoken_of(family):
    shape = (SMALL if family == "llama" else QWEN2).replace(hidden_size=52)
    source = OF[family] | {"hidden_size": 52, "head_dim": 8}
    config, dress = dressed_config(shape.replace(padded_vocab_size=384), torch.float32, source)
    assert config == source and dress.family is None
    assert {"llama": "transformers 5 refuses", "qwen2": "vLLM takes"}[family] in dress.note


def test_what_a_config_says_by_silence_is_said_in_the_other_architecture():
    source = {key: value for key, value in OF["qwen2"].items() if key != "rms_norm_eps"} | {
        "num_key_value_heads": 8,
        "sliding_window": 4,
        "max_window_layers": 1,
        "layer_types": ["full_attention"] * 2,
    }
    for key in ("max_position_embeddings", "rope_theta", "tie_word_embeddings"):
        del source[key]
    shape = QWEN2.replace(
        hidden_size=48, num_query_groups=8, max_position_embeddings=32768, layernorm_epsilon=1e-6,
        share_embeddings_and_output_weights=False,
    )  # fmt: skip
    config, _ = dressed_config(shape, torch.float32, source)
    assert config["max_position_embeddings"] == 32768 and config["rms_norm_eps"] == 1e-6
    assert (config["attention_bias"], config["bos_token_id"], config["eos_token_id"]) == (True, None, None)
    assert not {"sliding_window", "max_window_layers", "layer_types", "use_sliding_window"} & config.keys()


@pytest.mark.parametrize(("hidden", "bias"), [(52, False), (48, True)])
def test_logits_are_those_of_the_student(hidden, bias, tmp_path, capsys):
    source = make_llama(tmp_path / "hf", QWEN2 if bias else SMALL)
    student = prune(convert(source, tmp_path / "m.nemo"), {"hidden_size": hidden}, tmp_path / "s.nemo")
    folder = convert(student, tmp_path / "out", verify=True)
    assert f"minitron: {folder}: exported as " in capsys.readouterr().err
    with exported(student, tmp_path / "answers.jsonl") as temporary:
        assert (temporary / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert capsys.readouterr().err == "", "nobody keeps that folder"
    tokens = list(range(90))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([tokens])).logits[0], logits(student, tokens), rtol=0, atol=1e-4)
    zeros = {name: value for name, value in load_file(folder / "model.safetensors").items() if "o_proj.bias" in name}
    assert len(zeros) == (2 if bias else 0) and not any(value.any() for value in zeros.values())


@pytest.mark.parametrize(("hidden", "bias"), [(52, False), (48, True)])
def test_a_dressed_export_comes_back_as_the_same_model(hidden, bias, tmp_path):
    source = make_llama(tmp_path / "hf", QWEN2 if bias else SMALL)
    student = prune(convert(source, tmp_path / "m.nemo"), {"hidden_size": hidden}, tmp_path / "s.nemo")
    folder = convert(student, tmp_path / "out")
    again = convert(folder, tmp_path / "again.nemo")
    with NemoReader(student) as first, NemoReader(again) as second:
        assert first.fingerprint() == second.fingerprint() and first.shape == second.shape
    twice = convert(again, tmp_path / "twice")
    assert (twice / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_llama_with_a_bias_on_queries_keys_and_values_alone_is_a_qwen2_where_it_must_not_be_a_llama():
    source = OF["llama"] | {"attention_bias": True}
    config, dress = dressed_config(QWEN2.replace(hidden_size=52), torch.float32, source)
    assert config["architectures"] == ["Qwen2ForCausalLM"] and "attention_bias" not in config
    assert "transformers 5 refuses" in dress.note and "vLLM loads neither" in dress.note
    every = QWEN2.replace(hidden_size=52, proj_bias=True)
    config, dress = dressed_config(every, torch.float32, source)
    assert config["architectures"] == ["LlamaForCausalLM"] and "transformers 4 loads this one" in dress.note


def test_zeros_go_to_their_shards(tmp_path):
    shape = QWEN2.replace(hidden_size=48)
    with (
        HfReader(make_llama(tmp_path / "hf", QWEN2)) as reader,
        HfWriter(tmp_path / "out", OF["qwen2"], shape, torch.float32, max_shard_size="20KB") as writer,
    ):
        for parameter, layer in each_tensor(shape):
            tensor = reader.tensor(parameter, layer)
            writer.write(parameter, tensor[tuple(slice(0, n) for n in parameter.size(shape))], layer)
    places = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.o_proj.bias"
        assert load_file(tmp_path / "out" / places[name])[name].tolist() == [0.0] * 48
