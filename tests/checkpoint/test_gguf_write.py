"""GGUFs that are written, against transformers' loading, llama.cpp's formulas, and our own reading."""

import gguf
import numpy as np
import pytest
import torch

from nemo_minitron.checkpoint import HfReader
from nemo_minitron.checkpoint.canonical import each_tensor
from nemo_minitron.checkpoint.gguf_write import GgufWriter
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import LinearScaling, RopeScaling
from nemo_minitron.synthetic import make_llama
from tests.checkpoint.test_gguf import transformers_factors
from tests.llamas import GQA, SHAPES
from tests.qwen3 import TOKENS, random_qwen3

KINDS = {  # keys of convert, the dtype to which the matrices of the source are rounded
    "F32": ({"precision": 32}, torch.float32),
    "F16": ({"precision": 16}, torch.float16),
    "BF16": ({"precision": "bf16"}, torch.bfloat16),
}
FAMILIES = ("gqa", "tied", "head_dim", "qkv_bias", "qwen3")


def source(folder, name):
    return random_qwen3(folder, True) if name == "qwen3" else make_llama(folder, SHAPES[name])


def metadata(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def logits_of(folder, **keys):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, **keys)
    with torch.no_grad():
        return model.eval()(TOKENS).logits, model


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_it_with_the_logits_of_the_source(name, tmp_path):
    from transformers import AutoConfig

    given = source(tmp_path / "hf", name)
    written = convert(given, tmp_path / "m.gguf", verify=True)
    # its loader knows the width of a head for Llama alone
    keys = {"config": AutoConfig.from_pretrained(given)} if name == "qwen3" else {}
    expected, _ = logits_of(given)
    found, _ = logits_of(tmp_path, gguf_file=written.name, **keys)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_dtype_and_vectors_stay_float32(kind, tmp_path):
    keys, dtype = KINDS[kind]
    given = make_llama(tmp_path / "hf", SHAPES["qkv_bias"])
    written = convert(given, tmp_path / "m.gguf", verify=True, **keys)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(written).tensors}
    assert {kinds[name] for name in kinds if not name.endswith(("norm.weight", ".bias"))} == {kind}
    assert {kinds[name] for name in kinds if name.endswith(("norm.weight", ".bias"))} == {"F32"}
    with HfReader(given) as before, HfReader(written) as after:
        assert after.shape == before.shape
        for parameter, layer in each_tensor(before.shape):
            tensor = before.tensor(parameter, layer)
            expected = tensor.to(dtype) if tensor.dim() == 2 else tensor
            assert torch.equal(after.tensor(parameter, layer), expected.float()), parameter.key


def test_q8_0_is_the_quantisation_of_the_gguf_package(tmp_path, capsys):
    given = make_llama(tmp_path / "hf", GQA)
    written = convert(given, tmp_path / "m.gguf", quantization="q8_0", verify=True)
    with HfReader(given) as reader:
        up = reader._source.get("model.layers.1.mlp.up_proj.weight").numpy()
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(written).tensors}
    assert found["blk.1.ffn_up.weight"].tensor_type.name == "Q8_0"
    expected = gguf.quants.quantize(up, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(found["blk.1.ffn_up.weight"].data, expected)
    assert "F16 instead" not in capsys.readouterr().err
    uneven = make_llama(tmp_path / "uneven", SHAPES["head_dim"])
    convert(uneven, tmp_path / "u.gguf", quantization="q8_0", verify=True)
    assert "rows of 48 values, no multiple of 32, are F16 instead of Q8_0" in capsys.readouterr().err


@pytest.mark.parametrize("scaling", [RopeScaling(8.0), RopeScaling(32.0), SHAPES["llama3_rope"].rope_scaling])
def test_llama3_scaling_as_factors(scaling, tmp_path):
    shape = GQA.replace(rotary_base=500000.0, rope_scaling=scaling)
    written = convert(make_llama(tmp_path / "hf", shape), tmp_path / "m.gguf", verify=True)
    (factors,) = [one for one in gguf.GGUFReader(written).tensors if one.name == "rope_freqs.weight"]
    np.testing.assert_allclose(factors.data, transformers_factors(shape), rtol=2e-6)
    with HfReader(written) as reader:
        assert reader.shape.rope_scaling == scaling


def test_linear_scaling_and_biases(tmp_path):
    """Their rows are permuted as the weights' are; transformers is told of both, which it does not read in a GGUF."""
    from transformers import AutoConfig

    shape = GQA.replace(rope_scaling=LinearScaling(3.5), qkv_bias=True, proj_bias=True, mlp_bias=True)
    given = make_llama(tmp_path / "hf", shape)
    written = convert(given, tmp_path / "m.gguf", verify=True)
    found = metadata(written)
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 3.5)
    expected, _ = logits_of(given)
    assert torch.equal(
        logits_of(tmp_path, gguf_file=written.name, config=AutoConfig.from_pretrained(given))[0], expected
    )


