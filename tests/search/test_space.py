"""The space and its walk, against ModelShape one shape at a time."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from nemo_minitron.config.sections import Serving
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.serving import refusals
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.plan import TARGETS
from nemo_minitron.search.latency import Rates
from nemo_minitron.search.scan import Rows, scan, spread_out
from nemo_minitron.search.space import Budget, Shapes, Space, aligned_step, sizes_of
from tests.model.test_serving import load_by_rank

LLAMA = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, 128256)
SMOL = ModelShape(30, 576, 1536, 9, 3, 64, 49152, 49152, share_embeddings_and_output_weights=True)
SMALL = ModelShape(3, 64, 96, 8, 4, 8, 320, 384, qkv_bias=True)
PAPER = LLAMA.replace(hidden_size=3072, ffn_hidden_size=9216)
RATES = Rates("none", flops=1e12, bandwidth=1e11, overhead=1e-6)


def by_hand(space: Space) -> list[ModelShape]:
    """Every shape but the source's, one after the other."""
    shapes = []
    for values in itertools.product(*space.axes.values()):
        sizes = dict(zip(space.axes, values, strict=True))
        sizes["num_attention_heads"] = sizes.pop("heads_per_group") * sizes["num_query_groups"]
        shapes.append(space.source.replace(**sizes))
    return [shape for shape in shapes if shape != space.source]


def loss(shapes: ModelShape) -> np.ndarray:
    """Any function of the sizes."""
    width = shapes.hidden_size * np.sqrt(shapes.ffn_hidden_size) * shapes.num_attention_heads
    return np.atleast_1d(5.0 + 1e3 / (width * shapes.num_layers**1.5) + 0.01 * (shapes.num_query_groups == 3))


def test_blocks_hold_every_shape_once():
    space = Space.of(SMALL)
    found = [shapes.shape(at) for shapes in space.blocks() for at in range(len(shapes.sizes))]
    assert len(found) == len(set(found)) == len(space) - 1
    assert set(found) == set(by_hand(space))


def test_counts_of_many_are_those_of_each():
    budget = Budget(num_parameters=1e9, batch_size=3, seq_length=100, rates=RATES)
    for shapes in Space.of(SMALL, min_fraction=0.5).blocks():
        costs = budget.costs(shapes)
        for at in range(0, len(shapes.sizes), 7):
            one = shapes.shape(at)
            assert costs["num_parameters"][at] == one.num_parameters()
            cache = 3 * 100 * 2 * 2 * one.num_layers * one.num_query_groups * one.kv_channels
            assert costs["memory_gib"][at] * 2**30 == pytest.approx(2 * one.num_parameters(padded=True) + cache)
            assert costs["latency_ms"][at] == pytest.approx(float(budget.costs(one)["latency_ms"]))


@pytest.mark.parametrize(
    ("size", "step"), [(4096, 128), (14336, 128), (576, 64), (1536, 128), (64, 8), (192, 16), (3, 1)]
)
def test_steps_suit_hardware(size, step):
    assert aligned_step(size) == step


def test_sizes_fit_the_grid_and_the_fraction():
    space = Space.of(LLAMA, min_fraction=0.5, tensor_parallel=4, steps={"num_layers": 4})
    assert space.axes["num_query_groups"] == (4, 8)
    assert space.axes["num_layers"] == (16, 20, 24, 28, 32)
    assert min(space.axes["hidden_size"]) == 2048 and all(size % 128 == 0 for size in space.axes["hidden_size"])
    fixed = Space.of(SMOL, shrink=["hidden_size"])
    assert fixed.axes["hidden_size"][-2:] == (512, 576) and len(fixed) == len(fixed.axes["hidden_size"])


