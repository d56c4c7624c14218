"""Rewriting canonical tensors, judged by transformers' LlamaForCausalLM in float64 before and after."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemo_minitron.errors import MinitronError
from nemo_minitron.model import layout
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.choose import make_plan
from nemo_minitron.prune.cut import prune_checkpoint, rewrite
from nemo_minitron.prune.plan import Plan
from tests.canonical import FINGERPRINT, Memory, logits, random_model, slots

SHAPE = ModelShape(3, 24, 20, 6, 3, 8, 40, 48, max_position_embeddings=64)
BIASES = {"qkv_bias": True, "proj_bias": True, "mlp_bias": True}
R, D = SHAPE.heads_per_group, SHAPE.kv_channels


def scores_with(**arrays):
    """Scores that put the given units last."""
    rng = np.random.default_rng(3)
    full = {
        "ffn": 1 + rng.random((3, SHAPE.ffn_hidden_size)),
        "heads": 1 + rng.random((3, SHAPE.num_attention_heads)),
        "groups": 1 + rng.random((3, SHAPE.num_query_groups)),
        "hidden": 1 + rng.random(SHAPE.hidden_size),
    }
    for name, worthless in arrays.items():
        if name == "hidden":
            full[name][worthless] = 0
        else:
            for layer, units in enumerate(worthless):
                full[name][layer, units] = 0
    return SimpleNamespace(**full)


def apply(model, plan):
    writer = Memory(plan.target)
    prune_checkpoint(model, plan, writer)
    return writer


def plan_for(target, scores=None, shape=SHAPE, **options):
    return make_plan(shape, scores, target, source_fingerprint=FINGERPRINT, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"share_embeddings_and_output_weights": True}, {"qkv_bias": True}, BIASES])
def test_identity_is_bit_identical(dtype, changes):
    shape = SHAPE.replace(**changes)
    model = random_model(shape)
    model.tensors = {slot: tensor.to(dtype) for slot, tensor in model.tensors.items()}
    out = apply(model, Plan.identity(shape, FINGERPRINT))
    assert out.tensors.keys() == model.tensors.keys()
    for slot, tensor in out.tensors.items():
        assert tensor.dtype == dtype and torch.equal(tensor, model.tensors[slot])


@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "biases"])
def test_zeroed_neurons_leave_logits(changes):
    model, dead = random_model(SHAPE.replace(**changes)), [[0, 3, 19], [1, 2, 4], [17, 18, 5]]
    for layer, units in enumerate(dead):
        model.tensors[layout.FC2_WEIGHT.key, layer][:, units] = 0
    out = apply(model, plan_for({"ffn_hidden_size": 17}, scores_with(ffn=dead), shape=model.shape))
    torch.testing.assert_close(logits(out), logits(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "biases"])
def test_zeroed_heads_leave_logits(changes):
    model, dead = random_model(SHAPE.replace(**changes)), [[0, 2, 5], [1, 3, 4], [0, 3, 5]]  # one of each group
    for layer, units in enumerate(dead):
        columns = model.tensors[layout.PROJ_WEIGHT.key, layer].view(24, 6, D)
        columns[:, units] = 0
    out = apply(model, plan_for({"num_attention_heads": 3}, scores_with(heads=dead), shape=model.shape))
    assert out.shape.num_query_groups == 3 and out.shape.heads_per_group == 1
    torch.testing.assert_close(logits(out), logits(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "biases"])
def test_zeroed_groups_leave_logits(changes):
    model, dead = random_model(SHAPE.replace(**changes)), [[0], [2], [1]]
    for layer, units in enumerate(dead):
        model.tensors[layout.PROJ_WEIGHT.key, layer].view(24, 3, R * D)[:, units] = 0
    out = apply(model, plan_for({"num_query_groups": 2}, scores_with(groups=dead), shape=model.shape))
    assert (out.shape.num_attention_heads, out.shape.num_query_groups) == (4, 2)
    torch.testing.assert_close(logits(out), logits(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "biases"])
def test_zeroed_hidden_channels_leave_logits_only_after_the_norm_rescale(changes):
    """Dropping zero channels raises the mean square by H/H'; norm gains times sqrt(H/H') undo it as eps goes to 0."""
    model, dead = random_model(SHAPE.replace(**changes)), [0, 7, 8, 23]
    for parameter, layer in slots(model.shape):
        tensor = model.tensors[parameter.key, layer]
        if parameter in (layout.EMBEDDING, layout.OUTPUT):
            tensor[:, dead] = 0
        elif parameter in (layout.PROJ_WEIGHT, layout.PROJ_BIAS, layout.FC2_WEIGHT, layout.FC2_BIAS):
            tensor[dead] = 0
    plain = apply(model, plan_for({"hidden_size": 20}, scores_with(hidden=dead), shape=model.shape))
    before = logits(model, eps=1e-14)
    assert (logits(plain, eps=1e-14) - before).abs().max() > 1e-2  # the published method does not rescale
    for parameter, layer in slots(plain.shape):
        if parameter in (layout.QKV_NORM, layout.FC1_NORM, layout.FINAL_NORM):
            plain.tensors[parameter.key, layer] = plain.tensors[parameter.key, layer] * math.sqrt(24 / 20)
    torch.testing.assert_close(logits(plain, eps=1e-14), before, rtol=0, atol=1e-9)


def test_dropped_layers_leave_the_others():
    model = random_model(SHAPE)
    for key in (layout.PROJ_WEIGHT.key, layout.FC2_WEIGHT.key):
        model.tensors[key, 2].zero_()  # a layer that adds nothing; the last one, which NeMo's script cannot drop
    out = apply(model, plan_for({}, drop_layers=[3]))
    torch.testing.assert_close(logits(out), logits(model), rtol=0, atol=1e-12)
    out = apply(model, plan_for({}, drop_layers=[2]))
    assert torch.equal(out.tensors[layout.FC1_WEIGHT.key, 1], model.tensors[layout.FC1_WEIGHT.key, 2])


def permuted(model, seed=1):
    """The same function with units in another order: neurons, heads in their group, groups, hidden channels."""
    rng = np.random.default_rng(seed)
    hidden = torch.from_numpy(rng.permutation(24))
    out = Memory(SHAPE)
    for layer in (None, *range(3)):
        neurons = torch.from_numpy(rng.permutation(20))
        heads = np.concatenate([R * g + rng.permutation(R) for g in rng.permutation(3)])
        cells = []
        for row in heads.reshape(3, R):
            first = row[0] // R * (R + 2)
            cells += [*(first + row % R), first + R, first + R + 1]
        order = {
            layout.HIDDEN: hidden,
            layout.FFN: neurons,
            layout.GATE_UP: torch.cat((neurons, neurons + 20)),
            layout.PROJ: (torch.from_numpy(heads)[:, None] * D + torch.arange(D)).flatten(),
            layout.QKV: (torch.tensor(cells)[:, None] * D + torch.arange(D)).flatten(),
        }
        for parameter, at in slots(SHAPE):
            if at == layer:
                tensor = model.tensors[parameter.key, at]
                for dim, axis in enumerate(parameter.axes):
                    tensor = tensor if axis == layout.VOCAB else tensor.index_select(dim, order[axis])
                out.tensors[parameter.key, at] = tensor
    return out


def test_pruning_commutes_with_permutation():
    """A permuted model has the same logits, and what is pruned away does not depend on where it stood."""
    model = random_model(SHAPE)
    dead_neurons, dead_groups = [[0, 3], [1, 2], [17, 5]], [[0], [2], [1]]
    for layer in range(3):
        model.tensors[layout.FC2_WEIGHT.key, layer][:, dead_neurons[layer]] = 0
        model.tensors[layout.PROJ_WEIGHT.key, layer].view(24, 3, R * D)[:, dead_groups[layer]] = 0
    mixed = permuted(model)
    torch.testing.assert_close(logits(mixed), logits(model), rtol=0, atol=1e-12)
    norms = SimpleNamespace(
        ffn=np.stack([mixed.tensors[layout.FC2_WEIGHT.key, i].norm(dim=0).numpy() for i in range(3)]),
        groups=np.stack([mixed.tensors[layout.PROJ_WEIGHT.key, i].view(24, 3, -1).norm(dim=(0, 2)) for i in range(3)]),
    )
    out = apply(mixed, plan_for({"ffn_hidden_size": 18, "num_query_groups": 2}, norms))
    torch.testing.assert_close(logits(out), logits(model), rtol=0, atol=1e-12)


def test_all_axes_at_once_have_the_planned_sizes():
    target = {"hidden_size": 20, "ffn_hidden_size": 10, "num_attention_heads": 2, "num_query_groups": 2}
    plan = plan_for(target, scores_with(), drop_layers=[1])
    out = apply(random_model(SHAPE), plan)  # Memory.write checks every size against the target shape
    assert out.tensors.keys() == {(parameter.key, layer) for parameter, layer in slots(plan.target)}
    assert logits(out).isfinite().all()


def test_a_layer_that_is_not_kept_has_no_part():
    model, plan = random_model(SHAPE), plan_for({"ffn_hidden_size": 10}, scores_with(), drop_layers=[1])
    with pytest.raises(MinitronError, match="layer 0 is not kept; kept layers: 1-2"):
        rewrite(plan, layout.FC2_WEIGHT, 0, model.tensors[layout.FC2_WEIGHT.key, 0])


def test_bad_input_is_named_and_nothing_is_written():
    model, plan = random_model(SHAPE), Plan.identity(SHAPE, FINGERPRINT)
    with pytest.raises(MinitronError, match=r"linear_fc2.weight: expected size \[24, 20\], found \[20, 24\]"):
        rewrite(plan, layout.FC2_WEIGHT, 0, torch.zeros(20, 24))
    writer = Memory(SHAPE)
    with pytest.raises(MinitronError, match="made for weights gggg"):
        prune_checkpoint(model, Plan.identity(SHAPE, "g" * 64), writer)
    with pytest.raises(MinitronError, match="num_layers=2"):
        prune_checkpoint(model, Plan.identity(SHAPE.replace(num_layers=2), FINGERPRINT), writer)
    assert not writer.tensors
    model.tensors[layout.PROJ_WEIGHT.key, 1][2, 2] = math.nan
    with pytest.raises(MinitronError, match=r"decoder.layers.1.self_attention.linear_proj.weight: holds NaN"):
        prune_checkpoint(model, plan, writer)
