"""Compensated pruning: properties in float32 on random models, and each solve against a dense float64 least squares."""

import pytest
import torch
from torch.nn import functional as F

from nemo_minitron.errors import MinitronError
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import Rotary, read_layer, rms_norm
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.moments import SingularMoments
from nemo_minitron.prune.choose import make_plan
from nemo_minitron.prune.cut import prune_checkpoint
from nemo_minitron.prune.head import SCALE_PULL
from nemo_minitron.prune.plan import Compensation, Plan
from nemo_minitron.prune.resolve import compensate
from tests.canonical import FINGERPRINT, Memory, logits, random_model
from tests.importance.reference import answers
from tests.prune.test_cut import scores_with

SHAPE = ModelShape(3, 24, 20, 6, 3, 8, 40, 48, max_position_embeddings=64)
TIED = SHAPE.replace(share_embeddings_and_output_weights=True)
BIASED = SHAPE.replace(qkv_bias=True, proj_bias=True, mlp_bias=True)
BIASES = [SHAPE, TIED, SHAPE.replace(qkv_bias=True), BIASED]
TOKENS = torch.randint(0, 40, (12, 33), generator=torch.Generator().manual_seed(1))
EVEN = torch.ones(6, *TOKENS.shape)
TARGETS = {
    "ffn": {"ffn_hidden_size": 12},
    "heads": {"num_attention_heads": 3},
    "groups": {"num_query_groups": 2},
    "hidden": {"hidden_size": 16},
    "layers": {"num_layers": 2},
    "all": {"ffn_hidden_size": 12, "num_query_groups": 2, "hidden_size": 20, "num_layers": 2},
}


def scores(shape):
    given = scores_with()
    given.block_influence = torch.rand(3, generator=torch.Generator().manual_seed(2)).numpy()
    return given


def model_in_float32(shape, seed=0):
    model = random_model(shape, seed)
    model.tensors = {slot: tensor.float() for slot, tensor in model.tensors.items()}
    return model


def plan_for(shape, target, **strengths):
    strengths = {"ffn": 1e-4, "attention": 1e-4, "read": 1e-4} | strengths
    how = Compensation("t" * 64, **strengths)
    return make_plan(shape, scores(shape), target, source_fingerprint=FINGERPRINT, compensation=how)


def student_of(model, plan, tokens=TOKENS, weights=EVEN, dtype=torch.float32, counted=None):
    writer = Memory(plan.target)
    compensate(model, plan, tokens, weights, writer, counted=counted, dtype=dtype)
    assert set(writer.tensors) == {(row.key, at) for row, at in layout.slots(plan.target)}, (
        "every tensor of the student, and no other"
    )
    return writer


def stream(model, tokens):
    """Residual stream leaving the last layer."""
    rotary = Rotary.of(model.shape, tokens.shape[1])
    x = model.tensor(layout.EMBEDDING)[tokens].float()
    for layer in range(model.shape.num_layers):
        x = read_layer(model, layer).forward(x, rotary)
    return x


@pytest.mark.parametrize("shape", [SHAPE, BIASED], ids=["plain", "biases"])
def test_nothing_removed_is_bit_identical(shape):
    model = model_in_float32(shape)
    plan = Plan.identity(shape, FINGERPRINT)
    plan = Plan(**{**vars(plan), "compensation": Compensation("t" * 64, rescale=True)})
    student = student_of(model, plan)
    assert student.tensors.keys() == model.tensors.keys()
    for slot, tensor in student.tensors.items():
        assert torch.equal(tensor, model.tensors[slot]), slot


