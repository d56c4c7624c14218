"""What a ``prune`` section asks for: the student's shape, the calibration data for scores, the plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.config.grid import Grid
from nemo_minitron.config.layer_selection import LAYER_SELECTIONS
from nemo_minitron.config.sections import GROUP_SELECTIONS, Calibration, Prune, Serving
from nemo_minitron.errors import MinitronError, check_choice
from nemo_minitron.importance.scores import Scores, with_tokens
from nemo_minitron.model import serving
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.choose import plan_from_scores, target_shape, targets_of
from nemo_minitron.prune.plan import TARGETS, Plan

_CHOICES = ("drop_layers", "layer_selection", "group_selection", "ranking", "rotate")
"""Keys of ``prune`` by which a plan is made, beside the sizes."""


def requested_shape(shape: ModelShape, prune: Prune, plan: Plan | None) -> ModelShape:
    """The student's shape, from the plan or from the request, which exclude each other.

    Raises:
        MinitronError: both; a request that is impossible, contradictory or empty.
    """
    if plan is not None:
        if asked := _asked_of_a_plan(prune, plan):
            raise MinitronError(f"prune.plan: says everything already; leave out prune.{', prune.'.join(asked)}")
        return plan.target
    return target_shape(shape, targets_of(prune), prune.drop_layers, prune.layer_selection)


def _asked_of_a_plan(prune: Prune, plan: Plan) -> list[str]:
    """Names of what is asked for and decided by the plan; ``compensate`` may say what it says."""
    none = Prune()
    names = [*TARGETS, *_CHOICES, *(("scores",) if plan.compensation is None else ())]
    return [name for name in names if getattr(prune, name) != getattr(none, name)]


def check_grid(student: ModelShape, grid: Grid) -> None:
    """Refuse a grid that the student does not fit; the vocabulary is padded anew on every grid.

    Raises:
        MinitronError: naming the size that the grid does not divide.
    """
    padded = -(-student.vocab_size // grid.tensor) * grid.tensor
    student.replace(padded_vocab_size=padded).check_parallel(grid.tensor, grid.pipeline)


def check_serving(source: ModelShape, student: ModelShape, wanted: Serving) -> list[str]:
    """What engines that are to serve the student would run badly, or load by a detour only, and the source not.

    Rows are counted in llama.cpp's blocks where ``wanted`` says nothing of them.

    Raises:
        MinitronError: an engine would refuse the student; with every reason.
    """
    serving.check(wanted, "prune.serving")
    if refused := [reason.text for reason in serving.reasons(student, wanted) if reason.refused]:
        raise MinitronError(f"prune.serving: the student would be refused: {'; '.join(refused)}")
    wanted = dataclasses.replace(wanted, row_multiple=wanted.row_multiple or serving.ROW_MULTIPLE)
    before = {reason.name for reason in serving.reasons(source, wanted)}
    return [reason.text for reason in serving.reasons(student, wanted) if reason.name not in before]


def calibration_of(prune: Prune, seed: int) -> Calibration:
    """Calibration by ``prune.calib_dataset``, a ``.bin/.idx`` prefix or a text.

    Raises:
        MinitronError: no data, or nothing of that name.
    """
    dataset = prune.calib_dataset
    if not dataset:
        raise MinitronError(
            "prune.scores: this target needs scores; give a folder from `minitron importance`, or prune.calib_dataset "
            "to compute them"
        )
    is_prefix = Path(f"{dataset}.idx").is_file()
    if not is_prefix and not Path(dataset).exists():
        raise MinitronError(f"prune.calib_dataset: found neither '{dataset}.idx' nor a text file '{dataset}'")
    return Calibration(
        data_prefix=dataset if is_prefix else None,
        path=None if is_prefix else dataset,
        num_samples=prune.num_calib_size,
        seq_length=prune.calib_seq_length,
        seed=seed,
    )


def unread(prune: Prune) -> str:
    """Why ``prune.calib_dataset`` is not read, for people, where no scores are computed on it."""
    if prune.plan:
        return "prune.calib_dataset is not read: prune.plan says what stays, and prune.scores hold its tokens"
    if prune.scores:
        return "prune.calib_dataset is not read: prune.scores were computed already"
    return (
        "prune.calib_dataset is not read: named layers are removed without scores, and weights are cut; "
        "prune.compensate=true re-solves them on it"
    )


def make_requested_plan(reader: NemoReader, prune: Prune, scores: Scores | None, half: bool) -> Plan:
    """The plan that the section asks for, its layers and query groups chosen by loss where it says so.

    Args:
        half: losses without layers and groups are measured with products in bfloat16.

    Raises:
        MinitronError: scores of another checkpoint, or that lack what is asked for.
    """
    fingerprint, total = reader.fingerprint(), reader.shape.num_layers
    if scores is not None:
        scores.check_matches(fingerprint, reader.shape)
    if prune.compensate and (scores is None or scores.tokens is None):
        raise MinitronError(
            "prune.compensate: the scores hold no calibration tokens to re-solve weights on; "
            "run `minitron importance calibration.reconstruction=true`, or set prune.compensate=false"
        )
    layers = prune.num_layers or total
    said = "drop_layers" if prune.drop_layers else prune.layer_selection
    if LAYER_SELECTIONS[prune.layer_selection].by_loss and not prune.drop_layers and layers < total:
        from nemo_minitron.prune.layers import drop_by_loss

        prune = dataclasses.replace(prune, drop_layers=drop_by_loss(reader, prune, layers, scores, half))
    plan = plan_from_scores(reader.shape, fingerprint, prune, scores)
    fewer = reader.shape.num_query_groups - plan.target.num_query_groups
    if fewer and _groups_by_loss(prune, scores):
        from nemo_minitron.prune.groups import groups_by_loss

        assert scores is not None
        worth = groups_by_loss(reader, scores, plan.layers, fewer, tokens=prune.layer_tokens, half=half)
        plan = plan_from_scores(reader.shape, fingerprint, prune, scores, worth)
    return plan.chosen(said, prune.group_selection)


def _groups_by_loss(prune: Prune, scores: Scores | None) -> bool:
    """Whether query groups are chosen by the loss without them.

    Raises:
        MinitronError: asked for, with scores that hold no calibration tokens to measure it on.
    """
    check_choice("prune.group_selection", prune.group_selection, GROUP_SELECTIONS)
    if prune.group_selection != "loss":
        return False
    with_tokens(scores, "prune.group_selection=loss")
    return True