def test_scan_agrees_with_one_shape_at_a_time():
    space = Space.of(SMALL)
    follow = [SMALL.replace(hidden_size=48), SMALL.replace(num_layers=1)]
    budget = Budget(num_parameters=60_000, memory_gib=130_000 / 2**30, seq_length=64, tolerance=0.0)
    found = scan(space, budget, loss, keep=50, follow=follow)
    every = by_hand(space)
    cost = [budget.costs(shape) for shape in every]
    fits = [c["num_parameters"] <= 60_000 and c["memory_gib"] * 2**30 <= 130_000 for c in cost]
    feasible = sorted(
        (float(loss(shape)[0]), shape.num_parameters()) for shape, fit in zip(every, fits, strict=True) if fit
    )
    assert (found.considered, found.feasible) == (len(every), len(feasible))
    assert found.alone["num_parameters"] == sum(c["num_parameters"] <= 60_000 for c in cost)
    assert [(float(x), int(p)) for x, p in zip(found.best.loss, found.best.costs["num_parameters"], strict=True)] == [
        (pytest.approx(x), p) for x, p in feasible[:50]
    ]
    assert found.better == [sum(x < float(loss(one)[0]) for x, _ in feasible) for one in follow]
    front = found.fronts["num_parameters"]
    for size, value in zip(front.costs["num_parameters"], front.loss, strict=True):
        assert not any(s.num_parameters() <= size and float(loss(s)[0]) < value - 1e-12 for s in every)
    drawn = Shapes.of(SMALL, found.sample.sizes)
    assert all(
        every.index(drawn.shape(at)) >= 0 and fits[every.index(drawn.shape(at))] for at in range(len(drawn.sizes))
    )


def test_shapes_that_would_be_refused_are_left_out_of_everything():
    wanted = Serving(tensor_parallel=2, fp8=True)
    source = SMALL.replace(hidden_size=128, ffn_hidden_size=256, kv_channels=32, qkv_bias=False)
    space = Space.of(source, min_fraction=0.3)
    budget = Budget(num_parameters=300_000, tolerance=0.0)

    def loads(shape: ModelShape) -> bool:
        try:
            load_by_rank(shape, 2, fp8=True)
        except AssertionError:
            return False
        return True

    def cost(shapes: ModelShape) -> np.ndarray:
        return np.atleast_1d(1 / shapes.num_parameters())

    every = by_hand(space)
    served = [shape for shape in every if loads(shape)]
    fits = [shape for shape in served if shape.num_parameters() <= 300_000]
    found = scan(space, budget, cost, refuse=lambda shapes: refusals(shapes, wanted))
    assert 10 < len(fits) < len(served) < len(every) / 2
    assert (found.considered, found.left_out, found.feasible) == (len(every), len(every) - len(served), len(fits))
    assert {tuple(sizes) for sizes in found.best.sizes} == {tuple(sizes_of(shape)) for shape in fits}
    assert found.alone["num_parameters"] == len(fits)
    assert found.refused["heads"] == sum(shape.num_attention_heads % 2 for shape in every)
    for rows in (found.sample, found.fronts["num_parameters"]):
        shapes = Shapes.of(source, rows.sizes)
        assert all(loads(shapes.shape(at)) for at in range(len(rows)))


def test_where_nothing_is_served_or_nothing_of_it_fits_the_reasons_are_counted():
    everything = Serving(tensor_parallel=5)
    with pytest.raises(MinitronError, match=r"^search\.serving leaves out [\d,]+ of [\d,]+ .*which is all"):
        scan(Space.of(SMALL), Budget(num_parameters=60_000), loss, refuse=lambda shapes: refusals(shapes, everything))
    whole = Serving(tensor_parallel=4)
    with pytest.raises(MinitronError, match=r"^budget\.num_parameters: .*; search\.serving leaves out .*groups"):
        scan(Space.of(SMALL), Budget(num_parameters=20), loss, refuse=lambda shapes: refusals(shapes, whole))


def test_what_is_kept_does_not_depend_on_how_much_is_kept():
    space, budget = Space.of(SMALL), Budget(num_parameters=60_000)
    whole, few = (scan(space, budget, loss, keep=keep).best for keep in (10**6, 20))
    assert (whole.sizes[:20] == few.sizes).all()


def test_over_a_million_shapes_of_llama_in_seconds_and_the_paper_s_is_among_them():
    space = Space.of(LLAMA)
    start = time.process_time()
    found = scan(space, Budget(num_parameters=4.5e9), loss, follow=[PAPER])
    assert found.considered > 1_000_000 and time.process_time() - start < 20
    assert any((shapes.sizes == sizes_of(PAPER)).all(axis=1).any() for shapes in space.blocks())
    budget = Budget(num_parameters=4.5e9)
    assert budget.costs(PAPER)["num_parameters"] <= budget.limits()["num_parameters"]
    assert 0 <= found.better[0] < found.feasible


