"""Streamed backward pass and its moments against autograd through a whole transformers model."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoint import HfReader
from nemo_minitron.importance.echoes import echoed
from nemo_minitron.importance.reconstruction import clipped, measure
from nemo_minitron.moments import elimination_order, metric_root
from nemo_minitron.registry import METRICS
from nemo_minitron.synthetic import make_llama
from tests.importance.reference import answers, counted_loss
from tests.llamas import SHAPES
from tests.ranks import run_ranks


def reconstruct(reader, tokens, counted=None, echoes=None):
    """The ranking by reconstruction, and what compensation needs."""
    metrics = {"reconstruction": METRICS.get("reconstruction")}
    rankings, compensation = measure(reader, tokens, metrics, counted=counted, echoes=echoes)
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


def passed(folder, shape, tokens, counted):
    """What transformers computes in float64: streams, their gradients, inputs of o_proj and down_proj, weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()
    for module in [model.model, *model.model.layers]:  # transformers' own norm rounds to float32
        for name, norm in list(module.named_children()):
            if name.endswith("norm"):
                exact = torch.nn.RMSNorm(shape.hidden_size, eps=shape.layernorm_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(module, name, exact)
    streams, inputs = [], []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
        layer.register_forward_hook(lambda _, __, out: streams.append(out if torch.is_tensor(out) else out[0]))
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model(tokens)  # fills the lists
    loss = counted_loss(model.lm_head(model.model.norm(streams[-1])), tokens, counted)
    gradients = torch.autograd.grad(loss, streams)
    weights = [part.weight for layer in model.model.layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    return [x.detach() for x in streams], gradients, inputs, [weight.detach() for weight in weights]


def by_hand(stream, gradient, counted):
    """Weight of each token's error, one by one: by its stream, and by its share in the loss."""
    weights = torch.zeros(stream.shape[:2], dtype=torch.float64)
    squares = gradient.square().sum(-1)
    for sample in range(len(stream)):
        mean = squares[sample][counted[sample]].mean()
        for at in range(stream.shape[1]):
            share = 1.0 if counted[sample, at] else min(1.0, float(squares[sample, at] / mean))
            weights[sample, at] = share / stream[sample, at].square().mean()
    return weights


def test_prompts_weigh_what_the_answers_need_of_them(tmp_path):
    """Sensitivities, the stream's moment and ranks, by hand and in float64 from gradients of the answers' loss."""
    shape = SHAPES["gqa"]
    folder = make_llama(tmp_path / "hf", shape)
    tokens = torch.randint(0, shape.vocab_size, (8, 40), generator=torch.Generator().manual_seed(5))
    counted = answers(8, 40)
    with HfReader(folder) as reader:
        ranking, found = reconstruct(reader, tokens, counted)
        every, _ = reconstruct(reader, tokens)
    streams, gradients, inputs, linear = passed(folder, shape, tokens, counted)
    norms = torch.stack([gradient.norm(dim=-1) for gradient in gradients[1:]])
    np.testing.assert_allclose(found.sensitivity, norms.numpy(), rtol=1e-3, atol=1e-6)
    assert (found.sensitivity[-1][~counted.numpy()] == 0).all(), "nothing reads what leaves the last layer there"
    assert (found.sensitivity[0][~counted.numpy()] > 0).any(), "attention reads prompts"
    behind = counted.flip(1).long().cumsum(1).flip(1) == 0
    assert behind.any() and (found.sensitivity[:, behind.numpy()] == 0).all(), "nothing that counts comes after them"
    weights = [by_hand(x, g, counted) for x, g in zip(streams, gradients, strict=True)]
    moments = [torch.einsum("bt,bti,btj->ij", w, x, x) for w, x in zip(weights, streams, strict=True)]
    moment = sum(moments[1:]) + 0.3 * 2 * shape.num_layers * moments[0]
    np.testing.assert_allclose(found.stream_moment, moment.numpy(), rtol=1e-3, atol=1e-2)
    np.testing.assert_array_equal(ranking["hidden"], found.stream_moment.diagonal())
    for layer in range(shape.num_layers):
        for name, place, unit, ridge in (("heads", 0, shape.kv_channels, 0.4), ("ffn", 1, 1, 0.03)):
            at = 2 * layer + place
            x, metric = inputs[at], gradients[1 + at].flatten(0, 1)
            size = torch.einsum("bt,bti,btj->ij", weights[1 + at], x, x)
            output = metric_root(metric.T @ metric) @ linear[at]
            expected = elimination_order(size, output, ridge, unit=unit).numpy()
            off = np.abs(ranking[name][layer] - expected)
            assert off.mean() < 0.05, (name, layer, off)
            if name == "ffn":
                assert np.abs(every[name][layer] - expected).mean() > 1, "or this test could not tell"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["gqa", "biases"])
def test_echoes_rank_heads_and_groups_alone(name, masked, tmp_path):
    """By hand and in float64: moments of both, of the others' tokens for all else."""
    shape = SHAPES[name]
    folder = make_llama(tmp_path / "hf", shape)
    tokens = torch.randint(0, shape.vocab_size, (9, 40), generator=torch.Generator().manual_seed(5))
    counted = answers(6, 40) if masked else None
    echoes, _ = echoed(tokens[6:])
    with HfReader(folder) as reader:
        ranking, found = reconstruct(reader, tokens[:6], counted, echoes)
        without, alone = reconstruct(reader, tokens[:6], counted)
    for axis in ("ffn", "hidden"):
        assert np.array_equal(ranking[axis], without[axis]), axis
    assert np.array_equal(found.stream_moment, alone.stream_moment)
    assert np.array_equal(found.sensitivity, alone.sensitivity)
    both, every = torch.cat([tokens[:6], echoes]), torch.ones(9, 40, dtype=torch.bool)
    if masked:
        every[:6] = counted
    streams, gradients, inputs, linear = passed(folder, shape, both, every)
    changed = []
    for layer in range(shape.num_layers):
        at = 2 * layer
        x, stream, metric = inputs[at], streams[1 + at], gradients[1 + at].flatten(0, 1)
        weights = by_hand(stream, gradients[1 + at], every) if masked else 1 / stream.square().mean(-1)
        if name == "biases":  # around the mean: a bias takes up what is constant
            x = x - torch.einsum("bt,bti->i", weights, x) / weights.sum()
        size = torch.einsum("bt,bti,btj->ij", weights, x, x)
        output = metric_root(metric.T @ metric) @ linear[at]
        for axis, unit in (("heads", 1), ("groups", shape.heads_per_group)):
            expected = elimination_order(size, output, 0.4, unit=unit * shape.kv_channels).numpy()
            assert np.abs(ranking[axis][layer] - expected).mean() < 0.05, (axis, layer)
            changed.append(np.abs(without[axis][layer] - expected).max())
    assert max(changed) >= 1, "or this test could not tell"


def test_echoes_leave_other_metrics_alone(tmp_path):
    folder = make_llama(tmp_path / "hf", SHAPES["tied"])
    tokens = torch.randint(0, SHAPES["tied"].vocab_size, (5, 40), generator=torch.Generator().manual_seed(5))
    metrics = {name: METRICS.get(name) for name in ("reconstruction", "taylor")}
    with HfReader(folder) as reader:
        with_them, _ = measure(reader, tokens[:3], metrics, echoes=tokens[3:])
        without, _ = measure(reader, tokens[:3], metrics)
    for axis, worth in without["taylor"].items():
        assert np.array_equal(with_them["taylor"][axis], worth), axis


def test_all_positions_that_count_are_no_mask(tmp_path):
    folder = make_llama(tmp_path / "hf", SHAPES["gqa"])
    tokens = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(5))
    with HfReader(folder) as reader:
        ranking, found = reconstruct(reader, tokens)
        same, also = reconstruct(reader, tokens, torch.ones_like(tokens, dtype=torch.bool))
    for axis, worth in ranking.items():
        assert np.array_equal(worth, same[axis]), axis
    assert np.array_equal(found.stream_moment, also.stream_moment)
    assert np.array_equal(found.sensitivity, also.sensitivity)


