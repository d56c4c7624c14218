"""Re-solving linear layers that have a bias, each solve against a dense float64 least squares with an intercept."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_minitron.model import layout
from nemo_minitron.model.decoder import Layer, Rotary, read_layer
from nemo_minitron.moments import BIAS_TOKENS
from nemo_minitron.prune.choose import make_plan
from nemo_minitron.prune.cut import prune_checkpoint
from nemo_minitron.prune.plan import Compensation
from tests.canonical import FINGERPRINT, Memory
from tests.prune.test_resolve import BIASED, EVEN, SHAPE, TOKENS, model_in_float32, plan_for, stream, student_of

WEIGHTS = torch.rand(6, *TOKENS.shape, generator=torch.Generator().manual_seed(4))


def dense(a: Tensor, y: Tensor, weights: Tensor, ridge: float, prior: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``argmin sum w |W a + b - y|^2 + lam |W - prior|^2 + p |b - bias|^2`` by one stacked least squares, float64."""
    count, inputs = a.shape
    pull = BIAS_TOKENS * weights.mean()
    total = weights.sum() + pull
    spread = (weights[:, None] * a.square()).sum(0) - (weights[:, None] * a).sum(0).square() / total
    lam = ridge * spread.mean()
    rows = torch.cat((a, torch.ones(count, 1, dtype=a.dtype)), dim=1) * weights.sqrt()[:, None]
    penalty = torch.diag(torch.cat((lam.sqrt().expand(inputs), pull.sqrt()[None])))
    wanted = torch.cat((y * weights.sqrt()[:, None], lam.sqrt() * prior.T, pull.sqrt() * bias[None]))
    solution = torch.linalg.lstsq(torch.cat((rows, penalty)), wanted).solution
    return solution[:-1].T, solution[-1]


def after_attention(model, layer: Layer) -> Tensor:
    x = model.tensors[layout.EMBEDDING.key, None][TOKENS]
    return x + layer.attention_output(layer.attention(layer.attention_input(x), Rotary.of(model.shape, 33)))


def test_first_fc2_is_the_least_squares_with_an_intercept():
    model = model_in_float32(BIASED)
    plan = plan_for(BIASED, {"ffn_hidden_size": 12}, ffn=0.05)
    student = student_of(model, plan, weights=WEIGHTS)
    layer, kept = read_layer(model, 0), list(plan.ffn[0])
    middle = after_attention(model, layer)
    neurons = layer.ffn(layer.ffn_input(middle)).flatten(0, 1).double()
    wanted = layer.ffn_output(layer.ffn(layer.ffn_input(middle))).flatten(0, 1).double()
    prior, bias = layer[layout.FC2_WEIGHT][:, kept].double(), layer[layout.FC2_BIAS].double()
    weight, offset = dense(neurons[:, kept], wanted, WEIGHTS[1].flatten().double(), 0.05, prior, bias)
    found = [student.tensors[row.key, 0].double() for row in (layout.FC2_WEIGHT, layout.FC2_BIAS)]
    torch.testing.assert_close(found[0], weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1], offset, rtol=1e-3, atol=1e-4)
    assert float((offset - bias).abs().max()) > 0.05  # what was cut had a mean


