"""KL(p ‖ q): the student's distribution p stays where the teacher's q is (MiniLLM, arXiv 2306.08543)."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_minitron.distill.loss import Divergence, Loss, Mix, Reduction
from nemo_minitron.distill.shard import column_of


class ReverseKL(Loss):
    name = "reverse_kl"
    kl = "reverse"

    def of_logits(self, student: Tensor, teacher: Tensor, mix: Mix, reduction: Reduction) -> Divergence:
        """One collective."""
        z_t = teacher.exp().sum(-1)
        p = student.exp()
        log_ratio = student.sub_(teacher)  # log p − log q, but for a constant per token
        distance, z_t, z_s = reduction.sums(torch.mul(p, log_ratio, out=teacher).sum(-1), z_t, p.sum(-1))

        def slope() -> Tensor:
            return log_ratio.sub_(column_of(distance / z_s, p)).mul_(p).mul_(column_of(1 / z_s, p))

        return Divergence(distance / z_s + (z_t.log() - z_s.log()), z_s, slope)


LOSS = ReverseKL()
