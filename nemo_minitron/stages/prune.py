"""``minitron prune``: a plan of what to keep, and the student ``.nemo``."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.tokenizer_open import choose
from nemo_minitron.config.grid import Grid, Machines
from nemo_minitron.config.schema import PruneConfig
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.importance.scores import Scores
from nemo_minitron.jobs.processes import notice
from nemo_minitron.prune.choose import needs_scores
from nemo_minitron.prune.measured import KINDS
from nemo_minitron.prune.plan import TARGETS, Plan, format_ranges
from nemo_minitron.prune.request import (
    calibration_of,
    check_grid,
    check_serving,
    make_requested_plan,
    requested_shape,
    unread,
)
from nemo_minitron.prune.student import check_compensation, check_writable, write_student


def run(cfg: PruneConfig) -> Plan:
    """Prune ``model.restore_from_path`` into ``export.save_path`` and ``export.plan_path``.

    What is kept comes from ``prune.plan`` (applied as it is), or from the requested sizes with ``prune.scores``;
    without either, scores are computed first from ``prune.calib_dataset`` and kept beside the student as
    ``NAME.scores``. Layers named in ``prune.drop_layers`` need no scores.

    Where the scores hold calibration tokens, the kept weights are re-solved on them (``prune.compensate``); the plan
    says so, and is applied again with the same scores. Under any grid all processes share the samples. A sixteenth of
    them is held back, and where re-solved weights lose more on it than cut ones, the student is a cut one.

    Raises:
        MinitronError: impossible, contradictory or empty requests, missing or foreign files and unwritable outputs,
            all before any weight is read; scores or a plan of other weights, before anything is written.
    """
    from nemo_minitron import runtime

    runtime.keep_freed_memory()
    prune = cfg.prune
    source, save_path = Path(required(cfg, "model.restore_from_path")), Path(required(cfg, "export.save_path"))
    name = save_path.name.removesuffix(".nemo")
    plan_path = Path(cfg.export.plan_path or save_path.with_name(f"{name}.plan.yaml"))
    if save_path.resolve() == source.resolve():
        raise MinitronError(f"export.save_path: '{save_path}' is the checkpoint that is read; choose another name")
    with NemoReader(source) as reader:
        plan = Plan.load(prune.plan, reader.shape) if prune.plan else None
        student = requested_shape(reader.shape, prune, plan)
        tokenizer = choose(reader, cfg.model.get("tokenizer"), "model.tokenizer")
        if tokenizer is None:
            notice(
                f"{source} carries no tokenizer, and the student will not either; model.tokenizer.type=... gives one"
            )
        check_grid(student, Grid.of(cfg.model))
        for reason in check_serving(reader.shape, student, prune.serving):
            notice(f"student: {reason}")
        scores = Scores.load(prune.scores, reader.shape) if prune.scores else None
        wanted = needs_scores(reader.shape, student, prune.drop_layers) or prune.compensate
        calibration = calibration_of(prune, cfg.seed) if plan is None and scores is None and wanted else None
        if prune.calib_dataset and calibration is None:
            notice(unread(prune))
        if runtime.rank() == 0:  # who writes; others would take its temporaries for leftovers
            check_writable(save_path, plan_path)
        if calibration is not None:
            from nemo_minitron.nemo.scoring import measure_and_save

            scores_path = save_path.with_name(f"{name}.scores")
            stream, metrics = prune.calib_stream, [prune.ranking] if prune.ranking else []
            scores = measure_and_save(source, scores_path, calibration, stream, cfg.model, cfg.trainer, metrics)
        if plan is None:
            plan = make_requested_plan(reader, prune, scores, half=Machines.of(cfg.trainer).half)
        check_compensation(plan, prune.compensate, scores)
        if plan.compensation is not None or runtime.rank() == 0:
            plan = write_student(reader, plan, save_path, plan_path, scores, tokenizer)
        if runtime.rank() == 0:
            print(table(plan))
            print(f"student: {save_path}\nplan:    {plan_path}")
    return plan


def table(plan: Plan) -> str:
    """What the plan changes, for people: one row per size."""
    source, target = plan.source, plan.target
    sizes = [(size, getattr(source, size), getattr(target, size)) for size in ("num_layers", *TARGETS[:4])]
    sizes.append(("parameters", source.num_parameters(), target.num_parameters()))
    lines = [f"{'':<22}{'before':>16}{'after':>16}{'kept':>8}"]
    lines += [f"{size:<22}{old:>16,}{new:>16,}{new / old:>8.1%}" for size, old, new in sizes]
    dropped = sorted(set(range(1, source.num_layers + 1)) - {layer + 1 for layer in plan.layers})
    if dropped:
        lines.append(f"layers removed (counted from 1): {format_ranges(dropped)}")
    if plan.compensation is not None and plan.compensation.rotate:
        lines.append("residual stream turned onto its directions of most energy")
    return "\n".join([*lines, *_kept_weights(plan)])


def _kept_weights(plan: Plan) -> list[str]:
    """Whether they are cut or re-solved, and what was measured of both."""
    if not plan.measured:
        return [
            "kept weights cut"
            if plan.compensation is None
            else "kept weights re-solved on the calibration tokens; none held back to compare with cut ones"
        ]
    lines = [f"{'nats/token on text held back':<32}{'tokens':>10}{'before':>10}{'cut':>10}{'re-solved':>12}"]
    for kind, found in plan.measured.items():
        losses = f"{found.teacher:>10.4f}{found.cut:>10.4f}{found.resolved:>12.4f}"
        lines.append(f"{KINDS[kind]:<32}{found.tokens:>10,}{losses}")
    cut = "kept weights cut: re-solved ones lose more on text held back"
    return [*lines, cut if plan.compensation is None else "kept weights re-solved on the calibration tokens"]
