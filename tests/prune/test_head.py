"""The search for the final norm's scale finds what trying all scales finds, and tries few."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nemo_minitron.prune import head
from tests.canonical import random_model
from tests.importance.test_collect import SHAPE


def frame() -> SimpleNamespace:
    """What the search asks of a frame: one sample."""
    return SimpleNamespace(
        plan=SimpleNamespace(source=SHAPE), device=torch.device("cpu"), solved=range(1), group=None,
        next_tokens=lambda stream, most: lambda sample: (stream[sample], None),
    )  # fmt: skip


@pytest.mark.parametrize("lowest", [0.5, 0.76, 0.8, 0.93, 1.0, 1.01, 1.11, 1.4])
def test_downhill_ends_where_trying_all_does(lowest, monkeypatch):
    tried = []

    def losses(x, labels, norm, table, epsilon, scales):
        tried.extend(scales)
        return torch.tensor([1e4 * (scale - lowest) ** 2 + 1e3 * (scale - lowest) ** 4 for scale in scales]).double()

    monkeypatch.setattr(head, "loss_sums", losses)
    table = random_model(SHAPE).tensors["output_layer.weight", None]
    found = head._scale(frame(), torch.zeros(1, 4, SHAPE.hidden_size), torch.ones(SHAPE.hidden_size), table)
    few, every = len(tried), losses(None, None, None, None, None, head.SCALES)
    every += head.SCALE_PULL * (torch.tensor(head.SCALES).double() - 1).square()
    assert found == head._lowest(head.SCALES, every.tolist())
    away = min(abs(head.SCALES.index(1.0) - int(every.argmin())), 8)
    assert few == len(set(tried[:few])) <= 3 + away
