"""The architecture under which a student is exported: its own, or one that more readers load, with equal logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.hf_config import dressed_config, hf_config_from_shape
from nemo_minitron.convert import convert
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
    ("qwen2", 48): "Qwen2ForCausalLM",
    ("qwen2", 52): "Qwen2ForCausalLM",
}


@pytest.mark.parametrize(("family", "hidden"), WORN)
def test_architecture(family, hidden):
    shape = (SMALL if family == "llama" else QWEN2).replace(hidden_size=hidden)
    config, dress = dressed_config(shape, torch.float32, OF[family])
    assert config["architectures"] == [WORN[family, hidden]]
    own = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[family]
    told = WORN[family, hidden] != own or (family == "qwen2" and hidden < 64)
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


def test_logits_are_those_of_the_student(tmp_path, capsys):
    source = make_llama(tmp_path / "hf", SMALL)
    student = prune(convert(source, tmp_path / "m.nemo"), {"hidden_size": 52}, tmp_path / "s.nemo")
    folder = convert(student, tmp_path / "out", verify=True)
    assert f"minitron: {folder}: exported as " in capsys.readouterr().err
    tokens = list(range(90))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([tokens])).logits[0], logits(student, tokens), rtol=0, atol=1e-4)


def test_a_dressed_export_comes_back_as_the_same_model(tmp_path):
    source = make_llama(tmp_path / "hf", SMALL)
    student = prune(convert(source, tmp_path / "m.nemo"), {"hidden_size": 52}, tmp_path / "s.nemo")
    folder = convert(student, tmp_path / "out")
    again = convert(folder, tmp_path / "again.nemo")
    with NemoReader(student) as first, NemoReader(again) as second:
        assert first.fingerprint() == second.fingerprint() and first.shape == second.shape
    twice = convert(again, tmp_path / "twice")
    assert (twice / "config.json").read_bytes() == (folder / "config.json").read_bytes()
