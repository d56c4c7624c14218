"""Text that repeats itself, to see what a model has for copying.

A few attention heads copy what followed the last time (induction heads, arXiv 2209.11895). On text of short passages
they are worth nearly nothing, on sources, documentation and dialogue a lot: without one query group of SmolLM2-135M's,
of 90, text of Brown lost 0.01 nats and text said twice 1.66. So they have to be asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

LONGEST = 256
"""Tokens that are said twice in a row, at most; a longer sample says one stretch after the other."""


def echoed(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Say every stretch of at most :data:`LONGEST` tokens twice: a, b, c become a, a, b, b, as far as there is room.

    Args:
        tokens: ``[n, s]`` int64.

    Returns:
        ``[n, s]`` int64 of them, and ``[n, s]`` bool, the positions that predict a token which is said again and which
        what came before tells.
    """
    length = tokens.shape[1]
    step = min(LONGEST, length // 2)
    if not step:
        return tokens, torch.zeros_like(tokens, dtype=torch.bool)
    places = torch.arange(length, device=tokens.device)
    within = places % (2 * step)
    said = places // (2 * step) * step + places % step
    return tokens[:, said], ((within >= step) & (within < 2 * step - 1)).expand(len(tokens), -1)
