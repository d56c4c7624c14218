"""Several prompts answered at once, each as it would be alone.

Prompts are padded on the left. The mask hides the padding from attention, and transformers counts positions from the
mask, so that RoPE begins with each prompt's own first token; a sliding window counts places, whose distances padding
does not change. What is left of a batch is the order in which a matrix product adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nemo_minitron.config.sections import Inference


def padded(prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) ``[b, s]`` of ``b`` prompts, the longest of ``s`` tokens; the mask is 0 where there is padding.

    A prompt is padded with its own first token: ``inference.repetition_penalty`` looks at every id, hidden or not.
    """
    width = max(map(len, prompts))
    ids = [[prompt[0]] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


class Draw(LogitsProcessor):
    """Leaves one token of each row, drawn by the row's own generator, so that no other prompt changes what is drawn.

    Args:
        options: temperature above 0, ``top_k``, ``top_p``, in whose order transformers has them.
        seed: of the drawing; numbers: of the prompts, which tell their generators apart.
    """

    def __init__(self, options: Inference, seed: int, numbers: Sequence[int]) -> None:
        self._generators = [np.random.default_rng([seed % 2**64, number]) for number in numbers]
        steps: list[Any] = [TemperatureLogitsWarper(float(options.temperature))]
        steps += [TopKLogitsWarper(options.top_k)] if options.top_k else []
        steps += [TopPLogitsWarper(options.top_p)] if options.top_p < 1 else []
        self._warp: Any = LogitsProcessorList(steps)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``[b, V]`` that are 0 for the drawn token and minus infinity for all others."""
        below = self._warp(input_ids, scores).double().softmax(-1).cumsum(-1)
        shares = [[1 - generator.random()] for generator in self._generators]  # above 0: an impossible token is not met
        wanted = below[:, -1:] * torch.tensor(shares, dtype=below.dtype, device=below.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, torch.searchsorted(below, wanted), 0.0)


class Room(StoppingCriteria):
    """Ends each row after its own number of new tokens.

    Args:
        width: tokens of the padded prompts; rooms: most new tokens of each row.
    """

    def __init__(self, width: int, rooms: Sequence[int]) -> None:
        self._width, self._rooms = width, torch.tensor(rooms)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:  # type: ignore[override]
        """Which rows have no room, ``[b]``."""
        return (self._rooms <= input_ids.shape[1] - self._width).to(input_ids.device)
