"""Collection on real Megatron-Core models, judged by dense definitions on transformers; every grid alike."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nemo_minitron.errors import MinitronError
from nemo_minitron.importance.collect import collect
from nemo_minitron.importance.reductions import HOW, Aggregation
from nemo_minitron.importance.scores_format import axis_sizes, statistic_sizes
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.choose import make_plan
from tests.canonical import random_model
from tests.importance.megatron import scores_on_grid
from tests.importance.reference import answers, dense_scores
from tests.ranks import run_ranks

SHAPE = ModelShape(4, 24, 20, 8, 4, 8, 64, 64, max_position_embeddings=64)
TOKENS = torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(6, 16, dtype=torch.bool)
ANSWERS = answers(6, 16)
MASK[1, :5] = MASK[2, 11:] = MASK[4] = False  # left padding, right padding, nothing but padding


@pytest.fixture(scope="module")
def one_process():
    """Results of several settings, from one process that builds the model each time."""
    return run_ranks(_settings, 1)[0]


def _settings():
    default = Aggregation()
    results = {
        "plain": scores_on_grid(SHAPE, TOKENS, None, 2, (1, 1, False), default),
        "other batches": scores_on_grid(SHAPE, TOKENS.flip(0), None, 3, (1, 1, False), default),
        "masked": scores_on_grid(SHAPE, TOKENS, MASK, 2, (1, 1, False), default),
        "answers": scores_on_grid(SHAPE, TOKENS, ANSWERS, 2, (1, 1, False), default),
        "no tokens": _message(lambda: scores_on_grid(SHAPE, TOKENS, MASK & False, 2, (1, 1, False), default)),
        "no batch": _message(lambda: scores_on_grid(SHAPE, TOKENS[:0], None, 2, (1, 1, False), default)),
    }
    for sequence in HOW:
        for batch in HOW:
            how = Aggregation(sequence, batch)
            results[sequence, batch] = scores_on_grid(SHAPE, TOKENS, MASK, 2, (1, 1, False), how)
    results["units"] = scores_on_grid(SHAPE, TOKENS, MASK, 2, (1, 1, False), Aggregation(unit="mean"))
    return results


def _message(call):
    try:
        return call()
    except MinitronError as error:
        return str(error)


def check(result, expected, rtol=2e-4):
    arrays, _ = result
    assert {name: array.shape for name, array in arrays.items()} == axis_sizes(SHAPE) | statistic_sizes(SHAPE)
    for name, array in arrays.items():
        np.testing.assert_allclose(array, expected[name], rtol=rtol, atol=1e-6, err_msg=name)


def test_definitions(one_process):
    check(one_process["plain"], dense_scores(random_model(SHAPE), TOKENS, None))
    assert one_process["plain"][1] == {"samples": 6, "tokens": 96}


def test_padding_does_not_count(one_process):
    check(one_process["masked"], dense_scores(random_model(SHAPE), TOKENS, MASK))
    assert one_process["masked"][1] == {"samples": 5, "tokens": int(MASK.sum())}


def test_positions_between_others_count_alone(one_process):
    check(one_process["answers"], dense_scores(random_model(SHAPE), TOKENS, ANSWERS))
    assert one_process["answers"][1] == {"samples": 6, "tokens": int(ANSWERS.sum())}


@pytest.mark.parametrize("batch", HOW)
@pytest.mark.parametrize("sequence", HOW)
def test_aggregations(one_process, sequence, batch):
    check(one_process[sequence, batch], dense_scores(random_model(SHAPE), TOKENS, MASK, sequence, batch), rtol=1e-3)


def test_heads_and_groups_by_the_mean_of_their_channels(one_process):
    check(one_process["units"], dense_scores(random_model(SHAPE), TOKENS, MASK, unit="mean"))


def test_order_and_split_into_micro_batches_do_not_matter(one_process):
    check(one_process["other batches"], one_process["plain"][0], rtol=1e-6)


def test_nothing_to_calibrate_on_is_an_error(one_process):
    assert "no token" in one_process["no tokens"]
    assert "no batch" in one_process["no batch"]


GRIDS = {"tp2": (2, 1, False), "tp2sp": (2, 1, True), "pp2": (1, 2, False), "dp2": (1, 1, False)}


@pytest.fixture(scope="module")
def two_processes():
    return run_ranks(_grids, 2)


def _grids():
    results = {}
    for name, grid in GRIDS.items():
        results[name] = scores_on_grid(SHAPE, TOKENS, MASK, 2, grid, Aggregation())
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return results


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_gives_the_same_scores(one_process, two_processes, grid):
    results = [rank[grid] for rank in two_processes]
    check(results[0], one_process["masked"][0], rtol=1e-5)
    assert results[0][1] == one_process["masked"][1]
    for name, array in results[0][0].items():
        assert np.array_equal(array, results[1][0][name]), f"ranks disagree on {name}"


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_gives_the_same_plan_byte_for_byte(one_process, two_processes, grid):
    target = {
        "hidden_size": 16,
        "ffn_hidden_size": 12,
        "num_attention_heads": 3,
        "num_query_groups": 3,
        "num_layers": 3,
    }
    one, two = (
        make_plan(SHAPE, SimpleNamespace(**arrays), target, source_fingerprint="f").to_yaml()
        for arrays in (one_process["masked"][0], two_processes[0][grid][0])
    )
    assert one == two


@pytest.mark.slow
def test_four_ranks(one_process):
    results = run_ranks(scores_on_grid, 4, SHAPE, TOKENS, MASK, 2, (2, 2, True), Aggregation())
    check(results[3], one_process["masked"][0], rtol=1e-5)


class Fused(nn.Linear):
    """A linear that normalises its input itself, as Transformer Engine's does."""

    def __init__(self, inputs, outputs, eps=1e-5):
        super().__init__(inputs, outputs, bias=False)
        self.layer_norm_weight = nn.Parameter(1 + 0.1 * torch.randn(inputs))
        self.eps = eps

    def forward(self, x):
        return super().forward(nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps))


