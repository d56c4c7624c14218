"""How much layers turn the residual stream: mean cosines between all pairs of its stages.

One matrix serves both depth metrics: Block Influence of layer l is ``1 - cosine[l, l+1]`` (arXiv 2403.03853,
2407.14679), and a block of n layers from l is judged by ``cosine[l, l+n]`` (arXiv 2403.17887).
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS_AT_ONCE = {"cpu": 256, "cuda": 1024}
"""Bounds the wider copy of the residual streams: L+1 streams of this many tokens."""


def residual_sums(streams: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums over tokens of pairwise cosines and of squares.

    Args:
        streams: ``[N, T, H]`` residual stream at N depths for the same T tokens. mask: ``[T]``, True where it counts.

    Returns:
        ``[N, N]`` sum of cosines (0 for a zero vector) and ``[N, H]`` sum of squares, float64; chunks may be added. On
        a GPU a token's products are float32.
    """
    if streams.is_cuda:
        return _sums_by_token(streams.detach().float(), mask)
    streams = streams.detach().double()
    if mask is not None:
        streams = streams[:, mask]
    unit = streams / torch.linalg.vector_norm(streams, dim=-1, keepdim=True).clamp_min(1e-150)
    flat = unit.flatten(1)
    return flat @ flat.T, streams.square().sum(dim=1)


def _sums_by_token(streams: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`residual_sums` of float32 streams by one product of ``[N, H]`` with itself for each token, which reads
    them once and makes no wider copy."""
    if mask is not None:
        streams = streams * mask[:, None]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        products = streams.transpose(0, 1) @ streams.permute(1, 2, 0)  # [T, N, N]
    finally:
        torch.set_float32_matmul_precision(precision)
    inverse = products.diagonal(dim1=1, dim2=2).double().clamp_min(1e-300).rsqrt()  # [T, N]
    cosine = torch.einsum("tij,ti,tj->ij", products.double(), inverse, inverse)
    return cosine, torch.linalg.vector_norm(streams, dim=1).double().square()


def block_influence(cosine: Tensor) -> Tensor:
    """``1 - cosine[l, l+1]`` for the mean cosines ``[L+1, L+1]`` → ``[L]``."""
    return 1.0 - torch.diagonal(cosine, offset=1)
