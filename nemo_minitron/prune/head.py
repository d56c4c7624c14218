"""The student's final norm and output layer, the last step of :mod:`nemo_minitron.prune.resolve`.

Where hidden channels were pruned, the final norm is rescaled per channel and an untied output layer solved for the
student's normed stream, as ``linear_qkv`` and ``linear_fc1`` are. Then the final norm is scaled by one number, under
which the calibration tokens are most likely: what a student has lost shows as logits that are too confident. At last
its channels are weighted anew (:mod:`nemo_minitron.prune.gain`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.model import layout
from nemo_minitron.model.next_token import loss_sums
from nemo_minitron.prune.frame import ROWS_AT_ONCE, TINY, Frame, divisible
from nemo_minitron.prune.gain import likelier

SCALES = tuple(0.75 + step / 32 for step in range(13))
"""Scales of the final norm that are tried; the best is refined by the parabola through it and its neighbours."""
SCALE_TOKENS = 8192
"""Number of the job's calibration tokens that are predicted for that, evenly spread."""
SCALE_PULL = 256.0
"""Towards a scale of 1, in nats per square of the distance: worth some 64 tokens, so that a handful decides nothing."""


def write_head(frame: Frame, student: Tensor, teacher: Tensor, changed: bool) -> tuple[Tensor, Tensor]:
    """Solve and write the final norm and, where it is untied, the output layer.

    Args:
        student: ``[n, s, k]`` and teacher: ``[n, s, H]`` float32, the streams that leave the last layer.
        changed: whether they differ.

    Returns:
        The student's final norm ``[k]`` and output layer ``[V, k]`` as they are stored, float32, without padded rows.
    """
    gain, output = _solved(frame, student, teacher)
    table = frame.cut(layout.EMBEDDING, None, frame.read(layout.EMBEDDING)) if output is None else output
    table = frame.rounded(table[: frame.plan.source.vocab_size])
    if frame.ridge.rescale and changed:
        gain = gain * _scale(frame, student, frame.rounded(gain), table)
    if frame.ridge.regain and changed:
        gain = likelier(frame, student, frame.rounded(gain), table)
    frame.write(layout.FINAL_NORM, None, gain)
    if output is not None:
        frame.write(layout.OUTPUT, None, output)
    return frame.rounded(gain), table


def _solved(frame: Frame, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weights of the final norm ``[k]``, and of the output layer ``[Vp, k]`` where that is untied."""
    source = frame.plan.source
    gain = frame.read(layout.FINAL_NORM).float()
    tied = source.share_embeddings_and_output_weights
    output = None if tied else frame.read(layout.OUTPUT)
    if not frame.narrower:
        return gain, output
    moment, cross = frame.normed_moments(student, teacher, 2 * source.num_layers - 1)
    cut = frame.cut(layout.FINAL_NORM, None, gain)
    if output is None:
        own = (cross * gain @ frame.basis.up.double()).diagonal()
        scale = (own / moment.diagonal().clamp_min(TINY)).float()
        return torch.where(scale == 0, cut, scale), None  # its sign may be either
    safe = frame.rounded(divisible(cut * gain.square().mean().sqrt() if frame.turned else cut))
    parts = []
    for start in range(0, len(output), ROWS_AT_ONCE):
        solved = frame.solve_reader(moment, cross, output[start : start + ROWS_AT_ONCE].float() * gain)
        parts.append((solved / safe).to(frame.dtype))
    return safe, torch.cat(parts)


def _scale(frame: Frame, student: Tensor, gain: Tensor, table: Tensor) -> float:
    """Find the scale of the final norm ``gain [k]`` with the least cross entropy of the calibration tokens.

    The loss is convex in the scale, a log-sum of exponentials of linear functions: from 1 its slope leads down to the
    least of :data:`SCALES`, and the others need not be tried. The same bits on every grid, as :func:`loss_sums` are.
    """
    epsilon, predicted = frame.plan.source.layernorm_epsilon, frame.next_tokens(student, SCALE_TOKENS)
    known: dict[int, float] = {}

    def try_all(numbers: Sequence[int]) -> None:
        scales = torch.tensor([SCALES[number] for number in numbers], dtype=torch.float64, device=frame.device)
        losses = torch.zeros_like(scales)
        for sample in frame.solved:
            losses += loss_sums(*predicted(sample), gain, table, epsilon, scales.tolist())
        losses = parallel.all_reduce(losses, frame.group) + SCALE_PULL * (scales - 1).square()
        known.update(zip(numbers, losses.tolist(), strict=True))

    here = SCALES.index(1.0)
    while missing := [number for number in _around(here) if number not in known]:
        try_all(missing)
        here = min(sorted(known), key=known.__getitem__)
    near = _around(here)
    return _lowest([SCALES[number] for number in near], [known[number] for number in near])


def _around(number: int) -> list[int]:
    """A scale's number and its neighbours'."""
    return [near for near in (number - 1, number, number + 1) if 0 <= near < len(SCALES)]


def _lowest(points: Sequence[float], values: Sequence[float]) -> float:
    """Where the parabola through the least of ``values`` and its neighbours is lowest; points are evenly spaced."""
    best = min(range(len(values)), key=values.__getitem__)
    if best in (0, len(values) - 1):
        return points[best]
    before, least, after = values[best - 1 : best + 2]
    bend = before - 2 * least + after
    return points[best] + (points[1] - points[0]) * (before - after) / (2 * bend) if bend > 0 else points[best]