class FusedLayer(nn.Module):
    """A layer with a Transformer-Engine layer's module names; its attention is a plain mixing of heads."""

    def __init__(self, number, shape):
        super().__init__()
        width = shape.proj_columns
        self.layer_number = number
        self.input_layernorm, self.pre_mlp_layernorm = nn.Identity(), nn.Identity()
        self.self_attention = nn.Module()
        self.self_attention.linear_qkv = Fused(shape.hidden_size, width)
        self.self_attention.linear_proj = nn.Linear(width, shape.hidden_size, bias=False)
        self.mlp = nn.Module()
        self.mlp.linear_fc1 = Fused(shape.hidden_size, shape.ffn_hidden_size)
        self.mlp.linear_fc2 = nn.Linear(shape.ffn_hidden_size, shape.hidden_size, bias=False)

    def forward(self, hidden_states):
        x = hidden_states + self.self_attention.linear_proj(self.self_attention.linear_qkv(hidden_states).tanh())
        return x + self.mlp.linear_fc2(self.mlp.linear_fc1(x).relu()), None


class FusedModel(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(FusedLayer(i + 1, shape) for i in range(shape.num_layers))
        self.decoder.final_layernorm = nn.RMSNorm(shape.hidden_size, eps=1e-5)
        self.decoder.forward = self.decode

    def decode(self, x):
        for layer in self.decoder.layers:
            x, _ = layer(hidden_states=x)
        return self.decoder.final_layernorm(x)

    def forward(self, input_ids, position_ids, attention_mask):
        return self.decoder(self.embedding(input_ids).transpose(0, 1))


def test_fused_norms_are_computed_from_their_linear():
    torch.manual_seed(0)
    model = FusedModel(SHAPE)
    arrays, _ = collect(model, [TOKENS[:2], TOKENS[2:]], SHAPE)
    with torch.no_grad():
        x = model.embedding(TOKENS)
        linear = model.decoder.layers[0].self_attention.linear_qkv
        first = (
            nn.functional.rms_norm(x, x.shape[-1:], linear.layer_norm_weight, 1e-5).abs().mean(1).square().sum(0).sqrt()
        )
    np.testing.assert_allclose(arrays["hidden_norms"][0], first.numpy(), rtol=1e-5)
    assert (arrays["hidden_norms"] > 0).all()


def test_hooks_are_removed_after_a_failure():
    model = FusedModel(SHAPE)

    def fail(tokens):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        collect(model, [TOKENS], SHAPE, forward=fail)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training


@pytest.mark.parametrize("part", ["input_layernorm", "mlp"])
def test_a_model_without_the_modules_is_refused(part):
    model = FusedModel(SHAPE)
    if part == "mlp":
        del model.decoder.layers[2].mlp
    else:
        model.decoder.layers[2].self_attention.linear_qkv = nn.Linear(24, 64)
    with pytest.raises(MinitronError, match="Llama-type Megatron-Core"):
        collect(model, [TOKENS], SHAPE)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
