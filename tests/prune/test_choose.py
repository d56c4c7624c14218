"""Choices: the published ones, ties by index, impossible requests refused."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_minitron.config.sections import Prune
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import ModelShape, RopeScaling
from nemo_minitron.prune.choose import keep_top, make_plan, plan_from_scores, ranked_axes
from tests.importance.made import made

L, H, F, A, G = 4, 16, 12, 6, 3
SHAPE = ModelShape(L, H, F, A, G, 8, 30, 32, rope_scaling=RopeScaling())


def make_scores(seed=0):
    rng = np.random.default_rng(seed)
    return SimpleNamespace(
        ffn=rng.random((L, F)),
        heads=rng.random((L, A)),
        groups=rng.random((L, G)),
        hidden=rng.random(H),
        block_influence=np.array([0.9, 0.1, 0.5, 0.2]),
        residual_cosine=np.eye(L + 1) + 0.01 * rng.random((L + 1, L + 1)),
    )


def plan_for(target, scores="default", **options):
    scores = make_scores() if scores == "default" else scores
    return make_plan(SHAPE, scores, target, source_fingerprint="f" * 64, **options)


def test_each_axis_keeps_its_best():
    scores = make_scores()
    plan = plan_for({"hidden_size": 10, "ffn_hidden_size": 7, "num_attention_heads": 2, "num_query_groups": 2})
    assert plan.hidden == tuple(sorted(np.argsort(-scores.hidden)[:10]))
    for layer in range(L):
        assert plan.ffn[layer] == tuple(sorted(np.argsort(-scores.ffn[layer])[:7]))
        groups = tuple(sorted(np.argsort(-scores.groups[layer])[:2]))
        assert plan.groups[layer] == groups
        assert plan.heads[layer] == tuple(
            2 * g + int(np.argmax(scores.heads[layer, 2 * g : 2 * g + 2])) for g in groups
        )
    assert plan.target == SHAPE.replace(hidden_size=10, ffn_hidden_size=7, num_attention_heads=2, num_query_groups=2)


def test_groups_alone_keep_heads_per_group_and_heads_alone_keep_groups():
    plan = plan_for({"num_query_groups": 1})
    assert (plan.target.num_attention_heads, plan.target.num_query_groups) == (2, 1)
    plan = plan_for({"num_attention_heads": 3})
    assert (plan.target.num_attention_heads, plan.target.num_query_groups) == (3, 3)
    assert plan.target.kv_channels == 8


def test_none_means_unchanged():
    assert plan_for({"hidden_size": None, "ffn_hidden_size": 6}).hidden == tuple(range(H))


def test_layers_by_block_influence():
    assert plan_for({"num_layers": 2}).layers == (0, 2)


def test_layers_as_one_block():
    scores = make_scores()
    scores.residual_cosine = np.zeros((L + 1, L + 1))
    for i, value in enumerate((0.3, 0.8, 0.5)):
        scores.residual_cosine[i, i + 2] = value
    assert plan_for({"num_layers": 2}, scores, layer_selection="contiguous").layers == (0, 3)
    scores.residual_cosine[2, 4] = 0.8  # a tie: the earlier block goes
    assert plan_for({"num_layers": 2}, scores, layer_selection="contiguous").layers == (0, 3)
    scores.residual_cosine[0, 2] = 0.9
    assert plan_for({"num_layers": 2}, scores, layer_selection="contiguous").layers == (2, 3)


def test_drop_layers_counts_from_one_and_may_drop_the_last():
    plan = plan_for({}, None, drop_layers=[2, 4])
    assert plan.layers == (0, 2) and plan.target.num_layers == 2
    assert plan_for({"num_layers": 2}, None, drop_layers=[2, 4]) == plan


def test_width_indices_follow_the_kept_layers():
    scores = make_scores()
    plan = plan_for({"ffn_hidden_size": 5}, drop_layers=[1])
    assert plan.layers == (1, 2, 3) and len(plan.ffn) == 3
    assert plan.ffn[0] == tuple(sorted(np.argsort(-scores.ffn[1])[:5]))


def test_ties_keep_the_lower_index():
    assert keep_top(np.ones(6), 4) == (0, 1, 2, 3)
    assert keep_top(np.zeros(6), 1) == (0,)
    assert keep_top(np.array([1.0, 3.0, 2.0, 2.0, 2.0]), 2) == (1, 2)
    assert keep_top(np.array([-1.0, -3.0]), 1) == (0,)


def test_noise_between_equals_never_changes_the_choice():
    rng = np.random.default_rng(1)
    for _ in range(300):
        values = np.repeat(rng.random(10) + 0.1, 4)[rng.permutation(40)]  # equals, wherever they fall on any grid
        noisy = values * (1 + 1e-8 * rng.standard_normal(40))
        count = int(rng.integers(1, 40))
        assert keep_top(values, count) == keep_top(noisy, count)


def test_a_difference_above_noise_decides():
    assert keep_top(np.array([1.0, 1.0 + 1e-5]), 1) == (1,)


def test_a_large_plan_is_small_and_quick():
    shape = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, 128256)
    rng = np.random.default_rng(0)
    scores = SimpleNamespace(ffn=rng.random((32, 14336)), hidden=rng.random(4096))
    plan = make_plan(shape, scores, {"hidden_size": 3072, "ffn_hidden_size": 9216}, source_fingerprint="f")
    assert len(plan.to_yaml()) < 2_000_000
    assert plan.target.num_parameters() == pytest.approx(4.51e9, rel=2e-3)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ({}, {}, "nothing requested"),
        ({"hidden_size": None}, {"drop_layers": []}, "nothing requested"),
        ({"hidden_size": H}, {}, "nothing to remove"),
        ({"hidden_size": 17}, {}, r"prune.hidden_size: 17 asked, 16 available"),
        ({"num_layers": 5}, {}, r"prune.num_layers: 5 asked, 4 available"),
        ({"ffn_hidden_size": 0}, {}, r"prune.ffn_hidden_size: expected a size from 1 to 12, found 0"),
        ({"ffn_hidden_size": "9"}, {}, r"found '9'"),
        ({"ffn_hiden_size": 4}, {}, "Did you mean 'ffn_hidden_size'"),
        (
            {"num_attention_heads": 4},
            {},
            r"num_attention_heads \(4\) must be a multiple of the query groups kept \(3\)",
        ),
        ({"num_attention_heads": 5, "num_query_groups": 2}, {}, r"\(5\) must be a multiple .* \(2\)"),
        ({"num_attention_heads": 6, "num_query_groups": 2}, {}, "3 heads per group asked .* 2 available"),
        ({}, {"drop_layers": [5]}, "layer 5 asked, available are 1 to 4"),
        ({}, {"drop_layers": [0]}, "layer 0 asked, available are 1 to 4"),
        ({}, {"drop_layers": [2, 2]}, r"found \[2\] more than once"),
        ({}, {"drop_layers": [1, 2, 3, 4]}, "at least one must stay"),
        ({"num_layers": 3}, {"drop_layers": [1, 2]}, r"num_layers \(3\) disagrees .* leaves 2 of 4"),
        ({"num_layers": 3}, {"layer_selection": "contigous"}, "Did you mean 'contiguous'"),
    ],
)
def test_impossible_requests(target, options, message):
    with pytest.raises(MinitronError, match=message):
        plan_for(target, **options)


def test_axes_that_a_ranking_decides():
    new = {"num_layers": 2}
    assert ranked_axes(SHAPE, SHAPE.replace(**new)) == ()
    new |= {"hidden_size": 8, "ffn_hidden_size": 6, "num_query_groups": 1, "num_attention_heads": 2}
    assert ranked_axes(SHAPE, SHAPE.replace(**new)) == ("ffn", "groups", "hidden"), "the group's heads all stay"
    assert ranked_axes(SHAPE, SHAPE.replace(num_attention_heads=3)) == ("heads",)


def test_a_ranking_need_only_have_the_axes_that_are_cut():
    ranking = {"ffn": np.arange(L * F, dtype=float).reshape(L, F)}
    scores = made(SHAPE, np.random.default_rng(0).random)
    scores = dataclasses.replace(scores, rankings=scores.rankings | {"mine": ranking})
    prune = Prune(ranking="mine", ffn_hidden_size=7)
    plan = plan_from_scores(SHAPE, "f" * 64, prune, scores)
    assert plan.ranking == "mine" and plan.ffn == (tuple(range(F - 7, F)),) * L
    with pytest.raises(MinitronError, match="'mine' ranks ffn and not 'hidden', which this target needs"):
        plan_from_scores(SHAPE, "f" * 64, dataclasses.replace(prune, hidden_size=8), scores)


def test_missing_or_bad_scores():
    with pytest.raises(MinitronError, match="'hidden' scores are needed"):
        plan_for({"hidden_size": 8}, None)
    scores = make_scores()
    scores.ffn[2, 2] = np.nan
    with pytest.raises(MinitronError, match="'ffn' holds NaN"):
        plan_for({"ffn_hidden_size": 8}, scores)
    scores.hidden = np.zeros(3)
    with pytest.raises(MinitronError, match=r"'hidden' must have size \[16\], found \[3\]"):
        plan_for({"hidden_size": 8}, scores)
