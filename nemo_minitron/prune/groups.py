"""Choose query groups by the loss of the model without them: run it, on this job's processes, with progress shown.

The way of choosing is :mod:`nemo_minitron.importance.group_loss`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nemo_minitron import runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.importance.group_loss import GroupLoss, eliminate, passes
from nemo_minitron.importance.scores import Scores
from nemo_minitron.jobs.progress import progress_bar
from nemo_minitron.prune.choose import WEIGHTING
from nemo_minitron.prune.plan import Compensation
from nemo_minitron.prune.tried import Tried


def groups_by_loss(
    reader: NemoReader, scores: Scores, layers: Sequence[int], count: int, *, tokens: int, half: bool = False
) -> np.ndarray:
    """Worth of every query group, once ``count`` of each of ``layers``, 0-based, were removed one after the other.

    Losses are measured on about ``tokens`` tokens of the scores, which hold some, half of them said twice
    (:class:`nemo_minitron.prune.tried.Tried`). ``linear_proj`` is re-solved on all of them, weighted as compensation
    weights them. Every process of the job takes part, each with its share of the samples; progress is shown.

    Args:
        half: matrix products in bfloat16.

    Returns:
        ``[L, G]`` float64, as :func:`nemo_minitron.importance.group_loss.eliminate`.
    """
    assert scores.sensitivity is not None
    share = Tried.of(scores, tokens)
    weights = torch.tensor(scores.sensitivity[0::2])[:, share.mine].pow(WEIGHTING)  # of the stream after the attention
    losses = GroupLoss(
        reader,
        share.tokens,
        share.fitted,
        weights.to(runtime.device()),
        ridge=Compensation.attention,
        counted=share.counted,
        half=half,
        group=share.group,
    )
    work = passes(losses, layers, count)
    with progress_bar(work, "query groups", "sample", show=runtime.rank() == 0) as bar:
        losses.progress = bar.update
        return eliminate(losses, layers, count)
