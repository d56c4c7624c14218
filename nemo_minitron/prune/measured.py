"""What the guard of compensated pruning goes by: samples held back from every solve, and losses measured on them.

There are two kinds of samples: text drawn from the calibration data, and text that the model wrote itself
(:mod:`nemo_minitron.importance.own_text`), which shows whether re-solved weights hold on text unlike the first. How
losses come about is :mod:`nemo_minitron.prune.guard`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from nemo_minitron.errors import MinitronError

KINDS = {"calibration": "calibration text", "own": "the model's own text"}
"""Kinds of samples, in the order in which scores hold them, and how people are told of them."""
ONE_OF = 16
"""Samples of a kind of which one is held back."""
MOST_NATS, DIGITS = 1e6, 6
"""A larger loss, or one that is no number, is taken for this; decimals that are kept."""


@dataclass(frozen=True)
class Measured:
    """Losses on the samples of one kind that were held back, nats/token.

    Attributes:
        tokens: that were predicted. teacher, cut, resolved: losses of the source, and of the student with weights
            that are cut and that are re-solved.
    """

    tokens: int
    teacher: float
    cut: float
    resolved: float

    @classmethod
    def of_sums(cls, tokens: int, teacher: float, cut: float, resolved: float) -> Measured:
        """Means of summed losses, nats."""
        means = (nats / tokens for nats in (teacher, cut, resolved))
        return cls(tokens, *(round(mean, DIGITS) if mean <= MOST_NATS else MOST_NATS for mean in means))


Losses = Mapping[str, Measured]
"""Losses by kind; one of which nothing could be held back is not there."""


def hold_out(samples: int, own: int) -> tuple[int, ...]:
    """Which samples nothing is solved on: of each kind the last sixteenth, and none of a kind that has only one.

    Args:
        samples: in all. own: how many of the last of them the model wrote itself.
    """
    held: list[int] = []
    for first, end in ((0, samples - own), (samples - own, samples)):
        if end - first > 1:
            held += range(end - -(-(end - first) // ONE_OF), end)
    return tuple(held)


def worse(losses: Losses) -> bool:
    """Whether re-solved weights lose more than cut ones on either kind."""
    return any(found.resolved > found.cut for found in losses.values())


def describe(losses: Losses) -> str:
    """Losses in a few words: ``4.1050 cut, 3.4801 re-solved on calibration text (511 tokens); …``."""
    return "; ".join(
        f"{found.cut:.4f} cut, {found.resolved:.4f} re-solved on {KINDS[kind]} ({found.tokens:,} tokens)"
        for kind, found in losses.items()
    )


def to_section(losses: Losses) -> dict[str, dict[str, int | float]]:
    """The section of a plan file."""
    return {kind: asdict(found) for kind, found in losses.items()}


def from_section(section: object) -> dict[str, Measured]:
    """Read :func:`to_section`; None, of a plan that says nothing of it, is empty.

    Raises:
        MinitronError: a kind that is not known, or anything but the numbers of :class:`Measured`.
    """
    if section is None:
        return {}
    if not isinstance(section, dict) or not section.keys() <= KINDS.keys():
        raise MinitronError(f"measured: expected keys of {', '.join(KINDS)}, found {section!r:.80}")
    found = {}
    for kind in KINDS:
        if kind in section:
            found[kind] = _measured(kind, section[kind])
    return found


def _measured(kind: str, numbers: object) -> Measured:
    fields = Measured.__dataclass_fields__
    if not isinstance(numbers, dict) or numbers.keys() != fields.keys():
        raise MinitronError(f"measured.{kind}: expected {', '.join(fields)}, found {numbers!r:.80}")
    for name, value in numbers.items():
        kind_of_number, most = (int, 1 << 53) if name == "tokens" else (float, MOST_NATS)
        if type(value) is not kind_of_number or not (name == "tokens") <= value <= most:
            raise MinitronError(
                f"measured.{kind}.{name}: expected {kind_of_number.__name__} up to {most:g}, found {value!r:.80}"
            )
    return Measured(**numbers)
