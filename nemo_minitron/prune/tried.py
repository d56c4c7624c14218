"""Calibration samples on which this process tries what to remove, and those that it fits what stands in for that on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron import parallel, runtime
from nemo_minitron.importance.echoes import echoed
from nemo_minitron.importance.scores import Scores


@dataclass(frozen=True)
class Tried:
    """This process's share of the samples of some scores, on its device; every process of the job has one.

    Attributes:
        tokens: ``[n, s]`` int64, to measure losses on: of the job's half say themselves twice
            (:mod:`nemo_minitron.importance.echoes`), so that about a third of the labels is of copying; a quarter the
            model wrote itself, where scores have such.
        counted: ``[n, s]`` bool, which of their positions count; where tokens are said twice, those of the second time.
        fitted: ``[m, s]`` int64, of all samples.
        mine: which of the samples of the scores these are.
        group: the processes of the job.
    """

    tokens: Tensor
    counted: Tensor
    fitted: Tensor
    mine: slice
    group: parallel.Group

    @classmethod
    def of(cls, scores: Scores, tokens: int) -> Tried:
        """Take a share of ``scores``, which hold samples, and of about ``tokens`` tokens to measure losses on."""
        assert scores.tokens is not None
        if runtime.world_size() > 1 and parallel.world() is None:
            runtime.init_distributed()
        world, device = parallel.world(), runtime.device()
        mine = slice(runtime.rank(), None, parallel.size(world))
        samples = max(parallel.size(world), -(-tokens // scores.tokens.shape[1]))
        everything = torch.from_numpy(scores.tokens.astype("int64"))
        counted = torch.ones_like(everything, dtype=torch.bool)
        if scores.counted is not None:
            counted = torch.tensor(scores.counted)
        plain = samples - samples // 2
        echoes, repeated = echoed(everything[max(0, len(everything) - samples // 2) :])
        chosen, counts = (
            torch.cat([both_kinds(part, scores.own_samples, plain), again])
            for part, again in ((everything, echoes), (counted, repeated))
        )
        return cls(chosen[mine].to(device), counts[mine].to(device), everything[mine].to(device), mine, world)


def both_kinds(tokens: Tensor, own: int, samples: int) -> Tensor:
    """``samples`` of ``tokens [n, s]``, or all: half of them from the last ``own``, which the model wrote itself."""
    written = min(own, samples // 2)
    drawn = min(len(tokens) - own, samples - written)
    return torch.cat([tokens[:drawn], tokens[len(tokens) - own :][: samples - drawn]])
