"""Choose layers by the loss of the model without them: run it, on this job's processes, with progress shown.

The ways of choosing are :mod:`nemo_minitron.importance.layer_loss`'s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nemo_minitron import runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.config.sections import Prune
from nemo_minitron.importance.layer_loss import (
    TRIED,
    LayerLoss,
    Removed,
    Step,
    contiguous,
    leave_one_out,
    search,
)
from nemo_minitron.importance.scores import Scores, with_tokens
from nemo_minitron.jobs.progress import progress_bar
from nemo_minitron.moments import loss_shares
from nemo_minitron.prune.tried import Tried

BY_LOSS: dict[str, Callable[[LayerLoss, int, int], list[Step]]] = {
    "leave_one_out": lambda losses, count, beam: leave_one_out(losses, count),
    "contiguous_loss": lambda losses, count, beam: contiguous(losses, count),
    "greedy": lambda losses, count, beam: search(losses, count),
    "beam": search,
}
"""What each way of ``LAYER_SELECTIONS`` that goes by loss removes, up to ``count`` layers; one heeds ``beam``."""


def drop_by_loss(reader: NemoReader, prune: Prune, num_layers: int, scores: Scores | None, half: bool) -> list[int]:
    """Layers to drop so that ``num_layers`` stay, 1-indexed, by the loss without them; every process takes part."""
    whole, steps = layers_by_loss(
        reader,
        prune.layer_selection,
        reader.shape.num_layers - num_layers,
        scores,
        tokens=prune.layer_tokens,
        beam=prune.beam_width,
        stand_ins=prune.compensate is not False,
        half=half,
    )
    if runtime.rank() == 0:
        for step in steps:
            removed = ", ".join(str(layer + 1) for layer in step.removed)
            print(f"without layers {removed}: loss {step.loss:.4f} ({step.loss - whole:+.4f})")
    return [layer + 1 for layer in steps[-1].removed]


def layers_by_loss(
    reader: NemoReader,
    selection: str,
    count: int,
    scores: Scores | None,
    *,
    tokens: int,
    beam: int = Prune.beam_width,
    stand_ins: bool = True,
    half: bool = False,
    section: str = "prune",
) -> tuple[float, list[Step]]:
    """Loss of the whole model and without up to ``count`` layers, on about ``tokens`` tokens of the scores.

    Half of them say themselves twice, and half of the others the model wrote itself, where scores have such
    (:class:`nemo_minitron.prune.tried.Tried`); stand-ins of removed layers are fitted on all tokens of the scores.
    Where only some tokens count, the loss is theirs, and the others weigh in the fit what it depends on them
    (:func:`nemo_minitron.moments.loss_shares`).

    Every process of the job takes part, each with its share of the samples; progress is shown.

    Args:
        selection: one of ``BY_LOSS``; the last step is its answer.
        beam: sets that ``beam`` keeps at every size.
        section: of the keys that errors name.

    Raises:
        MinitronError: the scores hold no calibration tokens.
    """
    scores = with_tokens(scores, f"{section}.layer_selection={selection}")
    share = Tried.of(scores, tokens)
    layers = reader.shape.num_layers
    work = _sets(selection, layers, count, beam) * (layers + reader.shape.layers_of_head()) + layers * int(stand_ins)
    with progress_bar(work, selection, "layer", show=runtime.rank() == 0) as bar:
        losses = LayerLoss(
            reader,
            share.tokens,
            stand_ins=share.fitted if stand_ins else None,
            counted=share.counted,
            weights=_weights(scores, share.mine),
            half=half,
            group=share.group,
            progress=bar.update,
        )
        (whole,) = losses([Removed()])
        steps = BY_LOSS[selection](losses, count, beam)
        bar.total = bar.done
    return whole, steps


def _weights(scores: Scores, mine: slice) -> torch.Tensor | None:
    """Weights ``[L, m, s]`` of the tokens that stand-ins are fitted on; None where all count."""
    if scores.counted is None or scores.sensitivity is None:
        return None
    after = torch.tensor(scores.sensitivity[1::2])[:, mine]  # of the stream that leaves each layer
    return loss_shares(after, torch.tensor(scores.counted)[mine].expand_as(after)).to(runtime.device())


def _sets(selection: str, layers: int, count: int, beam: int) -> int:
    """About how many sets of removed layers are run, the empty one included."""
    if selection == "leave_one_out":
        return layers + 1
    if selection == "contiguous_loss":
        return layers - count + 2
    return 1 + layers + (count - 1) * TRIED * (beam if selection == "beam" else 1)
