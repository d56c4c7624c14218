"""The contract of a distillation loss: what is refused, and what each one costs in collectives."""

from __future__ import annotations

import pytest
import torch

from nemo_minitron import parallel
from nemo_minitron.distill.block import block_losses
from nemo_minitron.distill.loss import Loss, Mix, Reduction
from nemo_minitron.distill.shard import Shard
from nemo_minitron.errors import MinitronError
from nemo_minitron.registry import LOSSES

COLLECTIVES = {"forward_kl": ["max", "sum"], "reverse_kl": ["max", "sum"], "jsd": ["max", "sum", "sum"],
               "topk": ["max", "sum", "sum", "sum"], "sampled_kl": ["max", "sum"]}  # fmt: skip
"""All-reduces of a block: for maxima, then as the losses' docstrings say; ``topk`` also gathers under TP."""


@pytest.mark.parametrize(
    "options,key",
    [
        ({"temperature": 0.0}, "temperature"),
        ({"kd_weight": 0.0}, "kd_weight"),
        ({"jsd_beta": 1.0}, "jsd_beta"),
        ({"top_k": 0}, "top_k"),
        ({"teacher_samples": 0}, "teacher_samples"),
        ({"loss": "mse"}, "loss"),
    ],
)
def test_bad_options_name_their_key(options, key):
    with pytest.raises(MinitronError, match=rf"distill\.{key}"):
        Mix(**options)


def test_each_file_holds_the_loss_of_its_name():
    for name in COLLECTIVES:
        assert name in LOSSES.names() and isinstance(LOSSES.get(name), Loss)
        assert type(LOSSES.get(name)).__module__ == f"nemo_minitron.distill.losses.{name}"


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives_of_a_block_are_few(name, monkeypatch):
    """With a temperature and cross entropy, whose sums travel along with the divergence's."""
    seen = []

    def count(tensor, group, op="sum"):
        seen.append(op)
        return tensor

    monkeypatch.setattr(parallel, "all_reduce", count)
    z, a = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(0))
    labels, weights = torch.tensor([0, 3, 5, 10]), torch.ones(4)
    block_losses(z, a, labels, weights, Mix(name, 2.0, 0.5, 0.5, top_k=3), Shard(11))
    assert seen == COLLECTIVES[name]


def test_what_waits_is_summed_once_with_the_first_sums_or_alone():
    rows = [torch.full((3,), float(i)) for i in range(4)]
    with_sums = Reduction(Shard(10), rows[2:])
    (first,), (second,) = with_sums.sums(rows[0]), with_sums.sums(rows[1])
    alone = Reduction(Shard(10), rows[2:])
    for found, number in zip((first, second, *with_sums.rest(), *alone.rest()), (0, 1, 2, 3, 2, 3), strict=True):
        assert found.dtype == torch.float64 and found.tolist() == [number] * 3