def test_first_proj_is_the_least_squares_with_an_intercept():
    model = model_in_float32(BIASED)
    plan = plan_for(BIASED, {"num_query_groups": 2}, attention=0.05)
    student = student_of(model, plan, weights=WEIGHTS)
    layer = read_layer(model, 0)
    x = model.tensors[layout.EMBEDDING.key, None][TOKENS]
    inner = layer.attention(layer.attention_input(x), Rotary.of(BIASED, 33))
    columns = torch.tensor(plan.groups[0])[:, None] * 16 + torch.arange(16)
    kept = inner[..., columns.flatten()].flatten(0, 1).double()
    wanted = layer.attention_output(inner).flatten(0, 1).double()
    prior, bias = layer[layout.PROJ_WEIGHT][:, columns.flatten()].double(), layer[layout.PROJ_BIAS].double()
    weight, offset = dense(kept, wanted, WEIGHTS[0].flatten().double(), 0.05, prior, bias)
    torch.testing.assert_close(student.tensors[layout.PROJ_WEIGHT.key, 0].double(), weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(student.tensors[layout.PROJ_BIAS.key, 0].double(), offset, rtol=1e-3, atol=1e-4)


def test_first_qkv_reads_the_narrower_stream_with_an_intercept():
    model = model_in_float32(BIASED)
    plan = plan_for(BIASED, {"hidden_size": 16}, read=0.03)
    student = student_of(model, plan, weights=WEIGHTS)
    layer, kept = read_layer(model, 0), list(plan.hidden)
    x = model.tensors[layout.EMBEDDING.key, None].double()[TOKENS].flatten(0, 1)
    own, whole = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() for y in (x[:, kept], x))
    folded = (layer[layout.QKV_WEIGHT] * layer[layout.QKV_NORM]).double()
    bias = layer[layout.QKV_BIAS].double()
    shrunk = (own * whole[:, kept]).sum() / own.square().sum()
    alike = torch.ones(len(own), dtype=torch.float64)
    weight, offset = dense(own, whole @ folded.T + bias, alike, 0.03, folded[:, kept] * shrunk, bias)
    norm = student.tensors[layout.QKV_NORM.key, 0].double()
    torch.testing.assert_close(student.tensors[layout.QKV_WEIGHT.key, 0].double() * norm, weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(student.tensors[layout.QKV_BIAS.key, 0].double(), offset, rtol=1e-3, atol=1e-4)


def test_a_bias_alone_stands_in_for_constant_neurons():
    """Neurons that always say the same are cut with hardly a loss: what they wrote goes into the bias."""
    model = model_in_float32(BIASED)
    plan = plan_for(BIASED, {"ffn_hidden_size": 12}, ffn=1e-9, attention=1e-9)
    for number, kept in enumerate(plan.ffn):
        gone = [unit for unit in range(20) if unit not in kept]
        model.tensors[layout.FC1_WEIGHT.key, number].view(2, 20, 24)[:, gone] = 0
        model.tensors[layout.FC1_BIAS.key, number].view(2, 20)[:, gone] = 1.0
    before = model.tensors[layout.FC2_BIAS.key, 0].clone()
    many = TOKENS.repeat(10, 1)  # of which 64 tokens are a sixtieth
    student, cut = student_of(model, plan, tokens=many, weights=torch.ones(6, *many.shape)), Memory(plan.target)
    prune_checkpoint(model, plan, cut)
    wanted = stream(model, TOKENS)
    far, farther = (float((stream(one, TOKENS) - wanted).norm()) for one in (student, cut))
    assert far < 0.05 * farther, far / farther
    assert float((student.tensors[layout.FC2_BIAS.key, 0] - before).abs().max()) > 0.5


def test_a_handful_of_tokens_leaves_biases_near_what_they_were():
    model = model_in_float32(BIASED)
    plan = plan_for(BIASED, {"ffn_hidden_size": 12}, ffn=0.3)
    student = student_of(model, plan, tokens=TOKENS[:1, :1], weights=EVEN[:, :1, :1])
    for number in range(3):
        change = student.tensors[layout.FC2_BIAS.key, number] - model.tensors[layout.FC2_BIAS.key, number]
        assert float(change.abs().max()) < 0.2


def test_the_source_is_left_as_it_was():
    """A bias that nothing cuts is the source's own tensor until it is solved."""
    model = model_in_float32(BIASED)
    before = {slot: tensor.clone() for slot, tensor in model.tensors.items()}
    student_of(model, plan_for(BIASED, {"hidden_size": 16}))
    assert all(torch.equal(tensor, before[slot]) for slot, tensor in model.tensors.items())


@pytest.mark.parametrize("biases", [{"qkv_bias": True, "proj_bias": True}, {"mlp_bias": True}], ids=str)
def test_partial_biases_follow_the_teacher(biases):
    shape = SHAPE.replace(**biases)
    model = model_in_float32(shape)
    how = Compensation("t" * 64, ffn=0.3, attention=0.5, read=0.03)
    target = {"ffn_hidden_size": 12, "num_query_groups": 2}
    scored = plan_for(shape, target)
    plan = make_plan(shape, None, {}, drop_layers=[2], source_fingerprint=FINGERPRINT, compensation=how)
    for one in (scored, plan):
        student = student_of(model, one)
        wanted = stream(model, TOKENS)[..., list(one.hidden)]
        error = F.mse_loss(stream(student, TOKENS), wanted) / wanted.square().mean()
        assert float(error) < 0.5