def _shares(folder, tokens, counted, echoes):
    mine = slice(torch.distributed.get_rank(), None, 2)
    metrics = {name: METRICS.get(name) for name in ("reconstruction", "taylor")}
    shares = {"counted": counted[mine], "echoes": echoes[mine], "group": torch.distributed.group.WORLD}
    with HfReader(folder) as reader:
        return measure(reader, tokens[mine], metrics, **shares)


def test_processes_share_the_samples(tmp_path):
    folder = make_llama(tmp_path / "hf", SHAPES["gqa"])
    tokens = torch.randint(0, 300, (5, 40), generator=torch.Generator().manual_seed(5))
    counted, (echoes, _) = answers(5, 40), echoed(tokens[2:])
    with HfReader(folder) as reader:
        alone, found = reconstruct(reader, tokens, counted, echoes)
    for rank, (rankings, also) in enumerate(run_ranks(_shares, 2, folder, tokens, counted, echoes)):
        assert np.array_equal(also.stream_moment, found.stream_moment)
        assert np.array_equal(also.sensitivity, found.sensitivity[:, rank::2])
        for axis, worth in alone.items():
            assert np.array_equal(rankings["reconstruction"][axis], worth), axis


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


def test_what_is_long_is_told_beside_the_tokens_that_count():
    """One token of a thousand counts, and the loss depends on a few others a little."""
    values = np.zeros((1, 100, 1000), np.float32)
    counted = np.zeros((100, 1000), bool)
    counted[:, 500] = True
    values[0, :, 500] = np.linspace(1, 2, 100)
    values[0, 7, 300] = 9.0
    cut = clipped(values, counted)
    bound = np.quantile(np.linspace(1, 2, 100), 0.999)
    np.testing.assert_allclose(cut[0], np.minimum(values[0], bound), rtol=1e-6)
    assert clipped(values)[0, 7, 300] < 1.95
