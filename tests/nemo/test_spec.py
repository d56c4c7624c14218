"""Our layer spec in Megatron-Core's GPTModel, without NeMo, against transformers and dense formulas.

tests/test_megatron_versions.py runs these on other releases of Megatron-Core too.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_minitron import runtime
from nemo_minitron.model.shape import ModelShape
from tests.canonical import Memory, Slot, random_model, to_transformers
from tests.importance.megatron import build, slots_of, this_ranks_part
from tests.ranks import run_ranks

SHAPE = ModelShape(2, 24, 20, 8, 4, 8, 64, 64, max_position_embeddings=64)
TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
PULL = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
"""Gradient ``[b, s, V]`` of the loss with respect to the logits."""
GRIDS = {"tp2": (2, 1, False), "tp2sp": (2, 1, True)}
PROMPT = 9


def _attention(**changes: Any):
    runtime.prepare()
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_minitron.nemo.spec import SDPACoreAttention

    config = TransformerConfig(
        num_layers=1, hidden_size=24, num_attention_heads=6, num_query_groups=2, kv_channels=8, attention_dropout=0.0
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return SDPACoreAttention(config, 1, AttnMaskType.causal, "self")


@pytest.mark.parametrize("masked", [False, True])
def test_core_attention_is_a_softmax_over_what_each_token_may_see(masked):
    s, b, d = 7, 2, 8
    g = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(s, b, heads, d, generator=g, dtype=torch.float64) for heads in (6, 2, 2))
    hidden = torch.ones(s, s, dtype=torch.bool).triu(1).expand(b, 1, s, s).clone()
    if masked:
        hidden[1, :, :, 0] = True  # left padding of the second sample
        hidden[:, :, 0, 0] = False
    found = _attention()(query, key, value, hidden if masked else None)

    key, value = (x[:, :, [0, 0, 0, 1, 1, 1]] for x in (key, value))
    scores = torch.einsum("ibhd,jbhd->bhij", query, key) / d**0.5
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    expected = torch.einsum("bhij,jbhd->ibhd", weights, value).reshape(s, b, 6 * d)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("change", [{"context_parallel_size": 2}, {"window_size": (4, 0)}], ids=str)
def test_core_attention_refuses_what_needs_transformer_engine(change):
    with pytest.raises(ValueError, match="Transformer Engine"):
        _attention(**change)


def _reference() -> tuple[Tensor, dict[Slot, Tensor]]:
    """Transformers' float64 logits ``[b, s, V]`` and, of ``(logits * PULL).sum()``, gradients by canonical tensor."""
    weights = random_model(SHAPE)
    model = to_transformers(weights)
    logits = model(TOKENS).logits
    (logits * PULL).sum().backward()
    # where an element of a canonical tensor lies in transformers' model: there lies its number too
    start, numbers = 0, {}
    for slot, tensor in weights.tensors.items():
        numbers[slot] = torch.arange(start, start + tensor.numel(), dtype=torch.float64).view_as(tensor)
        start += tensor.numel()
    flat = torch.full((start,), torch.nan, dtype=torch.float64)
    for parameter, number in zip(model.parameters(), to_transformers(Memory(SHAPE, numbers)).parameters(), strict=True):
        flat[number.long()] = parameter.grad
    return logits.detach(), {slot: flat[number.long()] for slot, number in numbers.items()}


def _on_two_ranks() -> dict[str, Any]:
    """This rank's logits and relative distances of gradients at each grid; logits of a model that it holds whole."""
    from megatron.core import parallel_state

    _, expected = _reference()
    results: dict[str, Any] = {}
    for name, grid in GRIDS.items():
        for precision in ("float32", "bf16"):
            results[name, precision] = _forward_and_backward(build(SHAPE, *grid), expected, precision)
        if name == "tp2":
            with runtime.whole_on_each_rank():
                whole = build(SHAPE, 1, 1, False).eval()
                results["whole"] = _logits(whole).detach()
                results["cache"] = _with_cache(whole)
        parallel_state.destroy_model_parallel()
    return results


def _logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS, position_ids=torch.arange(16).expand_as(TOKENS), attention_mask=None)


def _forward_and_backward(model: Any, expected: dict[Slot, Tensor], precision: str) -> tuple[Tensor, dict[Slot, float]]:
    from megatron.core import parallel_state

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = _logits(model)
    rank = parallel_state.get_tensor_model_parallel_rank()
    (logits * PULL.chunk(2, dim=-1)[rank]).sum().backward()
    distances = {}
    for slot, parameter in slots_of(model, SHAPE).items():
        if getattr(parameter, "sequence_parallel", False):  # as Megatron's finalize_model_grads does
            torch.distributed.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
        part = this_ranks_part(SHAPE, slot, expected[slot])
        distances[slot] = float((parameter.grad - part).norm() / part.norm())
    return logits.detach(), distances


@torch.no_grad()
def _with_cache(model: Any) -> Tensor:
    """Logits of the prompt in one pass, then of one token after another."""
    from megatron.core.inference.contexts import StaticInferenceContext

    from nemo_minitron.evaluate.throughput import step

    served: Any = SimpleNamespace(get_model_module_list=lambda: [model])
    context = StaticInferenceContext(*TOKENS.shape)
    context.materialize_only_last_token_logits = False
    passes = [TOKENS[:, :PROMPT], *TOKENS[:, PROMPT:].split(1, dim=1)]
    return torch.cat([step(served, part, context) for part in passes], dim=1)


BIASES = [{"qkv_bias": True}, {"qkv_bias": True, "proj_bias": True}, {"mlp_bias": True}]
BIASES += [{"qkv_bias": True, "proj_bias": True, "mlp_bias": True}]


def _parameters_of_biased() -> list[set[Slot]]:
    shapes = [SHAPE.replace(**biases) for biases in BIASES]
    return [set(slots_of(build(shape, 1, 1, False), shape)) for shape in shapes]


def test_a_layer_has_the_biases_that_are_named():
    """Megatron's config has one switch for all linear layers, and one for QKV."""
    (found,) = run_ranks(_parameters_of_biased, 1)
    for biases, slots in zip(BIASES, found, strict=True):
        assert slots == set(random_model(SHAPE.replace(**biases)).tensors), biases


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(_on_two_ranks, 2)


@pytest.fixture(scope="module")
def reference_logits():
    return _reference()[0]


# slow: on the Megatron-Core that NeMo needs, tests/nemo/test_grids.py trains these layers in every CI run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "logits_within", "gradients_within"), [("float32", 1e-5, 1e-4), ("bf16", 0.03, 0.1)]
)
@pytest.mark.parametrize("grid", GRIDS)
def test_logits_and_gradients_equal_transformers(
    two_ranks, reference_logits, grid, precision, logits_within, gradients_within
):
    results = [rank[grid, precision] for rank in two_ranks]
    logits = torch.cat([logits for logits, _ in results], dim=-1)
    assert (logits - reference_logits).norm() < logits_within * reference_logits.norm()
    for _, distances in results:
        assert len(distances) == 3 + 6 * SHAPE.num_layers
        assert {slot: far for slot, far in distances.items() if not far < gradients_within} == {}


@pytest.mark.slow
def test_a_model_held_whole_by_each_rank_equals_transformers(two_ranks, reference_logits):
    for rank in two_ranks:
        torch.testing.assert_close(rank["whole"].double(), reference_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_cache_gives_the_logits_of_one_pass(two_ranks, reference_logits):
    for rank in two_ranks:
        torch.testing.assert_close(rank["cache"].double(), reference_logits, rtol=1e-4, atol=1e-4)
