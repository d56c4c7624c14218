"""Choose layers by the loss of the model without them: run it, on this job's processes, with progress shown.

The ways of choosing are :mod:`nemo_minitron.importance.layer_loss`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from nemo_minitron import parallel, runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.errors import MinitronError
from nemo_minitron.importance import layer_loss
from nemo_minitron.importance.layer_loss import Step
from nemo_minitron.importance.scores import Scores


def drop_by_loss(
    reader: NemoReader, selection: str, options: dict[str, Any], scores: Scores | None, half: bool
) -> list[int]:
    """Layers to drop, 1-indexed, by the loss without them; every process of the job takes part."""
    whole, steps = layers_by_loss(
        reader,
        selection,
        reader.shape.num_layers - int(options["num_layers"]),
        scores,
        tokens=int(options.get("layer_tokens") or 4096),
        beam=int(options.get("beam_width") or 3) if selection == "beam" else 1,
        stand_ins=options.get("compensate") is not False,
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
    beam: int = 1,
    stand_ins: bool = True,
    half: bool = False,
    section: str = "prune",
) -> tuple[float, list[Step]]:
    """Loss of the whole model and without up to ``count`` layers, on the first ``tokens`` tokens of the scores.

    Stand-ins of removed layers are fitted on all of their tokens.

    Every process of the job takes part, each with its share of the samples; progress is shown.

    Args:
        selection: one of ``LOSS_SELECTIONS``; the last step is its answer. section: of the keys that errors name.

    Raises:
        MinitronError: the scores hold no calibration tokens.
    """
    if scores is None or scores.tokens is None:
        raise MinitronError(
            f"{section}.layer_selection={selection}: the scores hold no calibration tokens to measure the loss on; "
            "run `minitron importance calibration.reconstruction=true`"
        )
    if runtime.world_size() > 1 and parallel.world() is None:
        runtime.init_distributed()
    world = parallel.world()
    samples = max(parallel.size(world), -(-tokens // scores.tokens.shape[1]))
    everything = torch.from_numpy(scores.tokens.astype("int64"))
    mine = slice(runtime.rank(), None, parallel.size(world))
    share, fitted = (part[mine].to(runtime.device()) for part in (everything[:samples], everything))
    total = reader.shape.num_layers
    sets = {"leave_one_out": total + 1, "contiguous_loss": total - count + 2}.get(
        selection, 1 + total + (count - 1) * beam * layer_loss.TRIED
    )
    sets += int(stand_ins)
    with tqdm(total=sets * total, desc=selection, unit="layer", disable=None if runtime.rank() == 0 else True) as bar:
        losses = layer_loss.LayerLoss(
            reader, share, stand_ins=fitted if stand_ins else None, half=half, group=world, progress=bar.update
        )
        (whole,) = losses([layer_loss.Removed()])
        if selection == "leave_one_out":
            steps = layer_loss.leave_one_out(losses, count)
        elif selection == "contiguous_loss":
            steps = layer_loss.contiguous(losses, count)
        else:
            steps = layer_loss.search(losses, count, beam)
        bar.total = bar.n
    return whole, steps
