"""Llama 3.1's RoPE scaling in a GGUF, which has not its four numbers but their result, a factor per frequency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import LinearScaling, RopeScaling

TENSOR = "rope_freqs.weight"
ARCHITECTURES = ("llama",)
"""Those for which llama.cpp reads the tensor."""
NUMBERS = "minitron.rope_scaling"
"""Key of the four numbers (float64, in the order of :class:`RopeScaling`), which we write where they are not those of
Llama 3.1; llama.cpp goes by the tensor and passes over it."""
_CLOSE = 4e-6  # relative; a few steps of float32, in which both sides were computed


def factors(scaling: RopeScaling, base: float, width: int) -> torch.Tensor:
    """Divisors of the d/2 frequencies: ``[d/2]`` float32, as llama.cpp's converter computes it."""
    frequencies = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    length, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    smooth = (length / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / scaling.factor + smooth)
    result = torch.where(wavelengths > length / low, torch.tensor(scaling.factor), between)
    return torch.where(wavelengths < length / high, torch.tensor(1.0), result).float()


def recovered(
    tensor: np.ndarray, base: float, width: int, numbers: Sequence[float] | None, lengths: Sequence[int], where: str
) -> RopeScaling | None:
    """The scaling under which :func:`factors` gives ``tensor``; None where all factors are 1.

    The numbers as such are not to be had: the same factors follow from others. Tried are those that the file says under
    :data:`NUMBERS`, then Llama 3.1's low 1 and high 4, with the last factor as the factor, for each original length.

    Args:
        tensor: ``[d/2]`` float32. base: of RoPE. width: d, of a head.
        numbers: the value of :data:`NUMBERS`, None without.
        lengths: original lengths that may be meant.

    Raises:
        MinitronError: a wrong size, or no numbers that give these factors.
    """
    if tensor.shape != (width // 2,):
        raise MinitronError(f"{where}: tensor '{TENSOR}' must have the size ({width // 2},), found {tensor.shape}")
    if (tensor == 1).all():
        return None
    largest = float(str(np.float32(tensor[-1])))
    factor = [one for one in (largest, 8.0, 32.0) if one >= 1]  # the last is it, unless all frequencies are high ones
    tried = [RopeScaling(one, 1.0, 4.0, length) for one in factor for length in dict.fromkeys(lengths)]
    if numbers is not None:
        tried.insert(0, _given(numbers, where))
    for scaling in tried:
        expected = factors(scaling, base, width).numpy()
        if (np.abs(expected - tensor) <= _CLOSE * expected).all():  # false for NaN
            return scaling
    raise MinitronError(
        f"{where}: tensor '{TENSOR}' must be the result of Llama 3.1's RoPE scaling with low_freq_factor 1, "
        f"high_freq_factor 4 and an original length of {', '.join(map(str, dict.fromkeys(lengths)))}; "
        f"found other factors, the last {largest:g}; convert the model's HF folder instead"
    )


def linear(values: Mapping[str, Any], where: str) -> LinearScaling | None:
    """The scaling of the keys ``type``, ``factor`` and ``scale_linear``, as llama.cpp reads them.

    A factor without a type is linear, 0 is none, and under the type ``none`` it has no effect; ``scale_linear`` is the
    older name.

    Raises:
        MinitronError: a factor that is not at least 1.
    """
    factor = values["scale_linear"] if values["factor"] is None else values["factor"]
    if values["type"] == "none" or factor in (None, 0, 1):
        return None
    if not isinstance(factor, float) or not 1 < factor < 1e6:
        raise MinitronError(f"{where}: rope.scaling.factor must be at least 1, found {factor!r:.80}")
    return LinearScaling(float(str(np.float32(factor))))


def _given(numbers: Sequence[float], where: str) -> RopeScaling:
    if len(numbers) != 4 or not all(isinstance(one, float) and 0 < one < 1e9 for one in numbers):
        raise MinitronError(f"{where}: {NUMBERS} must be four numbers above 0, found {numbers!r:.80}")
    factor, low, high, length = numbers
    if high <= low or length != int(length):
        raise MinitronError(f"{where}: {NUMBERS} must have low < high and a whole length, found {numbers!r:.80}")
    return RopeScaling(factor, low, high, int(length))
