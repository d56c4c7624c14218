r"""A few tokens drawn from a teacher's distribution, whose weighted sum is on average the whole of it.

The likeliest tokens alone are a biased teacher: a student that learns from them gives the tail another mass (Anshumann
et al., arXiv 2503.16870, who draw with replacement from the distribution itself). Here K different tokens are drawn
with inclusion probabilities πᵢ = min(1, c·qᵢ), c such that Σ π = K, by systematic sampling (Madow, 1949): one uniform
number u, and the points (u + j)/c on the line of summed probabilities. A drawn token weighs qᵢ/πᵢ, which is its
probability where πᵢ = 1 and 1/c elsewhere. So

    E[Σ wᵢ·1ᵢ·f(i)] = Σ qᵢ·f(i) for every f,    and    Σ wᵢ = 1 in every draw:

the gradient of Σ wᵢ·(log qᵢ − log pᵢ) by the student's logits, p − Σ wᵢ·eᵢ, is that of KL(q ‖ p) on average. No
unbiased draw of K tokens has a smaller Σ Var(wᵢ) (Cohen et al., arXiv 0803.0473, "VarOpt").

Legend: r tokens, K drawn of each, v columns of this rank's shard (true vocabulary only; 0 on some ranks).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distill.shard import Shard, keep, likeliest, top

LEAST = -1e4
"""Logarithm that stands for a probability of 0: its weight is 0 as well, and the product must be."""


class Sampled(NamedTuple):
    """Tokens drawn from a teacher's distribution at the mix's temperature, float64.

    ``log_probs [r, K]`` the teacher's log-probabilities of the drawn ``tokens [r, K]`` (global ids, the likeliest
    first of those that are always drawn); ``log_weights [r, K]`` logarithms of their weights, which sum to 1.
    """

    log_probs: Tensor
    tokens: Tensor
    log_weights: Tensor

    def rows(self, rows: slice) -> Sampled:
        """The same for some of the tokens."""
        return Sampled(self.log_probs[rows], self.tokens[rows], self.log_weights[rows])


def teacher_samples(z: Tensor, k: int, temperature: float, uniform: Tensor, shard: Shard) -> Sampled:
    """Draw from softmax(z/τ) of sharded logits ``z [r, v]``, which are overwritten; the same on every rank.

    Args:
        k: tokens to draw; the whole vocabulary is taken where that is smaller.
        uniform: ``[r]`` float64, from 0 to below 1, the same on every rank: all that is random.
    """
    z.sub_(parallel.all_reduce(top(z), shard.group, op="max").unsqueeze(-1)).div_(temperature).exp_()
    k = min(k, shard.vocab_size)
    likely, index = likeliest(z, k, shard)
    likely = likely.double()
    column, ours = shard.columns(index, z.shape[1])
    (rest,) = shard.sums(_without(z, column, ours).sum(-1, dtype=torch.float64))
    # mass from the i-th of the likeliest on; summed from the small end, so that a small tail keeps its digits
    tail = rest.unsqueeze(-1) + likely.flip(-1).cumsum(-1).flip(-1)
    total = tail[:, 0]
    left = k - torch.arange(k, device=z.device)
    drawn = likely * left <= tail  # [r, K]: here c·q is at most 1; once so, so it remains
    certain = k - drawn.sum(-1)  # tokens with π = 1, [r]
    if k == shard.vocab_size:
        certain = torch.full_like(certain, k)
    always = torch.arange(k, device=z.device) < certain.unsqueeze(-1)
    cumulative = _without(z, column, ours & always).cumsum(-1, dtype=torch.float64)
    found, mass = _at_points(cumulative, z, k - certain, uniform, shard)
    place = (torch.arange(k, device=z.device) - certain.unsqueeze(-1)).clamp(min=0)
    tokens = torch.where(always, index, found[0].gather(-1, place).long())
    log_total = total.log().unsqueeze(-1)
    log_probs = torch.where(always, likely, found[1].gather(-1, place)).log() - log_total
    each = (mass / (k - certain).clamp(min=1)).log().unsqueeze(-1) - log_total  # log 1/c
    log_probs = log_probs.clamp(min=LEAST)
    return Sampled(log_probs, tokens, torch.where(always, log_probs, each.clamp(min=LEAST)))


def _without(e: Tensor, column: Tensor, where: Tensor) -> Tensor:
    """A copy of ``e [r, v]`` that is 0 at the columns ``[r, K]`` where ``where`` says so."""
    left = e.clone()
    keep(left, column, ~where)
    return left


def _at_points(cumulative: Tensor, e: Tensor, points: Tensor, uniform: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Tokens at (u + j)/points of the summed mass, j from 0 to ``points - 1``.

    Args:
        cumulative: ``[r, v]`` float64, sums of the mass that is drawn from up to and with each column of this rank.
        e: ``[r, v]`` mass of each column. points: ``[r]`` how many to draw.

    Returns:
        Global ids and their mass, ``[2, r, K]`` float64, arbitrary beyond a row's points; and all ranks' mass, ``[r]``.
    """
    rows, width = cumulative.shape
    here = cumulative[:, -1:] if width else cumulative.new_zeros(rows, 1)
    masses = parallel.all_gather(here, shard.group, dim=-1)  # [r, tp]
    rank = parallel.rank(shard.group)
    before, upto = masses[:, :rank].sum(-1, keepdim=True), masses[:, : rank + 1].sum(-1, keepdim=True)
    mass = masses.sum(-1, keepdim=True)
    most = int(points.max()) if rows else 0
    steps = uniform.unsqueeze(-1) + torch.arange(max(most, 1), device=e.device)
    # u + j below the number of points, but for rounding; the last point must not fall off the end
    at = torch.minimum(steps / points.clamp(min=1).unsqueeze(-1) * mass, mass * (1 - 1e-15))
    ours = (at >= before) & (at < upto)
    if width:
        column = torch.searchsorted(cumulative, (at - before).clamp(min=0.0), right=True).clamp(max=width - 1)
        found = torch.stack([column.double() + shard.start, e.gather(-1, column).double()])
    else:
        found = at.new_zeros(2, *at.shape)
    return parallel.all_reduce(found.where(ours, 0.0), shard.group), mass.squeeze(-1)


def uniforms(seed: int, split: str, number: int, length: int) -> Tensor:
    """``[length]`` float64 numbers from 0 to below 1 for one sample of a split: the same whatever grid, batch or order
    it is drawn in."""
    words = hashlib.blake2b(f"{seed} {split} {number}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(words, "little")))
    return torch.from_numpy(generator.random(length))
