"""KL(q ‖ p): the teacher's distribution q is covered by the student's p (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

from torch import Tensor

from nemo_minitron.distill.loss import Divergence, Loss, Mix, Reduction
from nemo_minitron.distill.shard import column_of


class ForwardKL(Loss):
    name = "forward_kl"
    kl = "forward"

    def of_logits(self, student: Tensor, teacher: Tensor, mix: Mix, reduction: Reduction) -> Divergence:
        """One collective."""
        q = teacher.exp()
        distance = teacher.sub_(student).mul_(q).sum(-1)
        p = student.exp_()
        distance, z_t, z_s = reduction.sums(distance, q.sum(-1), p.sum(-1))

        def slope() -> Tensor:  # p/Z_s − q/Z_t, exactly 0 where both are equal
            return p.mul_(column_of(1 / z_s, p)).sub_(q.mul_(column_of(1 / z_t, q)))

        return Divergence(distance / z_t + (z_s.log() - z_t.log()), z_s, slope)


LOSS = ForwardKL()
