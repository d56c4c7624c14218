"""``benchmarks/copying.py``: losses of three kinds of samples, of which the product's own loss is the mean."""

import sys
from pathlib import Path

import pytest
import torch

from nemo_minitron.importance.group_loss import GroupLoss, Groups
from nemo_minitron.prune.plan import Compensation
from tests.prune.test_layers import SENSITIVITY, tried
from tests.prune.test_resolve import SHAPE, TOKENS, model_in_float32

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))


def test_losses_of_the_kinds_make_up_the_loss():
    from copying import EACH, KINDS, LossByKind

    assert "benchmarks" in sys.modules["copying"].__file__
    tokens, counted = tried([0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11])
    assert len(tokens) == EACH * len(KINDS)
    model, gone = model_in_float32(SHAPE), {1: Groups()}
    given = (model, tokens, TOKENS, SENSITIVITY[::2].sqrt())
    keys = {"ridge": Compensation.attention, "counted": counted}
    expected, apart = GroupLoss(*given, **keys)(gone), LossByKind(*given, **keys)
    apart(gone)
    counts = counted[:, :-1].reshape(len(KINDS), -1).sum(1).double()
    assert expected.keys() == apart.by_kind.keys() and len(expected) > 1
    for candidate, loss in expected.items():
        found = torch.tensor(apart.by_kind[candidate], dtype=torch.float64)
        assert float(found @ counts / counts.sum()) == pytest.approx(loss, abs=1e-6)
        assert len(set(apart.by_kind[candidate])) == len(KINDS)