def test_metadata_is_that_of_llama_cpps_converter(tmp_path):
    shape = GQA.replace(hidden_size=48, layernorm_epsilon=1e-6, rotary_base=1e6)
    found = metadata(convert(make_llama(tmp_path / "hf", shape), tmp_path / "My-Model.gguf", precision=16))
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "My-Model",
        "general.file_type": 1,
        "llama.block_count": 3,
        "llama.context_length": 128,
        "llama.embedding_length": 48,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 1e6,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
    }
    assert {key: found[key] for key in expected} == expected
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == 320


def test_a_tokenizer_that_came_from_a_gguf_goes_into_one_again(tmp_path):
    first = convert(make_llama(tmp_path / "hf", GQA), tmp_path / "a.gguf")
    again = convert(convert(first, tmp_path / "m.nemo"), tmp_path / "b.gguf", verify=True)
    before, after = metadata(first), metadata(again)
    keys = [key for key in before if key.startswith("tokenizer.") and not key.endswith("_token_id")]
    assert len(keys) > 4 and {key: after.get(key) for key in keys} == {key: before[key] for key in keys}


def test_from_nemo_and_back_is_bit_identical(tmp_path):
    nemo = convert(make_llama(tmp_path / "hf", GQA), tmp_path / "m.nemo", make_vocab_size_divisible_by=128)
    written = convert(nemo, tmp_path / "m.gguf", verify=True)
    with HfReader(tmp_path / "hf") as before, HfReader(written) as after:
        assert before.fingerprint() == after.fingerprint() and before.shape == after.shape


def test_what_cannot_be_said_is_refused_and_leaves_nothing(tmp_path):
    llama = make_llama(tmp_path / "hf", GQA)
    cases = [
        (
            llama,
            {"quantization": "q4_k_m"},
            "quantization must be q8_0 or null, found 'q4_k_m'; for others run llama-qu",
        ),
        (llama, {"make_vocab_size_divisible_by": 64}, "must be absent towards gguf"),
        (llama, {"quantization": "q8_0", "format": "hf"}, "quantization must be absent towards hf"),
        (llama, {"quantization": "q8_0", "precision": "bf16"}, "precision, which must be absent, found bf16"),
        (llama, {"max_shard_size": "1GB"}, "max_shard_size must be absent towards gguf, found '1GB'"),
        (
            make_llama(tmp_path / "qwen", SHAPES["qkv_bias"].replace(rope_scaling=RopeScaling())),
            {},
            "rope_scaling must be absent under the architecture qwen2",
        ),
        (make_llama(tmp_path / "window", SHAPES["window"]), {}, "sliding_window must be null, found 96"),
    ]
    for given, keys, message in cases:
        with pytest.raises(MinitronError, match=message):
            convert(given, tmp_path / "out" / "m.gguf", **keys)
    assert not (tmp_path / "out").exists()
    with HfReader(llama) as reader:
        wide = reader.tensor(*next(each_tensor(GQA))) * 1e9
        with (
            pytest.raises(MinitronError, match="must have values below"),
            GgufWriter(tmp_path / "m.gguf", GQA, torch.float32, quantization="q8_0") as writer,
        ):
            writer.write(*[next(each_tensor(GQA))[0], wide])
        with (
            pytest.raises(MinitronError, match="expected every tensor, found none for 'embedding"),
            GgufWriter(tmp_path / "m.gguf", GQA, torch.float32),
        ):
            pass
    assert not [path for path in tmp_path.iterdir() if "gguf" in path.name]
