"""KL(q ‖ p) over the teacher's ``distill.top_k`` likeliest tokens and one bucket for all others, so that both sides
remain distributions: nothing is renormalised away."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.distill.loss import Divergence, Loss, Mix, Reduction
from nemo_minitron.distill.shard import column_of, gather, keep, scatter_add
from nemo_minitron.distill.top_k import TopK, top_k_of


class TopKForwardKL(Loss):
    name = "topk"
    learns_from = TopK

    def of_logits(self, student: Tensor, teacher: Tensor, mix: Mix, reduction: Reduction) -> Divergence:
        """The teacher's head is found first, which takes three collectives more."""
        return self.of_answers(student, top_k_of(teacher, mix.top_k, reduction.shard), mix, reduction)

    def of_answers(self, student: Tensor, teacher: TopK, mix: Mix, reduction: Reduction) -> Divergence:
        """Two collectives: the student's logits of the K tokens, and the sum of its tail."""
        shard = reduction.shard
        column, ours = shard.columns(teacher.tokens, student.shape[1])
        chosen = parallel.all_reduce(gather(student, column, ours), shard.group).double()
        p = student.exp_()
        keep(p, column, ~ours)  # what is left is the tail
        (tail,) = reduction.sums(p.sum(-1))
        z_s = tail + chosen.exp().sum(-1)
        log_q, log_p = teacher.log_probs.double(), chosen - z_s.log().unsqueeze(-1)
        log_q_tail, log_p_tail = teacher.log_tail.double(), tail.clamp(min=torch.finfo(p.dtype).tiny).log() - z_s.log()
        q_tail = log_q_tail.exp()
        in_tail = torch.where(q_tail > 0, q_tail * (log_q_tail - log_p_tail), 0.0)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1) + in_tail

        def slope() -> Tensor:
            p.mul_(column_of((1.0 - (log_q_tail - log_p_tail).exp()) / z_s, p))
            difference = (log_p.exp() - log_q.exp()).to(p.dtype)
            return scatter_add(p, column, ours, difference)

        return Divergence(kl, z_s, slope)


LOSS = TopKForwardKL()
