"""Losses without layers against transformers' model with the layers taken out, and the searches over them."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoint import HfReader
from nemo_minitron.importance import layer_loss
from nemo_minitron.importance.layer_loss import LayerLoss, Removed, contiguous, leave_one_out, search
from nemo_minitron.model import layout, next_token
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.synthetic import make_llama
from tests.canonical import random_model
from tests.importance.reference import answers, counted_loss
from tests.llamas import SHAPES

SHAPE = ModelShape(4, 24, 20, 6, 3, 8, 40, 48, max_position_embeddings=64)
TOKENS = torch.randint(0, 40, (3, 33), generator=torch.Generator().manual_seed(1))


class Table:
    """Losses by a formula: what the searches see of :class:`LayerLoss`."""

    def __init__(self, layers, cost):
        self.shape, self.cost, self.asked = SHAPE.replace(num_layers=layers), cost, []

    def __call__(self, sets):
        sets = list(sets)
        self.asked += sets
        return [self.cost(one) for one in sets]


@pytest.mark.parametrize("name", ["gqa", "tied", "head_dim", "llama3_rope", "biases"])
def test_loss_is_that_of_the_model_without_the_layers(name, tmp_path, monkeypatch):
    shape = SHAPES[name]
    folder = make_llama(tmp_path / "hf", shape)
    tokens = torch.randint(0, shape.vocab_size, (5, 40), generator=torch.Generator().manual_seed(5))
    sets = [Removed(c) for count in range(3) for c in itertools.combinations(range(shape.num_layers), count)]
    with HfReader(folder) as reader:
        found = LayerLoss(reader, tokens)(sets)
        monkeypatch.setattr(layer_loss, "STREAM_BYTES", 1)
        monkeypatch.setattr(next_token, "HEAD_BYTES", 5000)
        in_parts = LayerLoss(reader, tokens)(reversed(sets))
    np.testing.assert_allclose(in_parts[::-1], found, atol=1e-6)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
    layers = list(model.model.layers)
    for removed, loss in zip(sets, found, strict=True):
        model.model.layers = torch.nn.ModuleList(layers[at] for at in range(len(layers)) if at not in removed)
        logits = model(tokens, use_cache=False).logits
        wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert loss == pytest.approx(float(wanted), abs=2e-5), removed


def test_only_labels_that_count_are_lost(tmp_path, monkeypatch):
    shape = SHAPES["gqa"]
    folder = make_llama(tmp_path / "hf", shape)
    tokens = torch.randint(0, shape.vocab_size, (5, 40), generator=torch.Generator().manual_seed(5))
    counted, sets = answers(5, 40), [Removed(), Removed({1}), Removed({0, 2})]
    with HfReader(folder) as reader:
        found = LayerLoss(reader, tokens, counted=counted)(sets)
        monkeypatch.setattr(layer_loss, "STREAM_BYTES", 1)
        in_parts = LayerLoss(reader, tokens, counted=counted)(sets)
    np.testing.assert_allclose(in_parts, found, atol=1e-6)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
    layers = list(model.model.layers)
    for removed, loss in zip(sets, found, strict=True):
        model.model.layers = torch.nn.ModuleList(layers[at] for at in range(len(layers)) if at not in removed)
        wanted = counted_loss(model(tokens, use_cache=False).logits, tokens, counted) / counted[:, :-1].sum()
        assert loss == pytest.approx(float(wanted), abs=2e-5), removed


def test_stand_ins_are_fitted_to_weighted_tokens():
    """Of tokens without weight nothing is left, and those of one kind are followed where they weigh more."""
    model = as_float32(random_model(SHAPE))
    tokens = torch.randint(0, 40, (64, 33), generator=torch.Generator().manual_seed(2))
    weights = torch.ones(4, *tokens.shape)
    weights[:, 32:] = 0
    maps = [LayerLoss(model, tokens[:32], stand_ins=given, weights=w)._stand_ins[0][0]
            for given, w in ((tokens[:32], None), (tokens, weights), (tokens, None))]  # fmt: skip
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-4, atol=1e-5)
    assert float((maps[2] - maps[0]).abs().max()) > 1e-2


def test_sets_share_the_streams_of_the_layers_they_agree_on():
    model = as_float32(random_model(SHAPE))
    done = []
    losses = LayerLoss(model, TOKENS, progress=done.append)
    sets = [Removed(), Removed({1}), Removed({2})]
    first = losses(sets)
    once = model.shape.num_layers + model.shape.layers_of_head()
    assert sum(done) == 3 * once
    assert losses([*sets, Removed({1})]) == [*first, first[1]]
    assert sum(done) == 3 * once, "known losses are not measured again"
    LayerLoss(model, TOKENS[:1], stand_ins=TOKENS, progress=done.append)
    assert sum(done) == 3 * once + model.shape.num_layers, "fitting is a pass of its own"


def test_a_layer_that_does_nothing_needs_no_stand_in():
    model = as_float32(random_model(SHAPE))
    for row in (layout.PROJ_WEIGHT, layout.FC2_WEIGHT):
        model.tensors[row.key, 1].zero_()
    for stand_ins in (None, TOKENS):
        without, whole = LayerLoss(model, TOKENS, stand_ins=stand_ins)([Removed({1}), Removed()])
        assert without == whole


def test_stand_ins_recover_part_of_what_a_layer_did():
    model = as_float32(random_model(SHAPE))
    tokens = torch.randint(0, 40, (64, 33), generator=torch.Generator().manual_seed(2))
    stream_error = []
    for stand_ins in (None, tokens):
        losses = LayerLoss(model, tokens, stand_ins=stand_ins)
        x = losses._embed(tokens)
        layer = layer_loss.read_layer(model, 0)
        stream_error.append(float((losses._without(0, x) - layer.forward(x, losses._rotary)).square().mean()))
    assert stream_error[1] < 0.9 * stream_error[0]


def test_a_stand_in_says_what_is_constant_where_a_bias_can():
    model = as_float32(random_model(SHAPE.replace(mlp_bias=True)))
    for row in (layout.PROJ_WEIGHT, layout.FC2_WEIGHT):
        model.tensors[row.key, 1].zero_()
    model.tensors[layout.FC2_BIAS.key, 1].copy_(torch.linspace(-3, 3, SHAPE.hidden_size))
    losses = LayerLoss(model, TOKENS, stand_ins=TOKENS.repeat(100, 1))
    without, whole = losses([Removed({1}), Removed()])
    passed_by = LayerLoss(model, TOKENS)([Removed({1})])[0]
    assert abs(without - whole) < 0.1 * abs(passed_by - whole)


def test_leave_one_out_and_contiguous():
    worth = [5.0, 1.0, 4.0, 2.0, 2.0, 9.0]
    table = Table(6, lambda removed: sum(worth[layer] for layer in removed))
    assert leave_one_out(table, 2)[0].removed == (1, 4)
    assert contiguous(table, 2)[0] == layer_loss.Step((3, 4), 4.0)
    assert contiguous(table, 6)[0].removed == (0, 1, 2, 3, 4, 5)


def test_greedy_sees_what_leave_one_out_cannot():
    """Layers 1 and 2 do the same: either can go, not both."""
    worth = [5.0, 1.0, 1.1, 2.0, 7.0]
    table = Table(5, lambda removed: sum(worth[layer] for layer in removed) + 10.0 * ({1, 2} <= removed))
    assert leave_one_out(table, 2)[0].removed == (1, 2)
    steps = search(table, 3)
    assert [step.removed for step in steps] == [(1,), (1, 3), (0, 1, 3)]


def test_a_beam_finds_the_pair_that_greed_misses():
    def cost(removed):
        return 0.5 if removed == {2, 3} else sum((1.0, 3.0, 1.5, 4.0)[layer] for layer in removed)

    assert search(Table(4, cost), 2)[-1].removed == (0, 2)
    assert search(Table(4, cost), 2, beam=2)[-1] == layer_loss.Step((2, 3), 0.5)


def test_later_rounds_try_the_cheapest_layers_of_the_round_before(monkeypatch):
    monkeypatch.setattr(layer_loss, "TRIED", 3)
    table = Table(8, lambda removed: float(sum(removed)))
    assert [step.removed for step in search(table, 5)][-1] == (0, 1, 2, 3, 4)
    assert [len(one) for one in table.asked] == [1] * 8 + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 3


def as_float32(model):
    model.tensors = {slot: tensor.float() for slot, tensor in model.tensors.items()}
    return model
