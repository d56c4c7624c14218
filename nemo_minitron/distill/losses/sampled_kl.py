r"""KL(q ‖ p) from ``distill.teacher_samples`` tokens that were drawn from the teacher's q, unbiased (see
:mod:`nemo_minitron.distill.sampled`): Σ w·(log q − log p) over the drawn tokens, whose gradient is p − Σ w·e.

One number may be below 0; means over tokens estimate the KL. With the teacher itself at hand it is forward KL."""

from __future__ import annotations

from torch import Tensor

from nemo_minitron.distill.loss import Divergence, Mix, Reduction
from nemo_minitron.distill.losses.forward_kl import ForwardKL
from nemo_minitron.distill.sampled import Sampled
from nemo_minitron.distill.shard import column_of, gather, scatter_add


class SampledKL(ForwardKL):
    name = "sampled_kl"
    learns_from = Sampled

    def of_answers(self, student: Tensor, teacher: Sampled, mix: Mix, reduction: Reduction) -> Divergence:
        """One collective."""
        column, ours = reduction.shard.columns(teacher.tokens, student.shape[1])
        weights = teacher.log_weights.double().exp()
        chosen = (weights * gather(student, column, ours).double()).sum(-1)
        p = student.exp_()
        chosen, z_s = reduction.sums(chosen.to(p.dtype), p.sum(-1))
        entropy = (weights * teacher.log_probs.double()).sum(-1)

        def slope() -> Tensor:
            return scatter_add(p.mul_(column_of(1 / z_s, p)), column, ours, -weights)

        return Divergence(entropy - chosen + z_s.log(), z_s, slope)


LOSS = SampledKL()
