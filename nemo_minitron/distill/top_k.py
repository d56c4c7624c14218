"""The head of a teacher's distribution: its likeliest tokens and the mass of all others, from sharded logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distill.shard import Shard, keep, likeliest, top


class TopK(NamedTuple):
    """A teacher's distribution at the mix's temperature, of which only the head is known.

    ``log_probs [r, K]`` of the K likeliest tokens, the likeliest first; ``tokens [r, K]`` their global ids;
    ``log_tail [r]`` the log-probability of all other tokens together, −inf where there are none.
    """

    log_probs: Tensor
    tokens: Tensor
    log_tail: Tensor

    def rows(self, rows: slice) -> TopK:
        """The same for some of the tokens."""
        return TopK(self.log_probs[rows], self.tokens[rows], self.log_tail[rows])


def teacher_top_k(z: Tensor, k: int, temperature: float, shard: Shard) -> TopK:
    """The head of softmax(z/τ) from sharded logits ``z [r, v]``, which are overwritten; the same on every rank."""
    z.sub_(parallel.all_reduce(top(z), shard.group, op="max").unsqueeze(-1)).div_(temperature)
    return top_k_of(z, k, shard)


def top_k_of(a: Tensor, k: int, shard: Shard) -> TopK:
    """The head of softmax(a), K = k or the whole vocabulary where that is smaller.

    Args:
        a: ``[r, v]`` logits whose maximum over all ranks is 0; overwritten.
    """
    value, index = likeliest(a, min(k, shard.vocab_size), shard)
    column, ours = shard.columns(index, a.shape[1])
    keep(a.exp_(), column, ~ours)
    (tail,) = shard.sums(a.sum(-1))
    value = value.double()
    log_z = (tail + value.exp().sum(-1)).log()
    return TopK(value - log_z.unsqueeze(-1), index, tail.clamp(min=0.0).log() - log_z)
