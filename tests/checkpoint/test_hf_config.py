"""What ``config.json`` says is read as transformers reads it, refused by name, or said to be unknown."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nemo_minitron.checkpoint import HfReader, NemoReader
from nemo_minitron.checkpoint.hf_config import hf_config_from_shape, shape_from_hf
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.decoder import Rotary
from nemo_minitron.model.shape import LinearScaling, RopeScaling
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALING = RopeScaling(**LLAMA3)
BASE = hf_config_from_shape(GQA.replace(num_layers=2), torch.float32)


def config(drop=(), **changes):
    return {key: value for key, value in BASE.items() if key not in drop} | changes


def newer(**section):
    """As transformers 5 writes RoPE."""
    return config(drop=("rope_theta", "rope_scaling"), rope_parameters=section)


READ = {
    "older": (config(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3}), 5e5, SCALING),
    "older, first name of the type": (config(rope_scaling={"type": "llama3", **LLAMA3}), 1e4, SCALING),
    "older, nothing said": (config(drop=("rope_theta", "rope_scaling")), 1e4, None),
    "older, default": (config(rope_scaling={"rope_type": "default"}), 1e4, None),
    "newer": (newer(rope_type="llama3", rope_theta=5e5, **LLAMA3), 5e5, SCALING),
    "newer, default": (newer(rope_type="default", rope_theta=1e6), 1e6, None),
    "newer, no type": (newer(rope_theta=1e6), 1e6, None),
    "both, agreeing": (config(rope_theta=1e6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}), 1e6, None),
    "older, linear": (config(rope_scaling={"type": "linear", "factor": 4.0}), 1e4, LinearScaling(4.0)),
    "older, linear by nothing": (config(rope_scaling={"rope_type": "linear", "factor": 1.0}), 1e4, None),
    "newer, linear": (newer(rope_type="linear", rope_theta=1e6, factor=2.5), 1e6, LinearScaling(2.5)),
    "base above, scaling inside": (
        config(rope_theta=2e4, rope_parameters={"rope_type": "llama3", **LLAMA3}),
        2e4,
        SCALING,
    ),
}


@pytest.mark.parametrize("case", READ)
def test_rope_of_both_generations(case):
    source, base, scaling = READ[case]
    shape = shape_from_hf(source)
    assert (shape.rotary_base, shape.rope_scaling) == (base, scaling)
    written = hf_config_from_shape(shape, torch.float32, source)
    assert shape_from_hf(written) == shape
    older = {key: value for key, value in written.items() if key != "rope_parameters"}  # all that transformers 4 knows
    assert shape_from_hf(older) == shape


@pytest.mark.parametrize("case", [case for case in READ if not case.startswith("newer") and "inside" not in case])
def test_rope_is_what_transformers_reads(case, tmp_path):
    source, base, _ = READ[case]
    (tmp_path / "config.json").write_text(json.dumps(source))
    found = AutoConfig.from_pretrained(tmp_path)
    turned = Rotary.of(shape_from_hf(source), 2)  # the angles of position 1 are the frequencies
    ours = torch.atan2(turned.sin[1], turned.cos[1])[: found.head_dim // 2]
    torch.testing.assert_close(ours, LlamaRotaryEmbedding(found).inv_freq, rtol=1e-5, atol=1e-7)
    assert found.rope_theta == base


def test_an_export_of_a_newer_folder_has_the_logits_of_the_older_one(tmp_path):
    """One set of weights under the two spellings of the same RoPE; transformers 4 knows only the first."""
    shape = GQA.replace(rotary_base=5e5, rope_scaling=SCALING)
    source = make_llama(tmp_path / "hf", shape)
    expected = AutoModelForCausalLM.from_pretrained(source)
    content = json.loads((source / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling", "torch_dtype"):
        del content[key]
    content |= {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}, "dtype": "float32"}
    (source / "config.json").write_text(json.dumps(content))
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    del tokenizer["model_input_names"]
    tokenizer |= {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "extra_special_tokens": ["<|endoftext|>"],
    }
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    nemo = convert(source, tmp_path / "m.nemo", verify=True)
    with NemoReader(nemo) as reader:
        assert reader.shape == shape
    back = convert(nemo, tmp_path / "back", verify=True)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(back)(ids).logits, expected(ids).logits)
    exported = json.loads((back / "config.json").read_text())
    assert exported["rope_parameters"] == content["rope_parameters"]
    assert (exported["torch_dtype"], exported["dtype"]) == ("float32", "float32")
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(back)
    assert loaded("some text").input_ids and "<|endoftext|>" in loaded.additional_special_tokens
    assert loaded("some text").keys() == {"input_ids", "attention_mask"}, "what a model takes"


def test_the_harness_is_not_given_a_folder_that_its_transformers_misreads(tmp_path):
    from nemo_minitron.evaluate.measure import shape_of

    folder = make_llama(tmp_path / "hf", GQA.replace(num_layers=1))
    assert shape_of(folder, on_grid=False).rotary_base == 1e4
    content = json.loads((folder / "config.json").read_text())
    del content["rope_theta"]
    (folder / "config.json").write_text(json.dumps(content | {"rope_parameters": {"rope_theta": 5e5}}))
    with pytest.raises(MinitronError, match="found it in rope_parameters alone"):
        shape_of(folder, on_grid=False)


REFUSED = {
    "yarn": (
        config(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "rope_scaling: rope_type must be one of default, llama3, linear, found 'yarn'; Megatron-Core's GPT has no such",
    ),
    "linear without a factor": (config(rope_scaling={"type": "linear"}), "rope_scaling: expected factor for linear"),
    "linear below 1": (config(rope_scaling={"type": "linear", "factor": 0.5}), "factor must be at least 1"),
    "linear with more": (
        config(rope_scaling={"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}),
        "'low_freq_factor' is unknown in a RoPE of type 'linear'",
    ),
    "dynamic": (newer(rope_type="dynamic", rope_theta=1e4, factor=2.0), "rope_parameters: rope_type .* 'dynamic'"),
    "longrope": (newer(rope_type="longrope", rope_theta=1e4, short_factor=[1]), "found 'longrope'"),
    "a factor without a type": (config(rope_scaling={"factor": 4.0}), "rope_scaling: factor must be absent"),
    "a factor in a default": (newer(rope_type="default", rope_theta=1e4, factor=4.0), "factor must be absent"),
    "types that disagree": (
        config(rope_scaling={"type": "linear", "rope_type": "llama3", **LLAMA3}),
        "rope_type and type must agree",
    ),
    "a number missing": (config(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "missing: low_freq_factor"),
    "a number of text": (
        config(rope_scaling={"rope_type": "llama3", **LLAMA3, "factor": "8"}),
        "factor must be a number",
    ),
    "high below low": (
        config(rope_scaling={"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}),
        "high_freq_factor",
    ),
    "unknown inside": (config(rope_scaling={"rope_type": "llama3", **LLAMA3, "mscale": 2.0}), "'mscale' is unknown"),
    "partial inside": (newer(rope_theta=1e4, partial_rotary_factor=0.5), "partial_rotary_factor must be 1"),
    "for each kind of layer": (
        newer(full_attention={"rope_theta": 1e6}, sliding_attention={"rope_theta": 1e4}),
        "one RoPE for all layers, found one for 'full_attention'",
    ),
    "bases that disagree": (
        config(rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        "rope_theta and rope_parameters.rope_theta must agree, found 10000.0 and 1000000.0",
    ),
    "scalings that disagree": (
        config(rope_scaling={"rope_type": "llama3", **LLAMA3}, rope_parameters={"rope_theta": 1e4}),
        "rope_scaling and rope_parameters must agree",
    ),
    "no base": (newer(rope_type="default"), "expected the key rope_theta"),
    "a base of text": (config(rope_theta="1e4"), "rope_theta must be a number"),
    "a base of 0": (config(rope_theta=0), "rope_theta must be a number above 0"),
    "lengths that disagree": (
        config(rope_scaling={"rope_type": "llama3", **LLAMA3}, original_max_position_embeddings=4096),
        "original_max_position_embeddings .4096. must be as in",
    ),
    "another model type": (config(model_type="qwen3"), "model_type must be that of LlamaForCausalLM, found 'qwen3'"),
    "two architectures": (config(architectures=["LlamaForCausalLM", "X"]), "architectures must be a list of one name"),
    "head_dim 0": (config(head_dim=0), "head_dim must be a positive integer"),
    "layers of a float": (config(num_hidden_layers=2.5), "num_hidden_layers must be a positive integer"),
    "groups 0": (config(num_key_value_heads=0), "num_key_value_heads must be a positive integer"),
    "tied by text": (config(tie_word_embeddings="false"), "tie_word_embeddings must be true or false"),
    "sliding layers": (
        config(layer_types=["full_attention", "sliding_attention"]),
        "layer_types must be 'full_attention' for every layer, found 'sliding_attention'",
    ),
    "layer types of another depth": (
        config(layer_types=["full_attention"]),
        "layer_types must be a list of .* found 1",
    ),
    "activation": (config(hidden_act="gelu"), "hidden_act must be 'silu', found 'gelu'"),
    "quantised": (config(quantization_config={"quant_method": "fp8"}), "quantization_config must be null"),
    "experts": (config(num_local_experts=8), "num_local_experts must be 0"),
    "norms of q and k": (config(use_qk_norm=True), "use_qk_norm must be false"),
    "layers without RoPE": (config(no_rope_layers=[1, 0]), "no_rope_layers must be null"),
    "scaled logits": (config(logits_scaling=8.0), "logits_scaling must be null"),
    "partial rotation": (config(partial_rotary_factor=0.5), "partial_rotary_factor must be null"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    source, message = REFUSED[case]
    with pytest.raises(MinitronError, match=f"^config.json: .*{message}") as caught:
        shape_from_hf(source)
    assert "\n" not in str(caught.value)


def test_values_that_look_empty_are_what_they_are():
    assert shape_from_hf(config(rms_norm_eps=0)).layernorm_epsilon == 0
    assert (
        shape_from_hf(config(head_dim=None)).kv_channels == 8 == shape_from_hf(config(drop=("head_dim",))).kv_channels
    )
    assert shape_from_hf(config(hidden_act="swish", pretraining_tp=2)) == shape_from_hf(BASE)


def test_an_unknown_key_is_said_once(capsys):
    for _ in range(2):
        shape_from_hf(config(novelty=1, auto_map={"AutoModel": "x.Y"}), "here: config.json")
    assert capsys.readouterr().err == "minitron: here: config.json: unknown and not used: 'novelty', 'auto_map'\n"
    shape_from_hf(BASE)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("source", ["float32", "torch.bfloat16", "float16", None])
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_an_export_names_the_dtype_of_its_weights(key, source):
    said = config(drop=("torch_dtype", "dtype"), **({key: source} if source else {}))
    written = hf_config_from_shape(shape_from_hf(said), torch.bfloat16, said)
    assert (written["torch_dtype"], written["dtype"]) == ("bfloat16", "bfloat16")


def test_per_layer_lists_follow_the_depth():
    source = config(layer_types=["full_attention"] * 2)
    written = hf_config_from_shape(shape_from_hf(source).replace(num_layers=1), torch.float32, source)
    assert written["layer_types"] == ["full_attention"] and shape_from_hf(written).num_layers == 1


def test_a_bias_is_not_lost_in_an_architecture_without_one():
    with pytest.raises(MinitronError, match=r"architectures .* with a bias"):
        hf_config_from_shape(shape_from_hf(BASE).replace(qkv_bias=True), torch.float32, BASE)


def test_a_head_beside_a_tied_table(tmp_path):
    folder = make_llama(tmp_path / "hf", GQA.replace(num_layers=1, share_embeddings_and_output_weights=True))
    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": table.clone()}, folder / "model.safetensors")
    with HfReader(folder) as reader:
        assert reader.shape.share_embeddings_and_output_weights
    for other in (table + 0.1, table.bfloat16(), table[:-1].clone()):
        save_file(weights | {"lm_head.weight": other}, folder / "model.safetensors")
        with pytest.raises(MinitronError, match=r"'lm_head\.weight' differs .* tie_word_embeddings"):
            HfReader(folder)


def test_a_window_is_in_a_config_that_is_made():
    """A NeMo model keeps no ``config.json``: the one that is made for its export must not lose the window."""
    shape = GQA.replace(sliding_window=7)
    made = hf_config_from_shape(shape, torch.float32)
    assert made["architectures"] == ["MistralForCausalLM"] and made["sliding_window"] == 7
    assert shape_from_hf(made) == shape
