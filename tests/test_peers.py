"""Peers of ``benchmarks/peers.py`` on small random models, beside transformers' own passes and dense algebra."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import peers

WHEEL = Path(os.environ.get("FMCHISEL", "fmchisel-0.1.2-py3-none-any.whl"))
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif "layers" in name and parameter.dim() == 2:
                parameter.mul_(8)  # layers that change the stream
    return made


@pytest.fixture
def tokens():
    return torch.randint(96, (10, 40), generator=torch.Generator().manual_seed(1))


def seen(model, tokens, module):
    """Inputs and outputs of a module in one pass of the whole model, ``[n * s, C]``."""
    found = []
    hook = module.register_forward_hook(lambda module, args, output: found.append((args[0], output)))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return tuple((part[0] if isinstance(part, tuple) else part).flatten(0, 1) for part in found[0])


def strongest(module, hessians_dict, num_keep, update_iter, num_cin, percdamp):
    """A core that keeps the units of most moment and solves for their weights."""
    moment = hessians_dict.pop(module)
    of_units = moment.diagonal().view(num_cin, -1).sum(dim=1)
    kept = of_units.topk(num_keep).indices.sort().values
    columns = (kept[:, None] * (len(moment) // num_cin) + torch.arange(len(moment) // num_cin)).flatten()
    moment = moment + percdamp * moment.diagonal().mean() * torch.eye(len(moment))
    weight = torch.zeros_like(module.weight)
    inner = moment[columns[:, None], columns]
    weight[:, columns] = torch.linalg.solve(inner, moment[columns] @ module.weight.T).T
    return None, weight


def accumulated(x, module, moment, count):
    rows = x.flatten(0, 1)
    return moment + rows.T @ rows, count + len(x)


STAND_IN = SimpleNamespace(sparsify_weight=strongest, accumulate_hessian=accumulated)


def fmchisel():
    if not WHEEL.exists():
        pytest.skip("FMCHISEL names no wheel of fmchisel 0.1.2")
    return peers.osscar_core(WHEEL)


@pytest.mark.parametrize("core", [lambda: STAND_IN, fmchisel], ids=["stand-in", "fmchisel"])
@pytest.mark.parametrize(("neurons", "groups"), [(15, 0), (0, 1), (15, 1)])
def test_oscar_goes_layer_by_layer_on_the_students_stream(model, tokens, core, neurons, groups):
    core = core()
    sparse = peers.oscar(copy.deepcopy(model), tokens, neurons, groups, core)
    before = copy.deepcopy(model)
    for layer, ours in zip(before.model.layers, sparse.model.layers, strict=True):
        modules = []
        if groups:
            modules.append((layer.self_attn.o_proj, ours.self_attn.o_proj, 3, 3 - groups))
        if neurons:
            modules.append((layer.mlp.down_proj, ours.mlp.down_proj, 40, 40 - neurons))
        inputs = [seen(before, tokens, module)[0] for module, *_ in modules]  # before any of them is pruned
        moments = [x.T @ x for x in inputs]
        for (module, made, units, kept), moment in zip(modules, moments, strict=True):
            _, weight = core.sparsify_weight(
                module=module,
                hessians_dict={module: moment},
                num_keep=kept,
                update_iter=1,
                num_cin=units,
                percdamp=0.01,
            )
            assert (made.weight - weight).norm() < 1e-3 * weight.norm(), "the same units, the same weights"
            assert int((made.weight.view(32, units, -1).norm(dim=(0, 2)) > 0).sum()) == kept
            module.weight.data.copy_(made.weight)

    small = peers.packed(sparse, neurons, groups)
    assert small.config.intermediate_size == 40 - neurons
    assert (small.config.num_key_value_heads, small.config.num_attention_heads) == (3 - groups, 6 - 2 * groups)
    with torch.no_grad():
        torch.testing.assert_close(small(tokens).logits, sparse(tokens).logits, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in sparse.parameters())


def test_transform_is_least_squares_and_is_folded(model, tokens):
    first, count = 2, 1
    mlp = seen(model, tokens, model.model.layers[first - 1].mlp)[1].double()
    entering = seen(model, tokens, model.model.layers[first])[0].double()
    behind = seen(model, tokens, model.model.layers[first + count - 1])[1].double()
    expected = torch.linalg.lstsq(mlp, behind - (entering - mlp)).solution
    found = peers.transform(model, tokens, first, count)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def apply(module, args, output):
        return (output.double() @ expected).float()

    explicit = copy.deepcopy(model)
    explicit.model.layers[first - 1].mlp.register_forward_hook(apply)
    del explicit.model.layers[first : first + count]
    explicit.config.num_hidden_layers -= count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "nearest_block", lambda *given: first)
        folded = peers.replaceme(copy.deepcopy(model), tokens, count)
    assert folded.config.num_hidden_layers == len(folded.model.layers) == 3
    with torch.no_grad():
        torch.testing.assert_close(
            folded(tokens, use_cache=False).logits, explicit(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("count", [1, 2])
def test_nearest_block_is_the_one_that_turns_the_stream_least(model, tokens, count):
    streams = [seen(model, tokens, model.model.layers[0])[0]]
    streams += [seen(model, tokens, layer)[1] for layer in model.model.layers]
    near = [
        float(torch.cosine_similarity(streams[first], streams[first + count], dim=-1).mean())
        for first in range(1, 5 - count)
    ]
    assert peers.nearest_block(model, tokens, count) == 1 + near.index(max(near))


def test_the_very_first_layer_stays(model, tokens):
    with torch.no_grad():
        for part in (model.model.layers[0].mlp.down_proj, model.model.layers[0].self_attn.o_proj):
            part.weight.zero_()  # it does nothing, but nothing is before it that could stand in
    assert peers.nearest_block(model, tokens, 1) >= 1


def test_targets_that_a_peer_does_not_do():
    for method, target in (("oscar", {"ffn_hidden_size": 8, "hidden_size": 8}), ("replaceme", {"num_query_groups": 1})):
        with pytest.raises(peers.CannotPrune, match=sorted(target)[-1]):
            peers.check(method, target)
    peers.check("oscar", {"ffn_hidden_size": 8, "num_query_groups": 1})
    peers.check("replaceme", {"num_layers": 2})
    peers.check("ours", {"hidden_size": 8})


def test_a_wheel_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match="expected --fmchisel WHEEL"):
        peers.osscar_core(tmp_path / "none.whl")
