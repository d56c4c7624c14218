"""The training loop of the benchmarks: an HF model in plain torch learns from text, or from a teacher that ran once.

Weights and AdamW's state are float32, products bfloat16. A teacher is its final hidden states: for all batches to come,
so that all students that see the same batches pay for its forward pass once (:class:`Answers`), or of one batch at a
time, in bounded memory (:func:`answer`).

Legend: b sequences of a batch, s tokens of each, H the model's hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    return Answers([answer(teacher, batch)[0] for batch in batches], teacher.lm_head.weight.detach())


def answer(teacher: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Its hidden states ``[b, s, H]`` of one batch ``[b, s]``, bfloat16, and its head ``[V, H]``."""
    with torch.no_grad(), _autocast(teacher):
        hidden = teacher.model(batch.to(teacher.device)).last_hidden_state.bfloat16()
    return hidden, teacher.lm_head.weight.detach()


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
    from nemo_minitron.distill.loss import Mix

    learner = Learner(model, Mix() if teacher else CROSS_ENTROPY)
    found = []
    for step, rate in enumerate(rates):
        tokens = batches[step].to(model.device)
        labels = torch.cat((tokens[:, 1:], tokens[:, :1]), dim=1)
        counted = torch.ones(tokens.shape, device=tokens.device)
        counted[:, -1] = 0.0  # its label is the first token
        everywhere = torch.ones_like(counted)  # a teacher has something to say there too
        taught = teacher and (teacher.hidden[step], teacher.head)
        terms = learner.learn(tokens, labels, counted if teacher is None else everywhere, rate, taught)
        found.append(float((terms["lm_loss"] * counted).sum() / counted.sum()))
        after(step + 1)
    return found


class Learner:
    """A model and its AdamW, which learn batch by batch and can be put down and taken up again.

    Weights and moments are float32, products bfloat16; gradients are clipped to a norm of 1. Weight decay is for
    matrices and tables alone, as in Megatron.

    Attributes:
        steps: that are done.
    """

    def __init__(
        self, model: Any, mix: Any, *, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0
    ) -> None:
        self.model, self.mix, self.steps = model.train(), mix, 0
        whole = list(model.parameters())
        groups = [
            {"params": [one for one in whole if one.ndim > 1], "weight_decay": weight_decay},
            {"params": [one for one in whole if one.ndim < 2], "weight_decay": 0.0},
        ]
        on_gpu = model.device.type == "cuda"
        self._optimizer = torch.optim.AdamW([one for one in groups if one["params"]], 0.0, betas, fused=on_gpu)

    def learn(
        self, tokens: Tensor, labels: Tensor, weights: Tensor, rate: float, teacher: tuple[Tensor, ...] | None = None
    ) -> dict[str, Tensor]:
        """One step on a batch ``[b, s]`` on the model's device.

        Args:
            labels: ``[b, s]`` of each token. weights: ``[b, s]``, what it counts.
            teacher: its final hidden states ``[b, s, H]`` of the batch, and its output head ``[V, H]``; or what a cache
                keeps of its answers, ``TopK`` or ``Sampled``.

        Returns:
            Named losses per token ``[b, s]``, as ``head_losses`` has them, of the model before the step.
        """
        from nemo_minitron.distill.fused import Head, head_losses

        model, known = self.model, teacher
        if teacher is not None and len(teacher) == 2:
            known = Head(teacher[0].float().transpose(0, 1), teacher[1])
        with _autocast(model):
            hidden = model.model(tokens).last_hidden_state
            losses = head_losses(
                Head(hidden.float().transpose(0, 1), model.lm_head.weight),
                labels,
                weights / weights.sum(),
                vocab_size=model.config.vocab_size,
                teacher=known,
                mix=self.mix,
            )
        losses.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return losses.terms

    def state(self) -> dict[str, Any]:
        """All that :meth:`take_up` needs to go on as if nothing had been."""
        return {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict(), "steps": self.steps}

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` was."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]


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
