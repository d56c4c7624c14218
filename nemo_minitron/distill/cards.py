"""What of a run fits on GPUs of several sizes: optimizer, recomputation and micro-batch, in one table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nemo_minitron.distill.memory import CUDA_PROCESS, memory
from nemo_minitron.distill.run import Run
from nemo_minitron.values.model import LEAN

CARDS = (24, 40, 80, 141)
"""Sizes of cards as they are sold, in GB of 10⁹ bytes. They have some 6% more."""
USABLE = 0.95
"""Share of that size for what is planned. torch's allocator held 1.09 to 1.12 times what was in use at its peak when an
8B was distilled on an H100 of 80 GB (benchmarks/results/gpu_distill_step_h100.json), and that card has 85."""


@dataclass(frozen=True)
class Choice:
    """One way to train: ``optimizer`` is ``model.optim.name``, ``half_weights`` ``model.megatron_amp_O2``."""

    optimizer: str
    half_weights: bool
    recompute: bool

    def of(self, run: Run, micro_batch_size: int) -> Run:
        """``run`` in this way, in bfloat16 on a GPU, with the same samples in each step."""
        samples = run.micro_batch_size * run.micro_batches
        return replace(
            run,
            micro_batch_size=micro_batch_size,
            micro_batches=samples // micro_batch_size,
            half=True,
            half_weights=self.half_weights,
            sharded_optimizer=self.optimizer == "mcore_distributed_optim",
            lean=self.optimizer == LEAN,
            recompute=self.recompute,
            recompute_block=False,
            recompute_layers=1,
            fused_swiglu=True,
            device="cuda",
            process=CUDA_PROCESS,
        )

    def fit(self, run: Run, card: int) -> Fit:
        """The largest micro-batch that divides a rank's samples and fits on ``card`` GB, or how much 1 lacks."""
        samples, found = run.micro_batch_size * run.micro_batches, None
        for size in _divisors(samples):
            needed = sum(memory(self.of(run, size)).values())
            if needed > usable(card):
                return found or Fit(0, needed)
            found = Fit(size, needed)
        assert found is not None
        return found


@dataclass(frozen=True)
class Fit:
    """A micro-batch size, 0 where 1 is too large, and the bytes that it, or 1, needs in all."""

    micro_batch_size: int
    needed: int


def choices(run: Run) -> list[Choice]:
    """All ways, the one whose arithmetic is nearest to float32 first; 8-bit moments only on whole models."""
    optimizers = [("adamw", False), ("mcore_distributed_optim", True)]
    if run.tensor_parallel == run.pipeline_parallel == 1:
        optimizers.append((LEAN, True))
    return [Choice(name, half, recompute) for name, half in optimizers for recompute in (False, True)]


def table(run: Run, cards: Sequence[int] = CARDS) -> str:
    """Lines for people: a row for each choice, a column for each card, and what to take on each of them.

    To be taken is what needs no recomputation, a forward pass more in each step; then what comes first in
    :func:`choices`. Where nothing fits, what would if a cache stood for the teacher.
    """
    rows = [(choice, [choice.fit(run, card) for card in cards]) for choice in choices(run)]
    lines = [
        f"largest micro-batch of {run.seq_length} tokens in bf16 on GPUs, and what it takes; "
        f"TP {run.tensor_parallel} x PP {run.pipeline_parallel} x DP {run.data_parallel}",
        f"  {'model.optim.name':<24}{'O2':<7}{'recompute':<11}" + "".join(f"{f'{card} GB':<14}" for card in cards),
    ]
    for choice, fits in rows:
        ways = f"  {choice.optimizer:<24}{_word(choice.half_weights):<7}{'full' if choice.recompute else 'no':<11}"
        lines.append(ways + "".join(f"{_cell(fit, card):<14}" for fit, card in zip(fits, cards, strict=True)))
    lines += [f"{card} GB: {_advice(run, card, [(choice, fits[i]) for choice, fits in rows])}"
              for i, card in enumerate(cards)]  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)


def _advice(run: Run, card: int, found: list[tuple[Choice, Fit]]) -> str:
    fitting = [pair for pair in found if pair[1].micro_batch_size]
    if fitting:
        choice, fit = min(fitting, key=lambda pair: pair[0].recompute)
        return f"{_named(choice)}, micro-batch {_cell(fit, card)}"
    choice, fit = min(found, key=lambda pair: pair[1].needed)
    text = f"nothing fits; {_named(choice)}, {_cell(fit, card)}"
    if run.teacher is None:
        return text
    alone = replace(run, teacher=None)
    cached = _advice(alone, card, [(way, way.fit(alone, card)) for way, _ in found])
    return f"{text}\n  with distill.teacher_cache: {cached}"


def usable(card: int) -> int:
    """Bytes of a card of ``card`` GB that a plan may fill."""
    return int(USABLE * card * 10**9)


def _cell(fit: Fit, card: int) -> str:
    if not fit.micro_batch_size:
        return f"lacks {max(1, round((fit.needed - usable(card)) / 1e9)):,} GB"
    return f"{fit.micro_batch_size} ({fit.needed / 1e9:,.0f} GB)"


def _named(choice: Choice) -> str:
    return f"{choice.optimizer}, {'full' if choice.recompute else 'no'} recompute"


def _word(value: bool) -> str:
    return "true" if value else "false"


def _divisors(number: int) -> Iterator[int]:
    return (size for size in range(1, number + 1) if number % size == 0)
