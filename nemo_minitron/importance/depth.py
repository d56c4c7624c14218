"""How much layers turn the residual stream: mean cosines between all pairs of its stages.

One matrix serves both depth metrics: Block Influence of layer l is ``1 - cosine[l, l+1]`` (arXiv 2403.03853,
2407.14679), and a block of n layers from l is judged by ``cosine[l, l+n]`` (arXiv 2403.17887).
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS_AT_ONCE = 256
"""Bounds the float64 copy of the residual streams: L+1 streams of this many tokens."""


def residual_sums(streams: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums over tokens of pairwise cosines and of squares.

    Args:
        streams: ``[N, T, H]`` residual stream at N depths for the same T tokens. mask: ``[T]``, True where it counts.

    Returns:
        ``[N, N]`` sum of cosines (0 for a zero vector) and ``[N, H]`` sum of squares, float64; chunks may be added.
    """
    streams = streams.detach().double()
    if mask is not None:
        streams = streams[:, mask]
    unit = streams / torch.linalg.vector_norm(streams, dim=-1, keepdim=True).clamp_min(1e-150)
    flat = unit.flatten(1)
    return flat @ flat.T, streams.square().sum(dim=1)


def block_influence(cosine: Tensor) -> Tensor:
    """``1 - cosine[l, l+1]`` for the mean cosines ``[L+1, L+1]`` → ``[L]``."""
    return 1.0 - torch.diagonal(cosine, offset=1)
