"""Qwen3 against transformers' own: the plain decoder, folders there and back, and what is no Qwen3."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, Qwen3ForCausalLM

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import Rotary, read_head, read_layer, rms_norm
from nemo_minitron.synthetic import make_llama
from tests.qwen3 import TOKENS, random_qwen3, transformers_logits


@pytest.fixture(scope="module", params=["tied", "untied"])
def qwen3(request, tmp_path_factory):
    return random_qwen3(tmp_path_factory.mktemp("qwen3") / "hf", tied=request.param == "tied")


@pytest.fixture(scope="module")
def folder(qwen3):
    return convert(qwen3, qwen3.parent / "folder")


def test_the_plain_decoder_computes_what_transformers_does(qwen3, tmp_path):
    nemo = convert(qwen3, tmp_path / "m.nemo", verify=True)
    with NemoReader(nemo) as reader:
        shape = reader.shape
        assert shape.family == "qwen3" and reader.config["qk_layernorm"] is True
        assert shape.num_parameters() == Qwen3ForCausalLM.from_pretrained(qwen3).num_parameters()
        rotary = Rotary.of(shape, TOKENS.shape[1])
        x = reader.tensor(layout.EMBEDDING)[TOKENS]
        for layer in range(shape.num_layers):
            x = read_layer(reader, layer).forward(x, rotary)
        norm, head = read_head(reader)
    found = rms_norm(x, norm, shape.layernorm_epsilon) @ head.T
    torch.testing.assert_close(found, transformers_logits(qwen3), rtol=1e-4, atol=2e-4)
    back = convert(nemo, tmp_path / "back", verify=True)
    config, source = (json.loads((folder / "config.json").read_text()) for folder in (back, qwen3))
    assert config == source | {"torch_dtype": "float32", "dtype": "float32"}
    made = make_llama(tmp_path / "made", shape)  # a config that has no source
    assert transformers_logits(made).isfinite().all() and AutoConfig.from_pretrained(made).head_dim == 16


@pytest.mark.parametrize(
    ("said", "instead", "message"),
    [
        ("qk_layernorm: true\n", "qk_layernorm: false\n", "qk_layernorm must be true, found false"),
        ("qk_layernorm: true\n", "", "qk_layernorm must be true, found null"),
        ("qkv_bias: false\n", "qkv_bias: true\n", "qkv_bias must be false"),
        ("  family: qwen3\n", "  family: [qwen3]\n", "family must be one of llama, mistral, qwen2, qwen3, found"),
    ],
)
def test_a_config_that_says_other_layers_is_refused(folder, said, instead, message):
    config = folder / "model_config.yaml"
    text = config.read_text()
    assert said in text
    config.write_text(text.replace(said, instead))
    try:
        with pytest.raises(MinitronError, match=message):
            NemoReader(folder)
    finally:
        config.write_text(text)


def test_a_model_of_nemos_own_is_recognised_by_its_keys(folder):
    config = folder / "model_config.yaml"
    text = config.read_text()
    config.write_text(text.replace("  family: qwen3\n", ""))
    with NemoReader(folder) as reader:
        assert reader.shape.family == "qwen3"
    config.write_text(text)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"attention_bias": True}, "attention_bias must be false, found true"),
        ({"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window must be false, found true"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types must be 'full_attention' for every layer"),
    ],
)
def test_a_qwen3_that_computes_something_else_is_refused(qwen3, tmp_path, edits, message):
    config = json.loads((qwen3 / "config.json").read_text()) | edits
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "model.safetensors").symlink_to(qwen3 / "model.safetensors")
    with pytest.raises(MinitronError, match=message):
        convert(tmp_path / "hf", tmp_path / "none.nemo")
    assert not (tmp_path / "none.nemo").exists()