@pytest.mark.parametrize("shape", BIASES, ids=["untied", "tied", "bias", "biases"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_stream_follows_the_teacher_better_than_after_cutting(target, shape):
    model = model_in_float32(shape)
    plan = plan_for(shape, TARGETS[target], ffn=0.3, attention=0.5, read=0.03)
    many = torch.randint(0, 40, (64, 33), generator=torch.Generator().manual_seed(8))
    cut = Memory(plan.target)
    prune_checkpoint(model, plan, cut)
    fresh = torch.randint(0, 40, (8, 33), generator=torch.Generator().manual_seed(9))
    wanted = stream(model, fresh)[..., list(plan.hidden)]
    student = student_of(model, plan, tokens=many, weights=torch.ones(6, *many.shape))
    errors = [float((stream(m, fresh) - wanted).square().mean()) for m in (cut, student)]
    assert errors[1] < 0.95 * errors[0]


def test_neurons_that_others_repeat_are_removed_without_loss():
    model = model_in_float32(SHAPE)
    plan = plan_for(SHAPE, {"ffn_hidden_size": 12}, ffn=1e-9, attention=1e-9)
    for layer, kept in enumerate(plan.ffn):
        gone = [unit for unit in range(20) if unit not in kept]
        fc1 = model.tensors[layout.FC1_WEIGHT.key, layer].view(2, 20, 24)
        fc1[:, gone] = fc1[:, list(kept[: len(gone)])]
    cut = Memory(plan.target)
    prune_checkpoint(model, plan, cut)
    student = student_of(model, plan)
    doubled = {slot: tensor.double() for slot, tensor in student.tensors.items()}
    before = logits(Memory(SHAPE, {slot: tensor.double() for slot, tensor in model.tensors.items()}))
    after = logits(Memory(plan.target, doubled))
    torch.testing.assert_close(after, before, rtol=0, atol=2e-3)
    lost = logits(Memory(plan.target, {slot: tensor.double() for slot, tensor in cut.tensors.items()}))
    assert float((lost - before).abs().max()) > 0.5


def test_first_fc2_is_the_weighted_least_squares_of_dense_float64():
    model = model_in_float32(SHAPE)
    plan = plan_for(SHAPE, {"ffn_hidden_size": 12}, ffn=0.05)
    weights = torch.rand(6, *TOKENS.shape, generator=torch.Generator().manual_seed(4))
    student = student_of(model, plan, weights=weights)
    layer = read_layer(random_model(SHAPE), 0)
    tensors = {key: tensor.float().double() for key, tensor in layer.tensors.items()}
    x = model.tensors[layout.EMBEDDING.key, None].double()[TOKENS]
    rows = layout.FC1_NORM, layout.FC1_WEIGHT, layout.FC2_WEIGHT
    norm, fc1, fc2 = (tensors[row.key] for row in rows)
    inner = read_layer(model, 0)
    middle = x + F.linear(
        inner.attention(inner.attention_input(x.float()), Rotary.of(SHAPE, 33)).double(),
        tensors[layout.PROJ_WEIGHT.key],
    )
    h = middle / (middle.square().mean(-1, keepdim=True) + SHAPE.layernorm_epsilon).sqrt() * norm
    gate, up = (h @ fc1.T).chunk(2, dim=-1)
    neurons = (F.silu(gate) * up).flatten(0, 1)
    kept = list(plan.ffn[0])
    root = weights[1].flatten().double().sqrt()[:, None]
    a, y = root * neurons[:, kept], root * (neurons @ fc2.T)
    lam = 0.05 * a.square().sum(0).mean()
    stacked = torch.cat((a, lam.sqrt() * torch.eye(12, dtype=torch.float64)))
    wanted = torch.cat((y, lam.sqrt() * fc2[:, kept].T))
    expected = torch.linalg.lstsq(stacked, wanted).solution.T
    found = student.tensors[layout.FC2_WEIGHT.key, 0].double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_fc2_before_a_dropped_layer_weighs_tokens_by_the_stream_after_it():
    """Row 3 of the sensitivity belongs to the stream that leaves layer 1, which is dropped; dense, in float64."""
    model = model_in_float32(SHAPE)
    how = Compensation("t" * 64, ffn=0.05, attention=1e-4, read=1e-4)
    plan = make_plan(SHAPE, None, {}, drop_layers=[2], source_fingerprint=FINGERPRINT, compensation=how)
    weights = torch.rand(6, *TOKENS.shape, generator=torch.Generator().manual_seed(4)) ** 4
    student = student_of(model, plan, weights=weights)
    rotary, layers = Rotary.of(SHAPE, 33), [read_layer(model, number) for number in range(2)]
    x = model.tensors[layout.EMBEDDING.key, None][TOKENS]
    inner = layers[0].attention(layers[0].attention_input(x), rotary)
    middle = x + F.linear(inner, layers[0][layout.PROJ_WEIGHT])
    neurons = layers[0].ffn(layers[0].ffn_input(middle)).double().flatten(0, 1)
    wanted = layers[1].forward(layers[0].forward(x, rotary), rotary)
    fc2 = layers[0][layout.FC2_WEIGHT].double()
    root = weights[3].flatten().double().sqrt()[:, None]
    a, y = root * neurons, root * (wanted - middle).double().flatten(0, 1)
    lam = 0.05 * a.square().sum(0).mean()
    stacked = torch.cat((a, lam.sqrt() * torch.eye(20, dtype=torch.float64)))
    expected = torch.linalg.lstsq(stacked, torch.cat((y, lam.sqrt() * fc2.T))).solution.T
    found = student.tensors[layout.FC2_WEIGHT.key, 0].double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("counted", [None, answers(12, 33)], ids=["all", "some"])
def test_the_same_bits_whoever_sees_which_sample(counted):
    """Moments of two halves, added in either order, as two processes would."""
    model = model_in_float32(SHAPE)
    plan = plan_for(SHAPE, TARGETS["all"], rescale=True, regain=True)
    reference = student_of(model, plan, counted=counted)
    order = torch.randperm(len(TOKENS), generator=torch.Generator().manual_seed(6))
    some = None if counted is None else counted[order]
    other = student_of(model, plan, tokens=TOKENS[order], weights=EVEN[:, order], counted=some)
    for slot, tensor in reference.tensors.items():
        assert torch.equal(tensor, other.tensors[slot]), slot


def test_all_positions_that_count_are_no_mask():
    model = model_in_float32(SHAPE)
    plan = plan_for(SHAPE, TARGETS["all"], rescale=True, regain=True)
    reference, other = (student_of(model, plan, counted=c) for c in (None, torch.ones_like(TOKENS, dtype=torch.bool)))
    for slot, tensor in reference.tensors.items():
        assert torch.equal(tensor, other.tensors[slot]), slot


def test_bfloat16_student_is_carried_on_as_it_is_stored():
    model = model_in_float32(SHAPE)
    plan = plan_for(SHAPE, TARGETS["all"])
    student = student_of(model, plan, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in student.tensors.values()} == {torch.bfloat16}
    fresh = torch.randint(0, 40, (8, 33), generator=torch.Generator().manual_seed(9))
    wanted = stream(model, fresh)[..., list(plan.hidden)]
    exact = float((stream(student_of(model, plan), fresh) - wanted).square().mean())
    assert float((stream(student, fresh) - wanted).square().mean()) < 1.1 * exact


def test_one_token_of_calibration_does_no_harm_beyond_cutting():
    model = model_in_float32(SHAPE)
    plan = plan_for(SHAPE, TARGETS["ffn"], ffn=0.3, attention=0.5)
    student = student_of(model, plan, tokens=TOKENS[:1, :1], weights=EVEN[:, :1, :1])
    assert all(tensor.isfinite().all() for tensor in student.tensors.values())


def test_dead_activations_keep_the_cut_weights_with_a_warning():
    model = model_in_float32(SHAPE)
    for layer in range(3):
        model.tensors[layout.FC1_WEIGHT.key, layer].zero_()
    plan = plan_for(SHAPE, TARGETS["ffn"])
    with pytest.warns(SingularMoments, match="do not determine"):
        student = student_of(model, plan)
    kept = list(plan.ffn[0])
    expected = model.tensors[layout.FC2_WEIGHT.key, 0][:, kept]
    assert torch.equal(student.tensors[layout.FC2_WEIGHT.key, 0], expected)


def test_a_nan_in_the_source_stops_with_its_tensor():
    model = model_in_float32(SHAPE)
    model.tensors[layout.PROJ_WEIGHT.key, 1][0, 0] = float("nan")
    with pytest.raises(MinitronError, match=r"decoder\.layers\.1\.self_attention\.linear_proj.*NaN"):
        student_of(model, plan_for(SHAPE, TARGETS["ffn"]))


def predictions(model, tokens=TOKENS):
    """Logits ``[n, s, Vp]``, tied or not."""
    row = layout.EMBEDDING if model.shape.share_embeddings_and_output_weights else layout.OUTPUT
    h = rms_norm(stream(model, tokens), model.tensor(layout.FINAL_NORM).float(), model.shape.layernorm_epsilon)
    return h @ model.tensor(row).float().T


def written_by(model, samples=48, length=33):
    """Tokens that the model itself draws, ``[samples, length]``."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, model.shape.vocab_size, (samples, 1), generator=generator)
    while tokens.shape[1] < length:
        last = predictions(model, tokens)[:, -1, : model.shape.vocab_size]
        tokens = torch.cat((tokens, last.softmax(-1).multinomial(1, generator=generator)), dim=1)
    return tokens


@pytest.mark.parametrize("counted", [None, answers(48, 33)], ids=["all", "some"])
@pytest.mark.parametrize("target", ["ffn", "hidden", "layers"])
@pytest.mark.parametrize("shape", [SHAPE, TIED], ids=["untied", "tied"])
def test_the_final_norm_is_scaled_to_the_least_cross_entropy(shape, target, counted):
    """Against a dense float64 search over scales a thousandth apart."""
    model = model_in_float32(shape)
    model.tensors[layout.FINAL_NORM.key, None] *= 1.5  # sure of what follows: there is something to be too sure of
    tokens = written_by(model)
    weights = torch.ones(6, *tokens.shape)
    given = {"ffn": 0.3, "attention": 0.5, "read": 0.03}
    plans = (plan_for(shape, TARGETS[target], rescale=rescale, **given) for rescale in (False, True))
    plain, scaled = (student_of(model, plan, tokens, weights, counted=counted) for plan in plans)
    norm = (layout.FINAL_NORM.key, None)
    for slot, tensor in plain.tensors.items():
        assert slot == norm or torch.equal(tensor, scaled.tensors[slot]), slot
    ratio = scaled.tensors[norm] / plain.tensors[norm]
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    found = predictions(plain, tokens)[:, :-1, : shape.vocab_size].double()
    grid = torch.arange(0.75, 1.1255, 0.001, dtype=torch.float64)
    some = torch.ones_like(tokens[:, 1:], dtype=torch.bool) if counted is None else counted[:, :-1]
    sums = [F.cross_entropy(a * found[some], tokens[:, 1:][some], reduction="sum") for a in grid]
    best = grid[(torch.stack(sums) + SCALE_PULL * (grid - 1).square()).argmin()]
    assert float(ratio.mean()) == pytest.approx(float(best), abs=3e-3)
    assert float(best) < 0.99


def test_too_few_tokens_leave_the_final_norm():
    model = model_in_float32(SHAPE)
    one = TOKENS[:, :1]
    plain, scaled = (
        student_of(model, plan_for(SHAPE, TARGETS["ffn"], rescale=rescale), one, EVEN[..., :1])
        for rescale in (False, True)
    )
    norm = (layout.FINAL_NORM.key, None)
    assert torch.equal(plain.tensors[norm], scaled.tensors[norm])


def low_dimensional(shape, size):
    """A model whose stream stays in ``size`` directions that are no channels, and its stream's moment."""
    model = model_in_float32(shape)
    q = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(5))).Q[:, :size]
    gain = torch.ones(24)
    if shape.share_embeddings_and_output_weights:
        gain[5] = -1.0  # keeps its axis, and its sign
        q = torch.linalg.qr(torch.cat((F.one_hot(torch.tensor([5]), 24).T.float(), q), dim=1)).Q[:, :size]
        model.tensors[layout.FINAL_NORM.key, None] = gain * 1.7
    for (key, _), tensor in model.tensors.items():
        if key == layout.EMBEDDING.key:
            tensor.copy_(tensor @ q @ q.T)
        elif key in (layout.PROJ_WEIGHT.key, layout.PROJ_BIAS.key, layout.FC2_WEIGHT.key, layout.FC2_BIAS.key):
            tensor.copy_(q @ q.T @ tensor)
    x = stream(model, TOKENS).flatten(0, 1).double()
    return model, x.T @ x


