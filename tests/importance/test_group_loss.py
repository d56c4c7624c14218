"""Losses without query groups against transformers' model in float64, ``o_proj`` solved anew densely there."""

import numpy as np
import pytest
import torch

from nemo_minitron.importance import group_loss
from nemo_minitron.importance.group_loss import GroupLoss, Groups, eliminate, passes
from nemo_minitron.importance.layer_loss import LayerLoss, Removed
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.moments import BIAS_TOKENS
from tests.canonical import Memory, random_model, to_transformers
from tests.importance.reference import answers, counted_loss
from tests.llamas import SHAPES

SHAPE = ModelShape(3, 24, 20, 6, 3, 8, 40, 48, max_position_embeddings=64)
RIDGE = 0.4


def in_float32(shape):
    model = random_model(shape)
    model.tensors = {slot: tensor.float() for slot, tensor in model.tensors.items()}
    return model


def drawn(shape, samples, length=24, seed=1):
    return torch.randint(0, shape.vocab_size, (samples, length), generator=torch.Generator().manual_seed(seed))


def weights_of(shape, tokens):
    return torch.rand(shape.num_layers, *tokens.shape, generator=torch.Generator().manual_seed(2)) ** 2


def solved(x, y, w, prior, bias):
    """``argmin sum_t w |W x + b - y|^2 + lam |W - prior|^2 + p |b - bias|^2`` by its normal equations, dense."""
    if bias is None:
        lam = RIDGE * (w[:, None] * x**2).sum(0).mean()
        return np.linalg.solve(
            x.T @ (w[:, None] * x) + lam * np.eye(x.shape[1]), x.T @ (w[:, None] * y) + lam * prior.T
        ).T, None
    pull = BIAS_TOKENS * w.sum() / len(w)
    total = w.sum() + pull
    mean = (w[:, None] * x).sum(0)
    lam = RIDGE * ((w[:, None] * x**2).sum(0) - mean**2 / total).mean()
    ones = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    left = ones.T @ (w[:, None] * ones) + np.diag([lam] * x.shape[1] + [pull])
    right = ones.T @ (w[:, None] * y) + np.concatenate([lam * prior.T, pull * bias[None]])
    found = np.linalg.solve(left, right).T
    return found[:, :-1], found[:, -1]


def dense(model):
    """Transformers' model, which has an output layer of its own."""
    table = model.tensors["embedding.word_embeddings.weight", None]
    return to_transformers(Memory(model.shape, {("output_layer.weight", None): table} | model.tensors))