def test_smollm2_at_100m_has_many_shapes():
    assert scan(Space.of(SMOL), Budget(num_parameters=100e6), loss).feasible >= 200


def test_an_infeasible_budget_names_what_binds_and_the_nearest_shape():
    space = Space.of(SMOL, min_fraction=0.5)
    smallest = min(by_hand(space), key=lambda shape: shape.num_parameters())
    with pytest.raises(MinitronError) as caught:
        scan(space, Budget(num_parameters=20e6, memory_gib=10.0), loss)
    text = str(caught.value)
    assert text.startswith("budget.num_parameters: 20M parameters is too little")
    assert f"{smallest.num_layers} layers, hidden {smallest.hidden_size}, ffn {smallest.ffn_hidden_size}" in text
    assert f"{smallest.num_parameters() / 1e6:.4g}M parameters" in text and "memory_gib" not in text


def test_every_limit_that_nothing_keeps_is_named():
    rates = Rates("none", flops=1e30, bandwidth=1e30, overhead=1.0)  # latency counts layers alone
    space = Space.of(SMALL, shrink=["num_layers", "hidden_size"], min_fraction=0.5)
    least = 1e3 * (8 * 2 + 2)
    with pytest.raises(MinitronError, match=r"^budget\.latency_ms: 1.7e\+04 ms is too little: .* 2 layers"):
        scan(space, Budget(num_parameters=60_000, latency_ms=17_000, rates=rates), loss)
    with pytest.raises(MinitronError, match=r"^budget\.num_parameters: .*\(and so is budget\.latency_ms\)"):
        scan(space, Budget(num_parameters=20_000, latency_ms=least * 0.99, rates=rates), loss)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "at least one of budget.num_parameters"),
        ({"memory_gib": -1}, "budget.memory_gib: expected a positive number"),
    ],
)
def test_a_budget_without_a_limit_is_refused(values, message):
    with pytest.raises(MinitronError, match=message):
        Budget(**values).limits()


def test_measured_shapes_differ_from_each_other():
    found = scan(Space.of(LLAMA, min_fraction=0.5), Budget(num_parameters=4.5e9), loss)
    chosen = spread_out(found.best, 12, 0.1)
    logs = np.log(found.best.sizes[chosen])
    gaps = np.abs(logs[:, None] - logs[None]).max(axis=2)[np.triu_indices(12, 1)]
    assert len(chosen) == 12 and chosen[0] == 0 and gaps.min() >= 0.1


def test_too_few_different_shapes_are_filled_up():
    sizes = np.array([[64, 96, 8, 4, layers] for layers in (3, 2, 1)])
    rows = Rows(sizes, np.array([1.0, 2.0, 3.0]), {"num_parameters": np.array([3, 2, 1])})
    assert spread_out(rows, 5, 2.0) == [0, 1, 2]


def test_decoding_is_bound_by_bytes_or_by_operations():
    one = LLAMA
    weights = one.num_parameters(padded=True) - 128256 * 4096
    cache = one.kv_cache_bytes_per_token() * 1000
    slow_memory = Rates("none", flops=1e30, bandwidth=1e9, overhead=0.0)
    assert slow_memory.decode_seconds(one, 1, 1000, 2) == pytest.approx((2 * weights + cache) / 1e9)
    slow_products = Rates("none", flops=1e9, bandwidth=1e30, overhead=0.0)
    matrices = weights - 65 * 4096  # norms are no products
    attention = 2 * 1000 * 32 * 32 * 128
    assert slow_products.decode_seconds(one, 5, 1000, 2) == pytest.approx(
        5 * 2 * (matrices + attention) / 1e9, rel=1e-6
    )


def test_targets_are_the_columns():
    shapes = Shapes.of(SMALL, np.array([sizes_of(SMALL)]))
    assert shapes.shape(0) == SMALL and TARGETS[0] == "hidden_size"
