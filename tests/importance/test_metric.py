"""Metrics that are not ours: what they observe is what passes, and they rank what they like."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from nemo_minitron.errors import MinitronError
from nemo_minitron.importance.measure import chosen_metrics, rank_by_statistics
from nemo_minitron.importance.metric import Observer
from nemo_minitron.importance.reconstruction import measure
from nemo_minitron.importance.stream import stream_collect
from nemo_minitron.registry import METRICS, load_extensions
from tests.canonical import random_model
from tests.importance.reference import activations
from tests.llamas import GQA

TOKENS = torch.randint(0, GQA.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Toy:
    """Neurons by the sum of their activations' sizes, and the order of the calls."""

    observes: str
    name: str = "toy"

    def start(self, job):
        return Recorder(job)


class Recorder(Observer):
    def __init__(self, job):
        self.worth = torch.zeros(job.shape.num_layers, job.shape.ffn_hidden_size, dtype=torch.float64)
        self.calls = []

    def sample(self, seen):
        self.worth[seen.layer] += seen.fc2_input.double().abs().sum(dim=(0, 1))
        self.calls.append((seen.layer, seen.sample, seen.leaving_gradient is not None))

    def layer(self, seen):
        self.calls.append((seen.layer, len(seen.gradients)))

    def outside(self, parameter, weight, gradient):
        assert weight.shape == gradient.shape
        self.calls.append(parameter.key)

    def ranking(self):
        RECORDED.append(self.calls)
        return {"ffn": self.worth}


RECORDED = []


@pytest.mark.parametrize(
    ("observes", "gradients", "weights"),
    [("activations", False, 0), ("gradients", True, 0), ("weight_gradients", True, 6)],
)
def test_a_metric_sees_what_it_observes(observes, gradients, weights):
    model = random_model(GQA)
    rankings, compensation = measure(model, TOKENS, {"toy": Toy(observes)})
    expected = np.abs(np.stack(activations(model, TOKENS)["ffn"])).sum(axis=(1, 2))
    np.testing.assert_allclose(rankings["toy"]["ffn"], expected, rtol=1e-4)
    assert list(rankings["toy"]) == ["ffn"] and compensation is None
    layers = [call for layer in (2, 1, 0) for call in [*((layer, n, gradients) for n in range(3)), (layer, weights)]]
    tables = ["embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"]
    assert RECORDED.pop() == layers + (tables if weights else [])


MINE = """
from nemo_minitron.importance.metric import Observer

class Rms(Observer):
    def statistics(self, found):
        self.found = found
    def ranking(self):
        return {"ffn": self.found["ffn_rms"]}

class Metric:
    name, observes = "rms_of_mine", "statistics"
    def start(self, job):
        return Rms()

METRIC = Metric()
"""


def test_an_extension_ranks_by_statistics(tmp_path, monkeypatch):
    monkeypatch.setattr(METRICS, "_files", {})
    monkeypatch.setattr(METRICS, "_loaded", {})
    (tmp_path / "mine.py").write_text(MINE)
    load_extensions([str(tmp_path / "mine.py")])
    found, counts = stream_collect(random_model(GQA), TOKENS)
    metrics = chosen_metrics(["minitron", "rms_of_mine", "minitron"])
    rankings = rank_by_statistics(GQA, found, counts, metrics)
    assert list(rankings) == ["minitron", "rms_of_mine"]
    assert np.array_equal(rankings["rms_of_mine"]["ffn"], found["ffn_rms"])
    for axis, worth in rankings["minitron"].items():
        assert np.array_equal(worth, found[axis]), axis


def test_a_metric_that_observes_nothing_is_refused(monkeypatch):
    monkeypatch.setitem(METRICS._loaded, "toy", Toy("dreams"))
    with pytest.raises(MinitronError, match="metric 'toy': observes: expected one of statistics, "):
        chosen_metrics(["toy"])
    with pytest.raises(MinitronError, match="no importance metric 'magic'"):
        chosen_metrics(["magic"])
