"""The student of a plan, written to its files: what is kept is cut, or re-solved on the calibration tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from nemo_minitron import parallel, runtime
from nemo_minitron.checkpoint import NemoReader, NemoWriter
from nemo_minitron.checkpoint.archive import ArchiveWriter
from nemo_minitron.checkpoint.nemo_config import with_kept_layers
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import Staging
from nemo_minitron.importance.scores import Scores
from nemo_minitron.jobs.processes import notice
from nemo_minitron.jobs.progress import progress_bar
from nemo_minitron.prune.cut import check_source, prune_checkpoint
from nemo_minitron.prune.measured import describe, worse
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
        MinitronError: ``wanted`` is not what the plan says; scores without the plan's tokens, or with too few.
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
    held_out, samples = plan.compensation.held_out, len(scores.tokens)  # type: ignore[union-attr,arg-type]
    if held_out and (held_out[-1] >= samples or len(held_out) == samples):
        raise MinitronError(
            f"prune.plan: compensation.held_out: expected some of the scores' {samples} samples, "
            f"found {len(held_out)} up to {held_out[-1]} (counted from 0)"
        )
    if plan.compensation.rotate and scores.stream_moment is None:  # type: ignore[union-attr]
        raise MinitronError("prune.scores: the plan turns the residual stream, but these scores lack 'stream_moment'")


class _WorseThanCut(Exception):
    """The student's re-solved weights lose more than cut ones; ``plan`` cuts, and says what was measured."""

    def __init__(self, plan: Plan) -> None:
        self.plan = dataclasses.replace(plan, compensation=None)


def write_student(
    reader: NemoReader, plan: Plan, save_path: Path, plan_path: Path, scores: Scores | None, tokenizer: Path | None
) -> Plan:
    """Write student and plan, which appear together or not at all; other ranks than the first lend samples only.

    Args:
        tokenizer: folder of the tokenizer to pack where the source carries none.

    Returns:
        The plan as it is written, on every rank: with what was measured on held-out samples, and without compensation
        where re-solved weights lost more there than cut ones, so that the student is a cut one.

    Raises:
        MinitronError: a plan of other weights, a destination that cannot be written, weights that are not finite.
    """
    check_source(plan, reader)
    try:
        return _write(reader, plan, save_path, plan_path, scores, tokenizer)
    except _WorseThanCut as found:
        notice(
            "student: its weights are cut and not re-solved, which lost more on text held back from it, in nats/token: "
            f"{describe(found.plan.measured)}"
        )
        return _write(reader, found.plan, save_path, plan_path, scores, tokenizer)


def _write(
    reader: NemoReader, plan: Plan, save_path: Path, plan_path: Path, scores: Scores | None, tokenizer: Path | None
) -> Plan:
    if runtime.rank() > 0:
        return _filled(reader, plan, None, scores)
    with (
        Staging(plan_path) as staging,
        NemoWriter(
            save_path, with_kept_layers(reader.config, plan.layers), plan.target, reader.dtype, tokenizer=tokenizer
        ) as writer,
    ):
        plan = _filled(reader, plan, writer, scores)
        staging.path.write_text(plan.to_yaml(), encoding="utf-8", newline="\n")
    return plan


def _filled(reader: NemoReader, plan: Plan, writer: NemoWriter | None, scores: Scores | None) -> Plan:
    """Write the student's tensors, cut or re-solved; the plan with what was measured.

    Raises:
        _WorseThanCut: on every rank alike.
    """
    if plan.compensation is None or scores is None:
        if writer is not None:
            prune_checkpoint(reader, plan, writer)
        return plan
    if runtime.world_size() > 1 and parallel.world() is None:  # the scores were given: nobody has met yet
        runtime.init_distributed()
    world, device = parallel.world(), runtime.device()
    held_out = set(plan.compensation.held_out)
    mine = range(runtime.rank(), len(scores.tokens), parallel.size(world))  # type: ignore[arg-type]
    order = sorted(mine, key=held_out.__contains__)  # those held out come last
    first_own = len(scores.tokens) - scores.own_samples  # type: ignore[arg-type]
    own = torch.tensor([sample >= first_own for sample in order if sample in held_out], dtype=torch.bool)
    moment = torch.tensor(scores.stream_moment) if plan.compensation.rotate else None
    with progress_bar(plan.source.num_layers, "compensate", "layer", show=runtime.rank() == 0) as bar:
        measured = compensate(
            reader,
            plan,
            torch.from_numpy(scores.tokens[order].astype("int64")).to(device),  # type: ignore[index]
            torch.tensor(scores.sensitivity)[:, order].to(device),
            writer,
            counted=None if scores.counted is None else torch.tensor(scores.counted)[order].to(device),
            stream_moment=moment,
            held_out=own if held_out else None,
            dtype=reader.dtype,
            group=world,
            progress=bar.update,
        )
    plan = dataclasses.replace(plan, measured=measured)
    if worse(measured):
        raise _WorseThanCut(plan)
    return plan
