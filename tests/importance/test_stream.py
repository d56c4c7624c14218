"""Streamed scores against dense definitions on transformers, whatever the passes and the shares of the samples."""

import numpy as np
import pytest
import torch

from nemo_minitron import parallel
from nemo_minitron.importance import stream
from nemo_minitron.importance.reductions import Aggregation
from nemo_minitron.prune.choose import make_plan
from tests.canonical import random_model
from tests.importance.reference import answers, dense_scores
from tests.importance.test_collect import SHAPE, TOKENS, check
from tests.ranks import run_ranks


@pytest.mark.parametrize("how", [("mean", "l2", "mean"), ("var", "mean", "l2")])
@pytest.mark.parametrize("file_bytes", [16 << 30, 1], ids=["one pass", "a pass per sample"])
def test_definitions(how, file_bytes, monkeypatch):
    monkeypatch.setattr(stream, "FILE_BYTES", file_bytes)
    done = []
    arrays, counts = stream.stream_collect(
        random_model(SHAPE), TOKENS, aggregation=Aggregation(*how), progress=done.append
    )
    check((arrays, counts), dense_scores(random_model(SHAPE), TOKENS, None, *how), rtol=1e-3)
    assert counts == {"samples": 6, "tokens": 96}
    assert sum(done) == 6 * SHAPE.num_layers


@pytest.mark.parametrize("how", [("mean", "l2", "mean"), ("l2", "var", "l2")])
@pytest.mark.parametrize("file_bytes", [16 << 30, 1], ids=["one pass", "a pass per sample"])
def test_positions_that_count(how, file_bytes, monkeypatch):
    monkeypatch.setattr(stream, "FILE_BYTES", file_bytes)
    model, counted = random_model(SHAPE), answers(6, 16)
    found = stream.stream_collect(model, TOKENS, counted=counted, aggregation=Aggregation(*how))
    check(found, dense_scores(model, TOKENS, counted, *how), rtol=1e-3)
    assert found[1] == {"samples": 6, "tokens": int(counted.sum())} and counted.sum() < 60
    every = stream.stream_collect(model, TOKENS, counted=torch.ones_like(counted), aggregation=Aggregation(*how))
    plain = stream.stream_collect(model, TOKENS, aggregation=Aggregation(*how))
    for name, array in plain[0].items():
        assert np.array_equal(every[0][name], array), name


def _shares(counted):
    world = parallel.world()
    mine = slice(torch.distributed.get_rank(), None, parallel.size(world))
    some = None if counted is None else counted[mine]
    return stream.stream_collect(random_model(SHAPE), TOKENS[mine], counted=some, group=world)


@pytest.mark.parametrize("counted", [None, answers(6, 16)], ids=["all", "some"])
def test_processes_share_the_samples(counted):
    alone, counts = stream.stream_collect(random_model(SHAPE), TOKENS, counted=counted)
    for arrays, found in run_ranks(_shares, 2, counted):
        check((arrays, found), alone, rtol=1e-6)
        assert found == counts
        target = {"hidden_size": 16, "ffn_hidden_size": 12, "num_query_groups": 2, "num_layers": 3}
        one, other = (
            make_plan(SHAPE, _Named(scores), target, source_fingerprint="f" * 64) for scores in (alone, arrays)
        )
        assert one.to_yaml() == other.to_yaml()


class _Named:
    def __init__(self, arrays):
        self.__dict__.update({name: np.asarray(array) for name, array in arrays.items()})
