"""Weights of the student's final norm under which calibration tokens are likelier, channel by channel.

A student's stream has lost more in some channels than in others, and its final norm can trust those less. The loss is
convex in the norm's weights, a log-sum of exponentials of linear functions, and near the teacher's one step leads most
of the way: that of the natural gradient, whose curvature is the Fisher information of the tokens seen (the sum of
``g g^T`` over the gradients g of their losses; Amari, Natural Gradient Works Efficiently in Learning, 1998).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.model.next_token import loss_sums, norm_gradients
from nemo_minitron.prune.frame import Frame

GAIN_TOKENS = 16384
"""Number of the job's calibration tokens that are predicted, evenly spread over the samples."""
GAIN_PULL = 60.0
"""Towards the weights as they are, in nats per half square of a channel's relative change: a handful of tokens decides
nothing, and some thousand move a channel by several hundredths."""
STEPS = (1.0, 0.5, 0.25)
"""Parts of the step that are tried, until one of them lowers the loss."""


def likelier(frame: Frame, student: Tensor, gain: Tensor, table: Tensor) -> Tensor:
    """Find better weights of the final norm; the same bits on every grid.

    Args:
        student: ``[n, s, k]`` float32, the stream that leaves the last layer, of this process's samples.
        gain: ``[k]`` float32, the weights to begin with. table: ``[V, k]``, the output layer without padded rows.

    Returns:
        ``[k]``; ``gain`` itself where no part of the step lowers the loss and its pull, or where there is no token.
    """
    epsilon, predicted = frame.plan.source.layernorm_epsilon, frame.next_tokens(student, GAIN_TOKENS)

    def loss(weights: Tensor, change: Tensor) -> float:
        total = torch.zeros(1, dtype=torch.float64, device=frame.device)
        for sample in frame.solved:
            total += loss_sums(*predicted(sample), frame.rounded(weights), table, epsilon)
        pull = GAIN_PULL / 2 * float(change.square().sum())
        return float(parallel.all_reduce(total, frame.group)) + pull

    gradients = [norm_gradients(*predicted(sample), frame.rounded(gain), table, epsilon) for sample in frame.solved]

    def slopes(sample: int) -> tuple[Tensor, Tensor, None]:
        each = gradients[sample]
        return each, each.new_ones(len(each), 1), None

    fisher, slope = frame.moments(slopes, len(gain), 1)
    fisher.diagonal().add_(GAIN_PULL)
    factor, failed = torch.linalg.cholesky_ex(fisher)
    if int(failed):
        return gain
    step = -torch.cholesky_solve(slope, factor)[:, 0]
    before = loss(gain, torch.zeros_like(step))
    for part in STEPS:
        found = (gain * (1 + part * step)).float()
        if loss(found, part * step) < before:
            return found
    return gain
