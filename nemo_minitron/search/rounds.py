"""The course of a search: predict, measure, distil. Every choice follows from files, so that a search can go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nemo_minitron.config.schema import SearchConfig
from nemo_minitron.config.sections import Serving
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.files.staging import Staging, write_file
from nemo_minitron.importance.scores import JSON, NPZ, Scores
from nemo_minitron.model.serving import reasons, refusals
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.recipe import Compose, Records
from nemo_minitron.search import output, predict
from nemo_minitron.search.candidate import Candidate, Outcome
from nemo_minitron.search.depth import removed_layers
from nemo_minitron.search.groups import with_groups_by_loss
from nemo_minitron.search.measure import Bench, Table, fewer_tokens, plan_of, write_plan
from nemo_minitron.search.predict import Predictor
from nemo_minitron.search.request import (
    budget_of,
    check_compensation,
    given_shapes,
    last_stage,
    probe_shapes,
    space_of,
)
from nemo_minitron.search.scan import Rows, scan, spread_out
from nemo_minitron.search.space import Budget, Shapes, Space, describe, show, sizes_of


def run(cfg: SearchConfig, compose: Compose) -> Outcome:
    """Search for the best shape within ``budget`` and write ``output_path``: see :mod:`nemo_minitron.search.output`.

    Without ``model.restore_from_path`` shapes are ranked by the scores alone.

    Raises:
        MinitronError: impossible settings, an infeasible budget (with the limit that binds and the nearest shape),
            scores of another checkpoint, a stage that failed; what was measured until then is kept.
    """
    folder = Path(required(cfg, "output_path"))
    scores = Scores.load(required(cfg, "scores"))
    until = last_stage(cfg)
    check_compensation(cfg, scores)
    given = given_shapes(cfg, scores.shape)
    space = space_of(cfg, scores.shape)
    records = Records(folder / ".stages")
    budget = budget_of(cfg, scores.shape, records)
    fits = [name for name, limit in budget.limits().items() if budget.costs(scores.shape)[name] > limit]
    if not fits:
        raise MinitronError(f"budget: nothing to search; the source itself fits it ({describe(scores.shape)})")
    # an impossible budget is refused before anything is measured, and no prediction changes what is possible
    feasible = scan(
        space, budget, lambda shapes: np.zeros(np.size(shapes.hidden_size)), keep=1, refuse=_refuse(cfg.search.serving)
    )
    (any_shape,) = _shapes(space, feasible.best)
    removed, without = removed_layers(cfg, scores, space, given, records)
    features = predict.Features.of(scores, without)
    if until == "predict":
        predictor = predict.defaults(features, layers_measured=without is not None)
        return _finish(cfg, folder, scores, removed, _predicted(cfg, space, budget, predictor, given))

    path = Path(cfg.scores)
    scores = with_groups_by_loss(cfg, scores, space, given, records)
    if cfg.search.tokens is not None:
        scores, path = _write_scores(fewer_tokens(scores, cfg.search.tokens), folder / "scores"), folder / "scores"
    bench = Bench(cfg, compose, folder, records, scores, path, removed)
    probes = probe_shapes(cfg, space)
    bench.check(any_shape, distil=until == "distill")
    source_loss = bench.source_loss()
    print(f"{describe(scores.shape)}: loss {source_loss:.4f}")
    guess = predict.defaults(features, source_loss, without is not None)
    losses = _measure(bench, "sensitivities: one size cut at a time", probes, guess, cfg.search.keep_students)
    predictor = predict.fit(features, probes, losses, source_loss, without is not None)
    outcome = _predicted(cfg, space, budget, predictor, given)
    outcome.source_loss = source_loss
    for shape, loss in zip(probes, losses, strict=True):
        if all(candidate.shape != shape for candidate in outcome.candidates):
            costs = {name: float(cost) for name, cost in budget.costs(shape).items()}
            outcome.candidates.append(Candidate(shape, "probe", float(predictor(shape)[0]), costs, loss))
    _zero_shot(cfg, bench, outcome, probes)
    if until == "distill":
        _halve(cfg, bench, outcome)
    return _finish(cfg, folder, scores, removed, outcome)


def _write_scores(scores: Scores, folder: Path) -> Scores:
    """Write scores with fewer tokens, unless they are there."""
    if (folder / JSON).is_file() and Scores.load(folder).fingerprint() == scores.fingerprint():
        return scores
    with Staging(folder, folder=True, replaceable=(JSON, NPZ)) as staging:
        scores.write(staging.path)
    return scores


def _predicted(
    cfg: SearchConfig, space: Space, budget: Budget, predictor: Predictor, given: Sequence[ModelShape]
) -> Outcome:
    """Walk through the space and choose what to measure."""
    serving = cfg.search.serving
    found = scan(space, budget, predictor, seed=cfg.seed, follow=given, refuse=_refuse(serving))
    assert found.best is not None and found.sample is not None
    candidates = []
    limits = budget.limits()
    for shape, better in zip(given, found.better, strict=True):
        costs = {name: float(cost) for name, cost in budget.costs(shape).items()}
        fits = all(costs[name] <= limit for name, limit in limits.items())
        refused = any(reason.refused for reason in reasons(shape, serving))
        rank = better + 1 if fits and not refused else None
        candidates.append(Candidate(shape, "given", float(predictor(shape)[0]), costs, rank=rank))
    chosen = spread_out(found.best, cfg.search.measure, cfg.search.spread)
    candidates += _candidates(space, found.best, chosen, "searched", given)
    taken = [candidate.shape for candidate in candidates]
    rest = found.sample.take(found.sample.order())
    candidates += _candidates(space, rest, _evenly(rest, cfg.search.validate, taken), "validation", taken)
    print(
        f"{found.considered:,} shapes, {found.feasible:,} within the budget of "
        + ", ".join(show(name, getattr(budget, name)) for name in limits)
    )
    if found.left_out:
        counts = ", ".join(f"{name} {number:,}" for name, number in found.refused.items() if number)
        print(f"{found.left_out:,} shapes left out, which would be refused where they are to be served: {counts}")
    for candidate in candidates:
        if candidate.role == "given":
            if candidate.rank is not None:
                place = f"rank {candidate.rank:,} of {found.feasible:,}"
            else:
                why = [reason.text for reason in reasons(candidate.shape, serving) if reason.refused]
                place = f"not to be served ({'; '.join(why)})" if why else "over the budget"
            print(f"{describe(candidate.shape)}: {place}, predicted {candidate.predicted:.4f}")
    return Outcome(space, budget, found, predictor, candidates, serving=serving)


def _refuse(serving: Serving) -> Callable[[ModelShape], dict[str, np.ndarray]]:
    """A function that tells by reasons which of many shapes an engine would refuse."""
    return lambda shapes: refusals(shapes, serving)


def _candidates(
    space: Space, rows: Rows, chosen: Sequence[int], role: str, taken: Sequence[ModelShape]
) -> list[Candidate]:
    found = []
    for row, shape in zip(chosen, _shapes(space, rows.take(np.array(chosen, dtype=np.int64))), strict=True):
        if shape not in taken:
            costs = {name: float(cost[row]) for name, cost in rows.costs.items()}
            found.append(Candidate(shape, role, float(rows.loss[row]), costs))
    return found


def _shapes(space: Space, rows: Rows | None) -> list[ModelShape]:
    return [] if rows is None else [Shapes.of(space.source, rows.sizes).shape(row) for row in range(len(rows))]


def _evenly(rows: Rows, count: int, taken: Sequence[ModelShape]) -> list[int]:
    """Places at equal distances in the order of loss, without the shapes that are measured anyway."""
    others = {tuple(sizes_of(shape)) for shape in taken}
    free = [row for row in range(len(rows)) if tuple(rows.sizes[row]) not in others]
    return [free[int(place)] for place in np.linspace(0, len(free) - 1, min(count, len(free)))]


def _measure(bench: Bench, title: str, shapes: Sequence[ModelShape], predictor: Predictor, keep: bool) -> list[float]:
    losses = []
    table = Table(title, len(shapes))
    for shape in shapes:
        loss, cached = bench.zero_shot(shape)
        table.row(shape, float(predictor(shape)[0]), loss, cached=cached)
        losses.append(loss)
        if not keep:
            bench.forget_student(shape)
    return losses


def _zero_shot(cfg: SearchConfig, bench: Bench, outcome: Outcome, fitted: Sequence[ModelShape]) -> None:
    """Measure the candidates, and judge the prediction by those that it was not fitted to."""
    wanted = [candidate for candidate in outcome.candidates if candidate.role != "probe"]
    table = Table("zero-shot losses", len(wanted))
    for candidate in wanted:
        candidate.zero_shot, cached = bench.zero_shot(candidate.shape)
        table.row(candidate.shape, candidate.predicted, candidate.zero_shot, _note(candidate), cached)
        if not cfg.search.keep_students:
            alive = _best(cfg, outcome)
            for other in wanted:
                if other.zero_shot is not None and other not in alive and other.role != "given":
                    bench.forget_student(other.shape)
    new = [candidate for candidate in wanted if candidate.shape not in fitted and candidate.zero_shot is not None]
    outcome.rank_correlation = predict.rank_correlation(
        [candidate.predicted for candidate in new],
        [candidate.zero_shot for candidate in new],  # type: ignore[misc]
    )
    if outcome.rank_correlation is not None:
        print(f"rank correlation of predicted and measured over {len(new)} shapes: {outcome.rank_correlation:.3f}")


def _best(cfg: SearchConfig, outcome: Outcome) -> list[Candidate]:
    """The best few of those measured so far, whatever they were measured for."""
    rivals = [
        candidate
        for candidate in outcome.candidates
        if candidate.role in ("searched", "validation") and candidate.zero_shot is not None
    ]
    return sorted(rivals, key=_measured)[: cfg.search.finalists]


def _halve(cfg: SearchConfig, bench: Bench, outcome: Outcome) -> None:
    """Distil the best few; the better half goes on for twice the steps, until one is left.

    Shapes of ``search.shapes`` within the budget go through every round beside them, so that they are compared with
    the winner after equal training, and win if they are better.
    """
    alive = _best(cfg, outcome)
    beside = [candidate for candidate in outcome.candidates if candidate.role == "given" and candidate.rank is not None]
    steps: list[int] = []
    while True:
        steps.append(cfg.search.distill_steps * 2 ** len(steps))
        rivals = [*alive, *beside]
        table = Table(f"distilled for {sum(steps):,} steps", len(rivals))
        for candidate in rivals:
            loss, cached = bench.distilled(candidate.shape, steps)
            candidate.distilled.append(loss)
            table.row(candidate.shape, candidate.predicted, loss, _note(candidate), cached)
        alive = sorted(alive, key=_measured)[: max(1, len(alive) // 2)]
        if len(alive) == 1:
            break
    outcome.steps = steps
    outcome.winner = min(rivals, key=_measured)


def _measured(candidate: Candidate) -> tuple[float, float, str]:
    """Loss by the latest measurement; equal losses are settled by size and name."""
    loss = candidate.distilled[-1] if candidate.distilled else candidate.zero_shot
    return (np.inf if loss is None else loss, candidate.costs["num_parameters"], candidate.key)


def _note(candidate: Candidate) -> str:
    return "" if candidate.role == "searched" else candidate.role


def _finish(
    cfg: SearchConfig, folder: Path, scores: Scores, removed: Sequence[Sequence[int]], outcome: Outcome
) -> Outcome:
    """Plans of all candidates, the list, the plots."""
    for candidate in outcome.candidates:
        candidate.plan = folder / "plans" / f"{candidate.key}.yaml"
        write_plan(plan_of(cfg, scores, candidate.shape, removed), candidate.plan)
    write_file(folder / "candidates.yaml", output.document(outcome, folder))
    output.plots(outcome, folder)
    print(output.summary(outcome, None if cfg.search.tokens is None else folder / "scores"))
    print(f"written: {folder / 'candidates.yaml'}", flush=True)
    return outcome
