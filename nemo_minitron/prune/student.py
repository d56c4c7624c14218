"""The student of a plan, written to its files: what is kept is cut, or re-solved on the calibration tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_minitron import parallel, runtime
from nemo_minitron.checkpoint import NemoReader, NemoWriter
from nemo_minitron.checkpoint.archive import ArchiveWriter
from nemo_minitron.checkpoint.nemo_config import with_kept_layers
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import Staging
from nemo_minitron.importance.scores import Scores
from nemo_minitron.jobs.progress import progress_bar
from nemo_minitron.prune.cut import check_source, prune_checkpoint
from nemo_minitron.prune.plan import Plan
from nemo_minitron.prune.resolve import compensate


def check_writable(save_path: Path, plan_path: Path) -> None:
    """Prove both destinations before the work starts; leaves nothing."""
    Staging(plan_path).abort()
    ArchiveWriter(save_path).abort()


def check_compensation(plan: Plan, wanted: bool | None, scores: Scores | None) -> None:
    """A plan that re-solves weights needs the tokens that it was made with, and no contradiction.

    Args:
        wanted: ``prune.compensate``.

    Raises:
        MinitronError: ``wanted`` is not what the plan says; scores without the plan's tokens.
    """
    if plan.compensation is None:
        if wanted:
            raise MinitronError("prune.compensate: the plan asks for no compensation; make a new plan with it")
        return
    if wanted is False:
        raise MinitronError("prune.compensate: false asked, but the plan says that weights are re-solved")
    found = None if scores is None else scores.tokens_fingerprint()
    if found != plan.compensation.tokens:
        raise MinitronError(
            f"prune.scores: the plan re-solves weights on calibration tokens {plan.compensation.tokens[:16]}, "
            f"found {'none' if found is None else found[:16]}; give the scores folder that it was made with"
        )
    if plan.compensation.rotate and scores.stream_moment is None:  # type: ignore[union-attr]
        raise MinitronError("prune.scores: the plan turns the residual stream, but these scores lack 'stream_moment'")


def write_student(
    reader: NemoReader, plan: Plan, save_path: Path, plan_path: Path, scores: Scores | None, tokenizer: Path | None
) -> None:
    """Write student and plan, which appear together or not at all; other ranks than the first lend samples only.

    Args:
        tokenizer: folder of the tokenizer to pack where the source carries none.

    Raises:
        MinitronError: a plan of other weights, a destination that cannot be written, weights that are not finite.
    """
    check_source(plan, reader)
    if runtime.rank() > 0:
        _fill(reader, plan, None, scores)
        return
    with (
        Staging(plan_path) as staging,
        NemoWriter(
            save_path, with_kept_layers(reader.config, plan.layers), plan.target, reader.dtype, tokenizer=tokenizer
        ) as writer,
    ):
        staging.path.write_text(plan.to_yaml(), encoding="utf-8", newline="\n")
        _fill(reader, plan, writer, scores)


def _fill(reader: NemoReader, plan: Plan, writer: NemoWriter | None, scores: Scores | None) -> None:
    """Write the student's tensors, cut or re-solved."""
    if plan.compensation is None or scores is None:
        if writer is not None:
            prune_checkpoint(reader, plan, writer)
        return
    if runtime.world_size() > 1 and parallel.world() is None:  # the scores were given: nobody has met yet
        runtime.init_distributed()
    world = parallel.world()
    tokens = torch.from_numpy(scores.tokens.astype("int64"))  # type: ignore[union-attr]
    sensitivity = torch.tensor(scores.sensitivity)
    mine = slice(runtime.rank(), None, parallel.size(world))
    share, weights = tokens[mine].to(runtime.device()), sensitivity[:, mine].to(runtime.device())
    moment = torch.tensor(scores.stream_moment) if plan.compensation.rotate else None
    with progress_bar(plan.source.num_layers, "compensate", "layer", show=runtime.rank() == 0) as bar:
        compensate(
            reader,
            plan,
            share,
            weights,
            writer,
            stream_moment=moment,
            dtype=reader.dtype,
            group=world,
            progress=bar.update,
        )
