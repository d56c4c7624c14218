"""The guard of compensated pruning: teacher, cut and re-solved student on samples that nothing is solved on.

Re-solved weights follow what holds in the calibration tokens. Where that holds nowhere else, the student is worse than
a merely cut one, and :mod:`nemo_minitron.prune.student` writes the cut one. To see it,
:mod:`nemo_minitron.prune.resolve` carries the samples of :func:`nemo_minitron.prune.measured.hold_out` along without
solving on them, and here the cut student goes through them beside it, one layer at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import Layer, Rotary
from nemo_minitron.model.next_token import IGNORED, loss_sums, next_labels
from nemo_minitron.prune.cut import rewrite
from nemo_minitron.prune.frame import Frame
from nemo_minitron.prune.measured import KINDS, Measured


class Guard:
    """The cut student's stream ``[m, s, k]`` on this process's m samples that are held back, 0 or more.

    Args:
        frame: whose last m samples they are. embedding: ``[Vp, H]``, the teacher's.
        own: ``[m]`` bool, which of them the model wrote itself.
    """

    def __init__(self, frame: Frame, embedding: Tensor, own: Tensor) -> None:
        self.frame, self.own, self.plan = frame, own.tolist(), frame.plan
        self.first = len(frame.solved)
        """Number of the first sample that is held back."""
        self.tokens = frame.tokens[self.first :]
        self.labels = next_labels(self.tokens, None if frame.counted is None else frame.counted[self.first :])
        table = rewrite(self.plan, layout.EMBEDDING, None, embedding)
        self.cut = frame.rounded(table[self.tokens])

    def follow(self, number: int, teacher: Layer, rotary: Rotary) -> None:
        """Take the cut student through source layer ``number``, which the plan keeps."""
        rows = layout.layer_parameters(self.plan.source)
        cut = {row.key: self.frame.rounded(rewrite(self.plan, row, number, teacher[row])) for row in rows}
        layer = Layer(self.plan.target, cut)
        for sample in range(len(self.cut)):
            self.cut[sample : sample + 1] = layer.forward(self.cut[sample : sample + 1], rotary)

    def measure(self, teacher: Tensor, student: Tensor, gain: Tensor, table: Tensor) -> dict[str, Measured]:
        """What the three lose on tokens that count, by kind; the same bits on every process and grid.

        Args:
            teacher: ``[n, s, H]`` and student: ``[n, s, k]`` float32, the streams of all samples after the last layer.
            gain: ``[k]`` and table: ``[V, k]``, the re-solved student's final norm and output layer as stored.
        """
        source, frame = self.plan.source, self.frame
        parameter = layout.EMBEDDING if source.share_embeddings_and_output_weights else layout.OUTPUT
        whole, norm = frame.read(parameter), frame.read(layout.FINAL_NORM)
        sums = [self._sums(teacher[self.first :], norm.float(), whole[: source.vocab_size].float())]
        cut_norm, cut = (
            frame.rounded(rewrite(self.plan, row, None, tensor))
            for row, tensor in ((layout.FINAL_NORM, norm), (parameter, whole))
        )
        sums.append(self._sums(self.cut, cut_norm, cut[: source.vocab_size]))
        sums.append(self._sums(student[self.first :], gain, table))
        counts = [0, 0]
        for labels, own in zip(self.labels, self.own, strict=True):
            counts[int(own)] += int((labels != IGNORED).sum())
        mine = torch.cat([torch.tensor([counts], dtype=torch.float64, device=frame.device), torch.stack(sums)])
        totals = parallel.all_reduce(mine, frame.group).T.tolist()
        return {
            kind: Measured.of_sums(int(tokens), *nats)
            for kind, (tokens, *nats) in zip(KINDS, totals, strict=True)
            if tokens
        }

    def _sums(self, stream: Tensor, norm: Tensor, table: Tensor) -> Tensor:
        """Summed losses of one model by kind, ``[2]``."""
        found = torch.zeros(2, dtype=torch.float64, device=stream.device)
        for x, labels, own in zip(stream, self.labels, self.own, strict=True):
            found[int(own)] += loss_sums(x[:-1], labels, norm, table, self.plan.source.layernorm_epsilon)[0]
        return found
