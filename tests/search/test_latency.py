"""The roofline against sums by hand, and what is measured for it."""

import itertools
import math

import pytest

from nemo_minitron.model.shape import ModelShape
from nemo_minitron.search import latency

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=6,
    vocab_size=10,
    padded_vocab_size=12,
)


def test_a_step_reads_weights_and_cache_or_computes_or_starts_operations() -> None:
    layer = 8 * (2 + 2) * 6 + 2 * 6 * 8 + 3 * 8 * 16 + 2 * 8
    weights = 2 * layer + 8 + 12 * 8  # final norm, output layer; of the embedding table one row is read
    cache = 3 * 5 * 2 * 2 * 6  # sequences, tokens, layers, keys and values, channels
    free = {"flops": math.inf, "bandwidth": math.inf, "overhead": 0.0}
    reading = latency.Rates("none", **(free | {"bandwidth": 1.0}))
    assert reading.decode_seconds(SHAPE, 3, 5, 2) == pytest.approx(2 * (weights + cache))
    products = 2 * (layer - 2 * 8) + 12 * 8
    attention = 2 * 2 * 2 * 6 * 5  # layers, scores and values, heads, channels, tokens
    computing = latency.Rates("none", **(free | {"flops": 1.0}))
    assert computing.decode_seconds(SHAPE, 3, 5, 2) == pytest.approx(3 * 2 * (products + attention))
    starting = latency.Rates("none", **(free | {"overhead": 1.0}))
    assert starting.decode_seconds(SHAPE, 3, 5, 2) == latency.LAYER_OPERATIONS * 2 + 2


def test_the_shortest_of_several_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.time, "perf_counter", itertools.accumulate([0, 5, 1, 2, 1, 9]).__next__)
    calls = []
    assert latency.best_seconds(lambda: calls.append(1), 3) == 2
    assert len(calls) == 3


def test_this_device_is_measured() -> None:
    rates = latency.measure(4)
    assert rates.device == latency.device_name()
    assert 1e8 < rates.flops < 1e16
    assert 1e8 < rates.bandwidth < 1e14
    assert 0 < rates.overhead < 1e-2