@pytest.mark.parametrize("shape", BIASES, ids=["untied", "tied", "bias", "biases"])
def test_turning_loses_nothing_where_the_stream_is_narrow(shape):
    model, moment = low_dimensional(shape, 16)
    how = Compensation("t" * 64, ffn=1e-6, attention=1e-6, read=1e-6, rotate=True)
    plan = make_plan(shape, scores(shape), {"hidden_size": 16}, source_fingerprint=FINGERPRINT, compensation=how)
    turned = Memory(plan.target)
    compensate(model, plan, TOKENS, EVEN, turned, stream_moment=moment)
    for slot, tensor in turned.tensors.items():
        row = next(row for row in layout.parameters(shape) if row.key == slot[0])
        assert tuple(tensor.shape) == row.size(plan.target), slot
    cut = student_of(model, Plan(**{**vars(plan), "compensation": Compensation("t" * 64)}))
    before, after, worse = (predictions(one) for one in (model, turned, cut))
    scale = before.square().mean().sqrt()
    assert float((after - before).square().mean().sqrt() / scale) < 0.02
    assert float((worse - before).square().mean().sqrt() / scale) > 0.1


def test_a_turned_norm_leaves_weights_the_scale_they_trained_at():
    """Folded into what reads it, a norm of 0.1 would leave weights ten times smaller, and AdamW's steps as they are."""
    model, moment = low_dimensional(SHAPE, 16)
    for norm in (layout.QKV_NORM, layout.FC1_NORM):
        for number in range(SHAPE.num_layers):
            model.tensors[norm.key, number].mul_(0.1)
    how = Compensation("t" * 64, ffn=1e-6, attention=1e-6, read=1e-6, rotate=True)
    plan = make_plan(SHAPE, scores(SHAPE), {"hidden_size": 16}, source_fingerprint=FINGERPRINT, compensation=how)
    turned = Memory(plan.target)
    compensate(model, plan, TOKENS, EVEN, turned, stream_moment=moment)
    for row, norm in ((layout.QKV_WEIGHT, layout.QKV_NORM), (layout.FC1_WEIGHT, layout.FC1_NORM)):
        for number in range(SHAPE.num_layers):
            columns = turned.tensors[row.key, number].square().mean(dim=0).sqrt()
            teacher = model.tensors[row.key, number].square().mean().sqrt()
            gain = turned.tensors[norm.key, number]
            floored = gain <= 0.0501 * gain.square().mean().sqrt()  # columns that hardly count keep a norm that divides
            torch.testing.assert_close(columns[~floored], teacher.expand(16)[~floored], rtol=1e-4, atol=0)
            assert not floored.all() and float(gain.median()) < 0.3


def test_a_plan_that_turns_needs_the_moment():
    model, _ = low_dimensional(SHAPE, 16)
    how = Compensation("t" * 64, rotate=True)
    plan = make_plan(SHAPE, scores(SHAPE), {"hidden_size": 16}, source_fingerprint=FINGERPRINT, compensation=how)
    with pytest.raises(ValueError, match="stream_moment"):
        compensate(model, plan, TOKENS, EVEN, Memory(plan.target))
