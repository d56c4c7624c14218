"""What the ranks of a grid do in ``test_packed_chats.py``."""

from __future__ import annotations

from typing import Any

import torch

from tests.nemo.grid_jobs import train


def first_step(
    command: str, source: str, blend: str, folder: str, grid: tuple[int, int, bool], extra: tuple[str, ...], mute: str
) -> dict[str, Any]:
    """Loss, logged values, canonical gradients and texts ``[n, s+1]`` of the first step of a whole training.

    Args:
        blend: prefixes, with weights. mute: ``training`` or ``validation``, none of whose tokens counts.
    """
    from nemo_minitron.nemo import weights
    from nemo_minitron.nemo.model import MinitronGPTModel

    step, get_batch = MinitronGPTModel.training_step, MinitronGPTModel.get_batch
    found: dict[str, Any] = {}
    batches: list[dict[str, torch.Tensor]] = []

    def read(self: Any, *args: Any) -> dict[str, Any]:
        batch = get_batch(self, *args)
        if mute == ("training" if torch.is_grad_enabled() else "validation"):
            batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
        batches.append(batch)
        return batch

    def observe(self: Any, dataloader_iter: Any) -> torch.Tensor:
        batches.clear()
        loss = step(self, dataloader_iter)
        if not found:
            found["loss"] = float(loss)
            found["texts"] = torch.cat([torch.cat((b["tokens"], b["labels"][:, -1:]), 1) for b in batches])
            found["counted"] = torch.cat([b["loss_mask"].sum(1) for b in batches])
            gathered = weights.gather(self, lambda p: p.grad)
            found["gradients"] = {(p.key, layer): gradient.clone() for p, layer, gradient in gathered}
            found["logged"] = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        return loss

    MinitronGPTModel.training_step, MinitronGPTModel.get_batch = observe, read  # this process is the test's own
    train(command, source, blend, folder, grid, 2, extra)
    return found
