"""What engines want of a shape, against their own assertions one shape at a time, and transformers' matrices."""

from __future__ import annotations

import itertools

import pytest
import torch

from nemo_minitron.config.sections import Serving
from nemo_minitron.errors import MinitronError
from nemo_minitron.model import serving
from nemo_minitron.model.shape import ModelShape

LLAMA = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, 128256)
SMOL = ModelShape(30, 576, 1536, 9, 3, 64, 49152, 49152, share_embeddings_and_output_weights=True)
QWEN = ModelShape(24, 896, 4864, 14, 2, 64, 151936, 151936, share_embeddings_and_output_weights=True, qkv_bias=True)


def divide(numerator: int, denominator: int) -> int:
    assert numerator % denominator == 0
    return numerator // denominator


def load_by_rank(shape: ModelShape, gpus: int, fp8: bool) -> None:
    """What vLLM does with the sizes of a Llama when it builds one rank's layers, Marlin's check included."""
    heads = divide(shape.num_attention_heads, gpus)
    if shape.num_query_groups >= gpus:
        groups = divide(shape.num_query_groups, gpus)
    else:
        divide(gpus, shape.num_query_groups)
        groups = 1
    ffn = divide(shape.ffn_hidden_size, gpus)
    if not fp8:
        return
    for outputs, inputs in (
        ((heads + 2 * groups) * shape.kv_channels, shape.hidden_size),
        (shape.hidden_size, heads * shape.kv_channels),
        (2 * ffn, shape.hidden_size),
        (shape.hidden_size, ffn),
    ):
        divide(outputs, 64)
        divide(inputs, 16)


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("fp8", [False, True])
def test_what_is_refused_is_what_an_engine_cannot_split(gpus, fp8):
    wanted, refused = Serving(tensor_parallel=gpus, fp8=fp8), set()
    for groups, per_group, hidden, ffn, channels in itertools.product(
        (1, 2, 3, 4, 6), (1, 2, 3, 4), (96, 128), (96, 97, 128), (16, 48)
    ):
        shape = ModelShape(2, hidden, ffn, groups * per_group, groups, channels, 320, 320)
        try:
            load_by_rank(shape, gpus, fp8)
            loads = True
        except AssertionError:
            loads = False
        found = [reason.name for reason in serving.reasons(shape, wanted) if reason.refused]
        assert loads == (not found), (shape, found)
        refused |= set(found)
    assert refused == ({"heads", "groups", "ffn"} if gpus > 1 else set()) | ({"fp8"} if fp8 else set())


@pytest.mark.parametrize("shape", [LLAMA.replace(hidden_size=2688), SMOL, QWEN])
def test_the_share_of_the_weights_in_odd_rows_is_that_of_transformers_matrices(shape):
    from transformers import AutoConfig, AutoModelForCausalLM

    from nemo_minitron.checkpoint.hf_config import hf_config_from_shape

    few = shape.replace(num_layers=2)
    content = hf_config_from_shape(few, torch.bfloat16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content))
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    odd = sum(weight.numel() for weight in matrices if weight.shape[1] % 256)
    assert serving.odd_share(few, 256) == pytest.approx(odd / sum(weight.numel() for weight in matrices), abs=1e-12)
    told = serving.reasons(few, Serving(row_multiple=256))[0].text
    assert f"{serving.odd_share(few, 256):.1%} of the weights" in told


def test_a_good_shape_has_no_reason_and_badly_run_ones_are_not_refused():
    assert serving.reasons(LLAMA, Serving(tensor_parallel=8, row_multiple=256, fp8=True)) == []
    (rows,) = serving.reasons(LLAMA.replace(ffn_hidden_size=9280), Serving(tensor_parallel=8, row_multiple=256))
    assert (rows.name, rows.refused) == ("rows", False)
    assert rows.text.startswith("ffn_hidden_size 9280 is no multiple of 256: llama.cpp's K-quants store ")


def test_what_always_holds_needs_no_key():
    assert serving.reasons(SMOL, Serving()) == []
    (uneven,) = serving.reasons(SMOL.replace(hidden_size=512), Serving())
    assert uneven.name == "hidden_per_head" and not uneven.refused
    assert uneven.text.endswith("a LlamaForCausalLM, the export is a MistralForCausalLM")
    (uneven,) = serving.reasons(SMOL.replace(hidden_size=512, qkv_bias=True, mlp_bias=True), Serving())
    assert uneven.text.endswith("a LlamaForCausalLM, and its biases leave it no other class")
    assert serving.reasons(QWEN, Serving()) == []
    (assumed,) = serving.reasons(QWEN.replace(hidden_size=768), Serving())
    assert assumed.name == "head_dim" and not assumed.refused
    (assumed,) = serving.reasons(QWEN.replace(hidden_size=768), Serving(tensor_parallel=2))
    assert assumed.refused


@pytest.mark.parametrize("name", ["tensor_parallel", "row_multiple"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(MinitronError, match=rf"^prune\.serving\.{name}: expected at least 1, found 0"):
        serving.check(Serving(**{name: 0}), "prune.serving")
