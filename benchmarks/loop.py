"""The training loop of the benchmarks: an HF model in plain torch learns from text, or from a teacher that ran once.

Weights and AdamW's state are float32, products bfloat16. A teacher is its final hidden states for the batches to come,
so that all students that see the same batches pay for its forward pass once.

Legend: b sequences of a batch, s tokens of each, H the model's hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WARM_UP = 5
"""Steps over which the learning rate rises linearly."""


@dataclass(frozen=True)
class Answers:
    """A teacher's ``hidden`` states ``[b, s, H]``, bfloat16, one per batch, and its output ``head`` ``[V, H]``."""

    hidden: list[Tensor]
    head: Tensor


def check_device(device: str) -> None:
    """Leave with one line, before the work, where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: expected a CUDA device, found none")


def load(checkpoint: Path, device: str = "cpu") -> Any:
    """The transformers model of a ``.nemo``, float32; the HF folder that it goes through stays beside it."""
    from transformers import AutoModelForCausalLM

    from nemo_minitron.convert import convert

    folder = convert(checkpoint, checkpoint.with_name(f"{checkpoint.stem}-hf"))
    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).to(device)


def answers(teacher: Any, batches: Sequence[Tensor]) -> Answers:
    """What the teacher says of batches ``[b, s]``; its head turns hidden states into logits in every step."""
    with torch.no_grad(), _autocast(teacher):
        hidden = [teacher.model(batch.to(teacher.device)).last_hidden_state.bfloat16() for batch in batches]
    return Answers(hidden, teacher.lm_head.weight.detach())


def constant(lr: float, steps: int) -> list[float]:
    """The learning rate of every step, without an end in sight: points of the run can be read as runs of their own."""
    return [lr * min(1.0, step / WARM_UP) for step in range(1, steps + 1)]


def decaying(lr: float, steps: int) -> list[float]:
    """Of every step of a run that counts at its end: after the warm-up linearly down to a tenth."""
    rest = max(1, steps - WARM_UP)
    return [rate * (1.0 - 0.9 * max(0, at + 1 - WARM_UP) / rest) for at, rate in enumerate(constant(lr, steps))]


def train(
    model: Any,
    batches: Sequence[Tensor],
    rates: Sequence[float],
    teacher: Answers | None = None,
    after: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """One AdamW step for each of ``rates``.

    Args:
        model: trained in place. batches: ``[b, s]`` int64, at least as many as rates.
        teacher: its answers to these batches: forward KL at temperature 1; None: cross entropy of the next token.
        after: told the number of steps that are done.

    Returns:
        The model's cross entropy on each batch before the step on it, nats/token.
    """
    from nemo_minitron.distill.block import CROSS_ENTROPY
    from nemo_minitron.distill.fused import Head, head_losses
    from nemo_minitron.distill.loss import Mix

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    found = []
    for step, rate in enumerate(rates):
        tokens = batches[step].to(model.device)
        labels = torch.cat((tokens[:, 1:], tokens[:, :1]), dim=1)
        counted = torch.ones(tokens.shape, device=tokens.device)
        counted[:, -1] = 0.0  # its label is the first token
        everywhere = torch.ones_like(counted)  # a teacher has something to say there too
        weights = counted if teacher is None else everywhere
        with _autocast(model):
            hidden = model.model(tokens).last_hidden_state
            losses = head_losses(
                Head(hidden.float().transpose(0, 1), model.lm_head.weight),
                labels,
                weights / weights.sum(),
                vocab_size=model.config.vocab_size,
                teacher=teacher and Head(teacher.hidden[step].float().transpose(0, 1), teacher.head),
                mix=Mix() if teacher else CROSS_ENTROPY,
            )
        losses.loss.backward()
        found.append(float((losses.terms["lm_loss"] * counted).sum() / counted.sum()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after(step + 1)
    return found


def losses_of(model: Any, blocks: Tensor) -> list[float]:
    """Mean next-token loss of each block ``[n, s]``, nats/token."""
    found: list[float] = []
    with torch.no_grad(), _autocast(model):
        for block in blocks.split(2):
            block = block.to(model.device)
            logits = model(block[:, :-1]).logits.float().flatten(0, 1)
            losses = torch.nn.functional.cross_entropy(logits, block[:, 1:].flatten(), reduction="none")
            found += losses.view(len(block), -1).mean(dim=1).tolist()
    return found


def loss_of(model: Any, blocks: Tensor) -> float:
    """Their mean: of all tokens, for blocks are of one length."""
    found = losses_of(model, blocks)
    return sum(found) / len(found)


def _autocast(model: Any) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16)
