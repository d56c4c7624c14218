"""Text that repeats itself, and which of it is told by what came before."""

import torch

from nemo_minitron.importance import echoes
from nemo_minitron.importance.echoes import echoed


def test_every_stretch_is_said_twice_and_what_is_said_again_counts(monkeypatch):
    """Positions predict the next token: the last of a stretch predicts the next stretch, which nothing tells."""
    monkeypatch.setattr(echoes, "LONGEST", 3)
    found, counted = echoed(torch.arange(20).view(2, 10))
    assert found.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5, 3], [10, 11, 12, 10, 11, 12, 13, 14, 15, 13]]
    row = [False, False, False, True, True, False, False, False, False, True]
    assert counted.tolist() == [row, row]


def test_a_sample_shorter_than_two_stretches_says_its_first_half_twice():
    found, counted = echoed(torch.arange(5)[None])
    assert found.tolist() == [[0, 1, 0, 1, 2]]
    assert counted.tolist() == [[False, False, True, False, False]]
    alone = torch.arange(3)[:, None]
    found, counted = echoed(alone)
    assert torch.equal(found, alone) and not counted.any()
    found, counted = echoed(torch.empty(0, 8, dtype=torch.int64))
    assert found.shape == counted.shape == (0, 8)
