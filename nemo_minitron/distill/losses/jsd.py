"""Generalised Jensen-Shannon divergence β KL(q ‖ m) + (1−β) KL(p ‖ m), m = β q + (1−β) p, of teacher q and student p
(GKD, arXiv 2306.13649); β is ``distill.jsd_beta``."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_minitron.distill.loss import Divergence, Loss, Mix, Reduction
from nemo_minitron.distill.shard import column_of


class JSD(Loss):
    name = "jsd"

    def of_logits(self, student: Tensor, teacher: Tensor, mix: Mix, reduction: Reduction) -> Divergence:
        """Two collectives: logits must be normalised before the mixture is known.

        With d = log q − log p: log(p/m) = −log(β eᵈ + 1 − β), written so that nothing overflows and d = 0 gives 0.
        """
        beta = mix.jsd_beta
        z_t, z_s = reduction.sums(teacher.exp().sum(-1), student.exp().sum(-1))
        teacher.sub_(column_of(z_t.log(), teacher))
        student.sub_(column_of(z_s.log(), student))
        p, q = student.exp(), teacher.exp()
        d = teacher.sub_(student)
        weight = (d > 0).to(d.dtype).mul_(1.0 - 2.0 * beta).add_(beta)  # 1 − β where d > 0, β elsewhere
        shared = d.abs().neg_().expm1_().mul_(weight).log1p_().neg_()  # log(q/m) where d > 0, log(p/m) elsewhere
        log_p_m = shared - d.clamp(min=0.0)
        log_q_m = d.add_(log_p_m)
        terms = torch.mul(p, log_p_m, out=student)
        of_q, of_p = reduction.sums(log_q_m.mul_(q).sum(-1), terms.sum(-1))

        def slope() -> Tensor:
            return terms.sub_(p.mul_(column_of(of_p, p))).mul_(1.0 - beta)

        return Divergence(beta * of_q + (1.0 - beta) * of_p, z_s, slope)


LOSS = JSD()
