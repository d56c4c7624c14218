"""Streamed backward pass and its moments against autograd through a whole transformers model."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoint import HfReader
from nemo_minitron.importance.reconstruction import clipped, measure
from nemo_minitron.registry import METRICS
from nemo_minitron.synthetic import make_llama
from tests.llamas import SHAPES


def reconstruct(reader, tokens):
    """The ranking by reconstruction, and what compensation needs."""
    rankings, compensation = measure(reader, tokens, {"reconstruction": METRICS.get("reconstruction")})
    return rankings["reconstruction"], compensation


@pytest.mark.parametrize("name", ["gqa", "tied", "head_dim", "llama3_rope", "biases"])
def test_sensitivity_is_the_gradient_of_the_loss(name, tmp_path):
    folder = make_llama(tmp_path / "hf", SHAPES[name])
    tokens = torch.randint(0, SHAPES[name].vocab_size, (3, 40), generator=torch.Generator().manual_seed(5))
    with HfReader(folder) as reader:
        ranking, found = reconstruct(reader, tokens)
        shape, sensitivity = reader.shape, found.sensitivity
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
    streams = []

    def layer_output(module, args, output):  # a tuple before transformers 4.54
        streams.append(output if torch.is_tensor(output) else output[0])

    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
        layer.register_forward_hook(layer_output)
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    expected = torch.stack([g.norm(dim=-1) for g in torch.autograd.grad(loss, streams)])
    assert sensitivity.shape == (2 * shape.num_layers, 3, 40)
    np.testing.assert_allclose(sensitivity, expected.numpy(), rtol=1e-3, atol=1e-6)
    relative = [(x / x.square().mean(-1, keepdim=True).sqrt()).detach().flatten(0, 1).double() for x in streams]
    embeddings = model.model.embed_tokens.weight.detach()[tokens].flatten(0, 1).double()
    embeddings = embeddings / embeddings.square().mean(-1, keepdim=True).sqrt()
    moment = sum(x.T @ x for x in relative) + 0.3 * len(relative) * embeddings.T @ embeddings
    np.testing.assert_allclose(found.stream_moment, moment.numpy(), rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(ranking["hidden"], found.stream_moment.diagonal())
    for unit, count in (("ffn", shape.ffn_hidden_size), ("heads", 8), ("groups", shape.num_query_groups)):
        assert np.array_equal(np.sort(ranking[unit], axis=1), np.tile(np.arange(count), (3, 1)))


def test_neurons_that_do_nothing_and_copies_go_first(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_llama(tmp_path / "hf", SHAPES["gqa"])
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp."
        tensors[prefix + "down_proj.weight"][:, [3, 50]] = 0
        for name in ("gate_proj", "up_proj"):  # 7 repeats 8
            tensors[f"{prefix}{name}.weight"][7] = tensors[f"{prefix}{name}.weight"][8]
    save_file(tensors, file, metadata={"format": "pt"})
    tokens = torch.randint(0, 300, (8, 64), generator=torch.Generator().manual_seed(5))
    with HfReader(folder) as reader:
        ranking, _ = reconstruct(reader, tokens)
    for worth in ranking["ffn"]:
        assert {3, 50} == set(np.argsort(worth)[:2])
        assert min(worth[7], worth[8]) < 20  # of 96: one of the two can be spared, at the ridge's price


def test_a_neuron_that_always_says_the_same_goes_first_where_a_bias_can_say_it(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_llama(tmp_path / "hf", SHAPES["mlp_bias"])
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer in range(3):
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.{layer}.mlp.{name}.weight"][11] = 0
            tensors[f"model.layers.{layer}.mlp.{name}.bias"][11] = 2.0
    save_file(tensors, file, metadata={"format": "pt"})
    tokens = torch.randint(0, 300, (8, 64), generator=torch.Generator().manual_seed(5))
    with HfReader(folder) as reader:
        ranking, _ = reconstruct(reader, tokens)
    assert [int(worth.argmin()) for worth in ranking["ffn"]] == [11, 11, 11]


def test_the_longest_gradients_are_cut():
    rng = np.random.default_rng(0)
    values = rng.random((2, 10, 1000)).astype(np.float32)
    values[1, 3, 7] = 1e6
    cut = clipped(values)
    assert cut.dtype == np.float32 and cut.max() < 1.01
    assert (cut == values).mean() > 0.998
