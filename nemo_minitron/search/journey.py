"""The course of a search: predict, measure, distil. Every choice follows from files, so that a search can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from nemo_minitron.errors import MinitronError, did_you_mean, required
from nemo_minitron.files.staging import Staging, write_file
from nemo_minitron.importance.scores import JSON, NPZ, Scores
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.choose import target_shape
from nemo_minitron.prune.plan import TARGETS
from nemo_minitron.recipe import Compose, Records
from nemo_minitron.search import latency, output, predict
from nemo_minitron.search.measure import Bench, Table, fewer_tokens, plan_of, write_plan
from nemo_minitron.search.space import (
    Budget,
    Found,
    Rows,
    Shapes,
    Space,
    describe,
    key_of,
    scan,
    show,
    sizes_of,
    spread_out,
)

POSITIONS = 2048
"""Length of the KV cache that is budgeted for where nothing is said, unless the model's own is shorter."""


@dataclass
class Candidate:
    """A shape and all that is known of it.

    Attributes:
        role: ``searched``, ``validation``, ``probe``, or ``given`` (``search.shapes``).
        predicted: loss before it was measured, nats/token, or times the source's where that is not known.
        distilled: loss after each round of distillation.
        rank: of ``given`` shapes, among the feasible ones by prediction, from 1; None where it is over the budget.
    """

    shape: ModelShape
    role: str
    predicted: float
    costs: dict[str, float]
    zero_shot: float | None = None
    distilled: list[float] = field(default_factory=list)
    rank: int | None = None
    plan: Path | None = None

    @property
    def key(self) -> str:
        return key_of(self.shape)


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        steps: of each round of distillation. rank_correlation: Spearman's, of predicted against measured zero-shot
            loss over shapes that the prediction was not fitted to.
    """

    space: Space
    budget: Budget
    found: Found
    predictor: predict.Predictor
    candidates: list[Candidate]
    steps: list[int] = field(default_factory=list)
    rank_correlation: float | None = None
    source_loss: float | None = None
    winner: Candidate | None = None


def run(cfg: DictConfig, compose: Compose) -> Outcome:
    """Search for the best shape within ``budget`` and write ``output_path``: see :mod:`nemo_minitron.search.output`.

    Without ``model.restore_from_path`` shapes are ranked by the scores alone.

    Raises:
        MinitronError: impossible settings, an infeasible budget (with the limit that binds and the nearest shape),
            scores of another checkpoint, a stage that failed; what was measured until then is kept.
    """
    folder = Path(required(cfg, "output_path"))
    scores = Scores.load(required(cfg, "scores"))
    until = _until(cfg)
    given = _given(cfg, scores.shape)
    space = _space(cfg, scores.shape)
    records = Records(folder / ".stages")
    budget = _budget(cfg, scores.shape, records)
    fits = [name for name, limit in budget.limits().items() if budget.costs(scores.shape)[name] > limit]
    if not fits:
        raise MinitronError(f"budget: nothing to search; the source itself fits it ({describe(scores.shape)})")
    # an impossible budget is refused before anything is measured, and no prediction changes what is possible
    any_shape = _shapes(space, scan(space, budget, lambda shapes: np.zeros(np.size(shapes.hidden_size)), keep=1).best)[
        0
    ]
    removed, without = _layers(cfg, scores, space, records)
    features = predict.Features.of(scores, without)
    if until == "predict":
        predictor = predict.defaults(features, layers_measured=without is not None)
        return _finish(cfg, folder, scores, removed, _predicted(cfg, space, budget, predictor, given))

    path = Path(str(cfg.scores))
    if cfg.search.tokens is not None:
        scores, path = _write_scores(fewer_tokens(scores, int(cfg.search.tokens)), folder / "scores"), folder / "scores"
    bench = Bench(cfg, compose, folder, records, scores, path, removed)
    probes = _probes(cfg, space)
    bench.check(any_shape, distil=until == "distill")
    source_loss = bench.source_loss()
    print(f"{describe(scores.shape)}: loss {source_loss:.4f}")
    guess = predict.defaults(features, source_loss, without is not None)
    losses = _measure(bench, "sensitivities: one size cut at a time", probes, guess, cfg.search.keep_students)
    predictor = predict.fit(features, probes, losses, source_loss, without is not None)
    outcome = _predicted(cfg, space, budget, predictor, given)
    outcome.source_loss = source_loss
    for shape, loss in zip(probes, losses, strict=True):
        if all(one.shape != shape for one in outcome.candidates):
            costs = {name: float(cost) for name, cost in budget.costs(shape).items()}
            outcome.candidates.append(Candidate(shape, "probe", float(predictor(shape)[0]), costs, loss))
    _zero_shot(cfg, bench, outcome, probes)
    if until == "distill":
        _halve(cfg, bench, outcome)
    return _finish(cfg, folder, scores, removed, outcome)


def _until(cfg: DictConfig) -> str:
    """The last stage, every key that it needs being there."""
    until = str(cfg.search.until)
    for name, least in (("measure", 1), ("finalists", 1), ("distill_steps", 1), ("validate", 0)):
        if cfg.search[name] < least:
            raise MinitronError(f"search.{name}: expected at least {least}, found {cfg.search[name]}")
    if not all(0 < share < 1 for share in cfg.search.probes):
        raise MinitronError(f"search.probes: expected shares between 0 and 1, found {list(cfg.search.probes)}")
    if not cfg.model.get("restore_from_path"):
        return "predict"
    if until != "predict":
        required(cfg, "evaluate.data_prefix")
    if until == "distill" and not cfg.model.data.get("data_prefix"):
        raise MinitronError(
            "model.data.data_prefix is required for the distillations; set it, or search.until=zero_shot"
        )
    return until


def _space(cfg: DictConfig, shape: ModelShape) -> Space:
    steps = {
        "hidden_size": cfg.search.hidden_step,
        "ffn_hidden_size": cfg.search.ffn_step,
        "num_layers": cfg.search.layers_step,
        "num_query_groups": cfg.search.groups_step,
    }
    return Space.of(
        shape,
        steps=steps,
        shrink=list(cfg.search.shrink),
        min_fraction=float(cfg.search.min_fraction),
        tensor_parallel=int(cfg.model.get("tensor_model_parallel_size") or 1),
        pipeline_parallel=int(cfg.model.get("pipeline_model_parallel_size") or 1),
    )


def _budget(cfg: DictConfig, shape: ModelShape, records: Records) -> Budget:
    """The budget, with the rates of this device, which are measured once and kept: others would allow other shapes."""
    values: Any = OmegaConf.to_container(cfg.budget)
    values["seq_length"] = values["seq_length"] or min(POSITIONS, shape.max_position_embeddings)
    for name in ("batch_size", "seq_length", "bytes_per_value"):
        if values[name] < 1:
            raise MinitronError(f"budget.{name}: expected at least 1, found {values[name]}")
    if values["bytes_per_value"] not in latency.DTYPES and values["latency_ms"] is not None:
        raise MinitronError(f"budget.bytes_per_value: latency is measured at 2 or 4, found {values['bytes_per_value']}")
    if values["bytes_per_value"] in latency.DTYPES:
        device = {"device": latency.device_name(), "bytes_per_value": values["bytes_per_value"]}
        known = records.read("device")
        if known.get("of") != device:
            known = {"of": device, "rates": latency.measure(values["bytes_per_value"]).to_dict()}
            records.write("device", known)
        values["rates"] = latency.Rates(**known["rates"])
    return Budget(**values)


def _given(cfg: DictConfig, source: ModelShape) -> list[ModelShape]:
    """``search.shapes``, in the words of ``prune``."""
    shapes = []
    for item in OmegaConf.to_container(cfg.search.shapes) or []:  # type: ignore[union-attr]
        if not isinstance(item, dict):
            raise MinitronError(f"search.shapes: expected sizes such as {{hidden_size: 512}}, found {item!r}")
        for name in item:
            if name not in TARGETS:
                raise MinitronError(
                    f"search.shapes: unknown size '{name}'; known: {', '.join(TARGETS)}."
                    + did_you_mean(str(name), TARGETS)
                )
        try:
            shapes.append(target_shape(source, item))  # type: ignore[arg-type]
        except MinitronError as error:
            raise MinitronError(f"search.shapes: {error}") from None
    return shapes


def _layers(
    cfg: DictConfig, scores: Scores, space: Space, records: Records
) -> tuple[list[tuple[int, ...]], list[float] | None]:
    """Layers to remove by their number, and the damage of that, where both are found by loss; else nothing."""
    if cfg.search.layer_selection != "greedy" or "num_layers" not in cfg.search.shrink:
        return [], None
    most = scores.shape.num_layers - space.axes["num_layers"][0]
    if not most:
        return [], None
    if not cfg.model.get("restore_from_path"):
        raise MinitronError("search.layer_selection=greedy: runs the model; give model.restore_from_path")
    what = [scores.fingerprint(), int(cfg.search.layer_tokens), cfg.search.compensate, str(cfg.trainer.precision)]
    fingerprint = hashlib.sha256(json.dumps([*what, most]).encode()).hexdigest()
    known = records.read("layers")
    if known.get("fingerprint") != fingerprint:
        known = {"fingerprint": fingerprint, **_search_layers(cfg, scores, most)}
        records.write("layers", known)
    damage = np.log(np.array(known["losses"]) / known["losses"][0])
    return [tuple(one) for one in known["removed"]], damage.tolist()


def _search_layers(cfg: DictConfig, scores: Scores, most: int) -> dict[str, Any]:
    from nemo_minitron.checkpoint import NemoReader
    from nemo_minitron.prune.layers import layers_by_loss

    with NemoReader(Path(str(cfg.model.restore_from_path))) as reader:
        scores.check_matches(reader.fingerprint(), reader.shape)
        whole, steps = layers_by_loss(
            reader,
            "greedy",
            most,
            scores,
            tokens=int(cfg.search.layer_tokens),
            stand_ins=cfg.search.compensate is not False,
            half=str(cfg.trainer.precision).startswith("bf16"),
            section="search",
        )
    return {
        "losses": [whole, *(step.loss for step in steps)],
        "removed": [[], *(list(step.removed) for step in steps)],
    }


def _write_scores(scores: Scores, folder: Path) -> Scores:
    """Write scores with fewer tokens, unless they are there."""
    if (folder / JSON).is_file() and Scores.load(folder).fingerprint() == scores.fingerprint():
        return scores
    with Staging(folder, folder=True, replaceable=(JSON, NPZ)) as staging:
        scores.write(staging.path)
    return scores


def _probes(cfg: DictConfig, space: Space) -> list[ModelShape]:
    """Shapes with one size cut by each of ``search.probes``, as near as the space has it."""
    shapes: list[ModelShape] = []
    for axis, sizes in space.axes.items():
        for share in cfg.search.probes:
            wanted = sizes[-1] * (1 - share)
            # the nearest size may be the whole one where steps are wide
            size = min(sizes[:-1], key=lambda size, wanted=wanted: abs(size - wanted), default=None)  # type: ignore[misc]
            if size is not None and (shape := space.nearest(**{axis: size})) not in shapes:
                shapes.append(shape)
    return shapes


def _predicted(
    cfg: DictConfig, space: Space, budget: Budget, predictor: predict.Predictor, given: Sequence[ModelShape]
) -> Outcome:
    """Walk through the space and choose what to measure."""
    found = scan(space, budget, predictor, seed=int(cfg.seed), follow=given)
    assert found.best is not None and found.sample is not None
    candidates = []
    limits = budget.limits()
    for shape, better in zip(given, found.better, strict=True):
        costs = {name: float(cost) for name, cost in budget.costs(shape).items()}
        fits = all(costs[name] <= limit for name, limit in limits.items())
        rank = better + 1 if fits else None
        candidates.append(Candidate(shape, "given", float(predictor(shape)[0]), costs, rank=rank))
    chosen = spread_out(found.best, int(cfg.search.measure), float(cfg.search.spread))
    candidates += _candidates(space, found.best, chosen, "searched", given)
    taken = [one.shape for one in candidates]
    rest = found.sample.take(found.sample.order())
    candidates += _candidates(space, rest, _evenly(rest, int(cfg.search.validate), taken), "validation", taken)
    print(
        f"{found.considered:,} shapes, {found.feasible:,} within the budget of "
        + ", ".join(show(name, getattr(budget, name)) for name in limits)
    )
    for one in candidates:
        if one.role == "given":
            place = "over the budget" if one.rank is None else f"rank {one.rank:,} of {found.feasible:,}"
            print(f"{describe(one.shape)}: {place}, predicted {one.predicted:.4f}")
    return Outcome(space, budget, found, predictor, candidates)


def _candidates(
    space: Space, rows: Rows, chosen: Sequence[int], role: str, taken: Sequence[ModelShape]
) -> list[Candidate]:
    found = []
    for at, shape in zip(chosen, _shapes(space, rows.take(np.array(chosen, dtype=np.int64))), strict=True):
        if shape not in taken:
            costs = {name: float(cost[at]) for name, cost in rows.costs.items()}
            found.append(Candidate(shape, role, float(rows.loss[at]), costs))
    return found


def _shapes(space: Space, rows: Rows | None) -> list[ModelShape]:
    return [] if rows is None else [Shapes.of(space.source, rows.sizes).shape(at) for at in range(len(rows))]


def _evenly(rows: Rows, count: int, taken: Sequence[ModelShape]) -> list[int]:
    """Places at equal distances in the order of loss, without the shapes that are measured anyway."""
    others = {tuple(sizes_of(shape)) for shape in taken}
    free = [at for at in range(len(rows)) if tuple(rows.sizes[at]) not in others]
    return [free[int(place)] for place in np.linspace(0, len(free) - 1, min(count, len(free)))]


def _measure(
    bench: Bench, title: str, shapes: Sequence[ModelShape], predictor: predict.Predictor, keep: bool
) -> list[float]:
    losses = []
    table = Table(title, len(shapes))
    for shape in shapes:
        loss, cached = bench.zero_shot(shape)
        table.row(shape, float(predictor(shape)[0]), loss, cached=cached)
        losses.append(loss)
        if not keep:
            bench.forget_student(shape)
    return losses


def _zero_shot(cfg: DictConfig, bench: Bench, outcome: Outcome, fitted: Sequence[ModelShape]) -> None:
    """Measure the candidates, and judge the prediction by those that it was not fitted to."""
    wanted = [one for one in outcome.candidates if one.role != "probe"]
    table = Table("zero-shot losses", len(wanted))
    for one in wanted:
        one.zero_shot, cached = bench.zero_shot(one.shape)
        table.row(one.shape, one.predicted, one.zero_shot, _note(one), cached)
        if not cfg.search.keep_students:
            alive = _best(cfg, outcome)
            for other in wanted:
                if other.zero_shot is not None and other not in alive and other.role != "given":
                    bench.forget_student(other.shape)
    new = [one for one in wanted if one.shape not in fitted and one.zero_shot is not None]
    outcome.rank_correlation = predict.rank_correlation(
        [one.predicted for one in new],
        [one.zero_shot for one in new],  # type: ignore[misc]
    )
    if outcome.rank_correlation is not None:
        print(f"rank correlation of predicted and measured over {len(new)} shapes: {outcome.rank_correlation:.3f}")


def _best(cfg: DictConfig, outcome: Outcome) -> list[Candidate]:
    """The best few of those measured so far, whatever they were measured for."""
    rivals = [one for one in outcome.candidates if one.role in ("searched", "validation") and one.zero_shot is not None]
    return sorted(rivals, key=_measured)[: int(cfg.search.finalists)]


def _halve(cfg: DictConfig, bench: Bench, outcome: Outcome) -> None:
    """Distil the best few; the better half goes on for twice the steps, until one is left.

    Shapes of ``search.shapes`` within the budget go through every round beside them, so that they are compared with
    the winner after equal training, and win if they are better.
    """
    alive = _best(cfg, outcome)
    beside = [one for one in outcome.candidates if one.role == "given" and one.rank is not None]
    steps: list[int] = []
    while True:
        steps.append(int(cfg.search.distill_steps) * 2 ** len(steps))
        rivals = [*alive, *beside]
        table = Table(f"distilled for {sum(steps):,} steps", len(rivals))
        for one in rivals:
            loss, cached = bench.distilled(one.shape, steps)
            one.distilled.append(loss)
            table.row(one.shape, one.predicted, loss, _note(one), cached)
        alive = sorted(alive, key=_measured)[: max(1, len(alive) // 2)]
        if len(alive) == 1:
            break
    outcome.steps = steps
    outcome.winner = min(rivals, key=_measured)


def _measured(one: Candidate) -> tuple[float, float, str]:
    """Loss by the latest measurement; equal losses are settled by size and name."""
    loss = one.distilled[-1] if one.distilled else one.zero_shot
    return (np.inf if loss is None else loss, one.costs["num_parameters"], one.key)


def _note(one: Candidate) -> str:
    return "" if one.role == "searched" else one.role


def _finish(
    cfg: DictConfig, folder: Path, scores: Scores, removed: Sequence[Sequence[int]], outcome: Outcome
) -> Outcome:
    """Plans of all candidates, the list, the plots."""
    for one in outcome.candidates:
        one.plan = folder / "plans" / f"{one.key}.yaml"
        write_plan(plan_of(cfg, scores, one.shape, removed), one.plan)
    write_file(folder / "candidates.yaml", output.document(outcome, folder))
    output.plots(outcome, folder)
    print(output.summary(outcome))
    print(f"written: {folder / 'candidates.yaml'}", flush=True)
    return outcome