def reference(model, tokens, fitted, weights, gone, counted=None):
    """Mean loss of transformers' model without each further group of each layer."""
    shape, found = model.shape, {}
    width = shape.heads_per_group * shape.kv_channels
    for number, removed in gone.items():
        seen = []
        whole = dense(model)
        proj = whole.model.layers[number].self_attn.o_proj
        hook = proj.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0].detach()))
        with torch.no_grad():
            whole(fitted)
        hook.remove()
        x = seen[0].flatten(0, 1).numpy()
        weight = proj.weight.detach().numpy()
        bias = proj.bias.detach().numpy() if shape.proj_bias else None
        y = x @ weight.T + (0 if bias is None else bias)
        for name in set(range(shape.num_query_groups)) - removed:
            kept = [c for c in range(shape.proj_columns) if c // width not in {*removed, name}]
            w = weights[number].flatten().double().numpy()
            new, offset = solved(x[:, kept], y, w, weight[:, kept], bias)
            changed = dense(model)
            target = changed.model.layers[number].self_attn.o_proj
            with torch.no_grad():
                target.weight.zero_()
                target.weight[:, kept] = torch.from_numpy(new)
                if offset is not None:
                    target.bias.copy_(torch.from_numpy(offset))
                loss = counted_loss(changed(tokens).logits[..., : shape.vocab_size], tokens, counted)
            labels = tokens[:, 1:].numel() if counted is None else int(counted[:, :-1].sum())
            found[number, name] = float(loss) / labels
    return found


@pytest.mark.parametrize("name", ["gqa", "tied", "head_dim", "biases", "attention_bias", "qkv_bias"])
def test_loss_is_that_of_the_model_without_the_group(name, monkeypatch):
    shape = SHAPES[name].replace(vocab_size=60, padded_vocab_size=64)
    model = in_float32(shape)
    tokens, fitted = drawn(shape, 3), drawn(shape, 8, seed=4)
    weights, gone = weights_of(shape, fitted), {0: Groups(), 2: Groups({1, 3})}
    found = GroupLoss(model, tokens, fitted, weights, ridge=RIDGE)(gone)
    wanted = reference(model, tokens, fitted, weights, gone)
    assert found.keys() == wanted.keys() and len(found) == 4 + 2
    np.testing.assert_allclose([found[one] for one in wanted], list(wanted.values()), atol=2e-5)
    assert np.ptp(list(found.values())) > 1e-3, "or this test could not tell"
    monkeypatch.setattr(group_loss, "STREAM_BYTES", 1)
    assert GroupLoss(model, tokens, fitted, weights, ridge=RIDGE)(gone) == found


def test_only_labels_that_count_are_lost():
    model, tokens, fitted = in_float32(SHAPE), drawn(SHAPE, 5, 40), drawn(SHAPE, 4, 40, seed=4)
    weights, counted, gone = weights_of(SHAPE, fitted), answers(5, 40), {1: Groups()}
    found = GroupLoss(model, tokens, fitted, weights, ridge=RIDGE, counted=counted)(gone)
    wanted = reference(model, tokens, fitted, weights, gone, counted)
    np.testing.assert_allclose([found[one] for one in wanted], list(wanted.values()), atol=2e-5)


def test_a_group_that_the_others_say_as_well_costs_nothing():
    """Keys, values and queries of group 2 are those of group 0, so that either stands in for the other."""
    model, fitted = in_float32(SHAPE), drawn(SHAPE, 64, 33, seed=4)
    cell = (SHAPE.heads_per_group + 2) * SHAPE.kv_channels
    qkv = model.tensors["decoder.layers.self_attention.linear_qkv.weight", 1]
    qkv[2 * cell :] = qkv[:cell]
    tokens, weights = drawn(SHAPE, 4, 33), torch.ones(3, *fitted.shape)
    found = GroupLoss(model, tokens, fitted, weights, ridge=1e-6)({1: Groups()})
    (whole,) = LayerLoss(model, tokens)([Removed()])
    assert found[1, 0] == pytest.approx(whole, abs=1e-4) and found[1, 2] == pytest.approx(whole, abs=1e-4)
    assert abs(found[1, 1] - whole) > 5e-3


class Table:
    """Losses by a formula: what elimination sees of :class:`GroupLoss`."""

    shape = SHAPE.replace(num_query_groups=3)

    def __init__(self, cost):
        self.cost = cost

    def __call__(self, gone):
        return {(at, name): self.cost(at, set(removed) | {name}) for at, removed in gone.items()
                for name in range(3) if name not in removed}  # fmt: skip


def test_groups_go_one_after_the_other_and_the_later_of_two_alike():
    worth = {0: (1.0, 2.0, 3.0), 2: (5.0, 4.0, 4.0)}
    table = Table(lambda at, removed: sum(worth[at][name] for name in removed))
    assert eliminate(table, [0, 2], 2).tolist() == [[0, 1, 2], [0, 0, 0], [2, 1, 0]]
    pair = Table(lambda at, removed: 10.0 * ({0, 1} <= removed) + sum(worth[0][name] for name in removed))
    assert eliminate(pair, [0], 2)[0].tolist() == [0, 2, 1], "1 is cheap alone, and dear once 0 is gone"


def test_all_of_the_work_is_told():
    """The output layer as so many layers as take its time."""
    done = []
    head = SHAPE.layers_of_head()
    model, fitted = in_float32(SHAPE), drawn(SHAPE, 2)
    losses = GroupLoss(model, drawn(SHAPE, 1), fitted, weights_of(SHAPE, fitted), ridge=RIDGE, progress=done.append)
    eliminate(losses, [0, 2], 2)
    assert sum(done) == passes(losses, [0, 2], 2) == 2 * 3 * 2 + (3 + 2) * (2 + 2 * head)
