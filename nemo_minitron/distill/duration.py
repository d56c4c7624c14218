"""How long a distillation would take, from its operations and from rates that were measured, on cards that they are of.

A token takes the teacher's forward pass and three of the student's, heads and causal attention included, and what is
recomputed of the student's layers. What a card makes of that depends on the size of the models: small ones leave it
idle. So a run is held against measured ones of about its size, or between a smaller and a larger one; where there is
neither, nothing is said of that card. Validation, checkpoints and the start are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_minitron.distill.run import Run

NEAR = 2.0
"""Factor within which the operations of a token are about those of a measured run."""


@dataclass(frozen=True)
class Rate:
    """A measured distillation in bf16 on one card.

    Attributes:
        gflop: operations of a token, 10⁹. tokens_per_s: least and most over repeats and settings.
        what: what was distilled.
    """

    card: str
    gflop: float
    tokens_per_s: tuple[float, float]
    what: str

    @property
    def tflops(self) -> tuple[float, float]:
        """10¹² operations a second, least and most."""
        least, most = self.tokens_per_s
        return self.gflop * least / 1e3, self.gflop * most / 1e3


H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
RATES = (
    # benchmarks/results/gpu_lean_h100.json, whole runs of adamw; gpu_distill_step_h100.json, without recomputation or
    # torch.compile; kd_step_llama_1b_h200.json, forward and backward
    Rate(H100, 0.987, (37_900, 49_000), "SmolLM2-135M teaching 108M"),
    Rate(H100, 44.0, (10_270, 10_910), "an 8B teaching 4.5B"),
    Rate(H200, 6.13, (54_700, 61_500), "a 1.2B teaching 0.5B, without the optimizer"),
)


@dataclass(frozen=True)
class Speed:
    """Least and most 10¹² operations a second that a card may make of a run, and why."""

    least: float
    most: float
    why: str


def gflop_per_token(run: Run) -> float:
    """Operations of a token of a run, 10⁹, a multiply-add counted as two."""
    student = run.student.forward_flops_per_token(run.seq_length)
    teacher = 0.0 if run.teacher is None else run.teacher.forward_flops_per_token(run.seq_length)
    again = 0.0
    if run.recompute:  # of layers, not of the head
        layers = student - 2.0 * run.student.hidden_size * run.student.padded_vocab_size
        again = layers * (min(1.0, run.recompute_layers / run.student.num_layers) if run.recompute_block else 1.0)
    return (teacher + 3.0 * student + again) / 1e9


def speed(rates: Sequence[Rate], gflop: float) -> Speed | None:
    """What rates of one card say of a run with so many operations a token; None where they say nothing."""
    near = [rate for rate in rates if 1 / NEAR <= gflop / rate.gflop <= NEAR]
    below = max((rate for rate in rates if rate.gflop < gflop), key=lambda rate: rate.gflop, default=None)
    above = min((rate for rate in rates if rate.gflop > gflop), key=lambda rate: rate.gflop, default=None)
    if near:
        least, most = min(rate.tflops[0] for rate in near), max(rate.tflops[1] for rate in near)
        return Speed(least, most, f"measured on {' and '.join(rate.what for rate in near)}")
    if below and above:
        least, most = sorted((below.tflops[0], above.tflops[1]))
        return Speed(least, most, f"between {below.what} and {above.what}, both measured")
    if below:
        return Speed(*below.tflops, f"measured on smaller ones, {below.what}")
    return None


def table(run: Run, steps: int, device: str | None = None) -> str:
    """Lines for people: how long ``steps`` of a run take on each card of which there are rates.

    Args:
        device: the GPU of this machine as torch names it, None on a CPU. It is told where no rate is of it.
    """
    samples = run.micro_batch_size * run.micro_batches * run.data_parallel
    tokens, gflop = steps * samples * run.seq_length, gflop_per_token(run)
    count = run.tensor_parallel * run.pipeline_parallel * run.data_parallel
    lines = [
        f"time of {steps:,} steps of {samples:,} x {run.seq_length:,} tokens, {tokens:,} in all, in bf16 on GPUs; "
        f"{gflop:,.3g} GFLOP a token"
    ]
    for card in dict.fromkeys(rate.card for rate in RATES):
        found = speed([rate for rate in RATES if rate.card == card], gflop)
        if found is None:
            lines.append(f"  {card}: no rate was measured on models as small as these")
            continue
        seconds = [tokens * gflop / 1e3 / rate / count for rate in (found.most, found.least)]
        rate = f"{found.least:,.0f} to {found.most:,.0f} TFLOP/s{' each' if count > 1 else ''}"
        lines.append(f"  {count} x {card}: about {_span(*seconds)}, at {rate}, {found.why}")
    if count > 1:
        lines.append(f"  rates are of one card: what {count} lose to each other was not measured")
    if device not in {rate.card for rate in RATES}:
        lines.append(f"  this machine, {device or 'a CPU'}: no rate was measured")
    return "\n".join(lines)


def _span(least: float, most: float) -> str:
    """Seconds as people say them: two digits, in one unit where the smaller is at least 1 of it."""
    units = (("s", 1.0, 90.0), ("min", 60.0, 90 * 60.0), ("h", 3600.0, 36 * 3600.0), ("days", 86400.0, float("inf")))
    unit, size, _ = next(one for one in units if most < one[2])
    lower, lower_size, _ = next(one for one in units if least < one[2])
    if least >= size:
        lower, lower_size = unit, size
    low, high = (f"{float(f'{seconds / of:.2g}'):,g}" for seconds, of in ((least, lower_size), (most, size)))
    if lower != unit:
        return f"{low} {lower} to {high} {unit}"
    return f"{high} {unit}" if low == high else f"{low} to {high} {unit}"
