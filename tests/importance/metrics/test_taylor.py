"""Taylor importance of a streamed checkpoint against autograd through a whole transformers model, dense and float64."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoint import HfReader
from nemo_minitron.importance import walk
from nemo_minitron.importance.reconstruction import measure
from nemo_minitron.registry import METRICS
from nemo_minitron.synthetic import make_llama
from tests.importance.reference import answers, counted_loss
from tests.llamas import DTYPES, SHAPES
from tests.ranks import run_ranks

SAMPLES, LENGTH = 5, 24


def tokens_of(shape):
    return torch.randint(0, shape.vocab_size, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(5))


def taylor(folder, tokens, group=None, counted=None):
    metrics = {"taylor": METRICS.get("taylor")}
    with HfReader(folder) as reader:
        rankings, compensation = measure(reader, tokens, metrics, counted=counted, group=group)
    assert compensation is None
    return rankings["taylor"]


def dense(folder, tokens, shape, counted=None):
    """|w dL/dw| of every weight by transformers' names, added up unit by unit."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()
    for module in [model.model, *model.model.layers]:  # transformers' own norm rounds to float32
        for name, norm in list(module.named_children()):
            if name.endswith("norm"):
                exact = torch.nn.RMSNorm(shape.hidden_size, eps=shape.layernorm_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(module, name, exact)
    count = tokens[:, 1:].numel() if counted is None else int(counted[:, :-1].sum())
    (counted_loss(model(tokens).logits, tokens, counted) / count).backward()
    sizes = {name: (weight * weight.grad).abs().detach() for name, weight in model.named_parameters()}
    assert ("lm_head.weight" in sizes) != shape.share_embeddings_and_output_weights
    d, r = shape.kv_channels, shape.heads_per_group
    found = {"ffn": [], "heads": [], "groups": [], "hidden": torch.zeros(shape.hidden_size, dtype=torch.float64)}
    for name, size in sizes.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            found["hidden"] += size.sum(dim=1)
        elif name.endswith(("o_proj.bias", "down_proj.bias")):
            found["hidden"] += size
        elif not name.endswith(".bias"):
            found["hidden"] += size if size.dim() == 1 else size.sum(dim=0)
    for layer in range(shape.num_layers):
        part = {name.split(f".{layer}.")[1]: size for name, size in sizes.items() if f".layers.{layer}." in name}
        neurons = part["mlp.gate_proj.weight"].sum(1) + part["mlp.up_proj.weight"].sum(1)
        neurons = neurons + part.get("mlp.gate_proj.bias", 0) + part.get("mlp.up_proj.bias", 0)
        found["ffn"].append(neurons + part["mlp.down_proj.weight"].sum(0))
        rows = {name: part[f"self_attn.{name}_proj.weight"].sum(1) for name in "qkv"}
        for name in rows:
            rows[name] = rows[name] + part.get(f"self_attn.{name}_proj.bias", 0)
        queries, keys, values = (rows[name].view(-1, d).sum(1) for name in "qkv")
        heads = queries + part["self_attn.o_proj.weight"].sum(0).view(-1, d).sum(1)
        found["heads"].append(heads)
        found["groups"].append(heads.view(-1, r).sum(1) + keys + values)
    return {axis: (worth if axis == "hidden" else torch.stack(worth)).numpy() for axis, worth in found.items()}


@pytest.mark.parametrize("name", ["mha", "gqa", "tied", "head_dim", "llama3_rope", "bf16", "qkv_bias", "biases"])
def test_worth_is_that_of_dense_autograd(name, tmp_path, monkeypatch):
    shape = SHAPES[name]
    folder = make_llama(tmp_path / "hf", shape, dtype=DTYPES[name])
    tokens = tokens_of(shape)
    monkeypatch.setattr(walk, "TABLE_BYTES", 8 * shape.hidden_size * 100)  # tables come in four parts
    found, expected = taylor(folder, tokens), dense(folder, tokens, shape)
    assert found.keys() == expected.keys()
    for axis, worth in expected.items():
        assert worth.min() > 0
        np.testing.assert_allclose(found[axis], worth, rtol=2e-4, err_msg=axis)


@pytest.mark.parametrize("name", ["gqa", "tied"])
def test_worth_is_that_of_the_loss_of_tokens_that_count(name, tmp_path, monkeypatch):
    shape = SHAPES[name]
    folder = make_llama(tmp_path / "hf", shape)
    tokens, counted = tokens_of(shape), answers(SAMPLES, LENGTH)
    monkeypatch.setattr(walk, "TABLE_BYTES", 8 * shape.hidden_size * 100)
    found, expected = taylor(folder, tokens, counted=counted), dense(folder, tokens, shape, counted)
    for axis, worth in expected.items():
        np.testing.assert_allclose(found[axis], worth, rtol=2e-4, err_msg=axis)


def share(folder, world, counted):
    tokens, mine = tokens_of(SHAPES["gqa"]), slice(torch.distributed.get_rank(), None, world)
    some = None if counted is None else counted[mine]
    return taylor(folder, tokens[mine], torch.distributed.group.WORLD, some)


@pytest.mark.parametrize("counted", [None, answers(SAMPLES, LENGTH)], ids=["all", "some"])
def test_processes_that_share_the_samples_get_the_same(counted, tmp_path):
    folder = make_llama(tmp_path / "hf", SHAPES["gqa"])
    alone = taylor(folder, tokens_of(SHAPES["gqa"]), counted=counted)
    ranks = run_ranks(share, 2, folder, 2, counted)
    for axis, worth in alone.items():
        assert np.array_equal(ranks[0][axis], ranks[1][axis])
        np.testing.assert_allclose(ranks[0][axis], worth, rtol=1e-12)


def test_reconstruction_is_the_same_beside_it(tmp_path):
    folder = make_llama(tmp_path / "hf", SHAPES["tied"])
    tokens = tokens_of(SHAPES["tied"])
    metrics = {name: METRICS.get(name) for name in ("reconstruction", "taylor")}
    with HfReader(folder) as reader:
        both, more = measure(reader, tokens, metrics)
        alone, other = measure(reader, tokens, {"reconstruction": metrics["reconstruction"]})
    for axis, worth in alone["reconstruction"].items():
        assert np.array_equal(both["reconstruction"][axis], worth), axis
    assert np.array_equal(more.stream_moment, other.stream_moment)
    assert np.array_equal(more.sensitivity, other.sensitivity)
    for axis, worth in taylor(folder, tokens).items():
        assert np.array_equal(both["taylor"][axis], worth), axis
