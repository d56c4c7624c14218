"""What a ``search`` config asks for: how far it goes, the space, the budget, shapes of the user's and probes."""

from __future__ import annotations

import dataclasses
from typing import Any

from nemo_minitron.config.grid import Grid
from nemo_minitron.config.schema import SearchConfig
from nemo_minitron.errors import MinitronError, did_you_mean, required
from nemo_minitron.importance.scores import Scores
from nemo_minitron.model import serving
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.choose import target_shape
from nemo_minitron.prune.plan import TARGETS
from nemo_minitron.recipe import Records
from nemo_minitron.search import latency
from nemo_minitron.search.space import POSITIONS, Budget, Space


def last_stage(cfg: SearchConfig) -> str:
    """The last stage, every key that it needs being there."""
    until = cfg.search.until
    for name, least in (("measure", 1), ("finalists", 1), ("distill_steps", 1), ("validate", 0)):
        if (found := getattr(cfg.search, name)) < least:
            raise MinitronError(f"search.{name}: expected at least {least}, found {found}")
    if not all(0 < share < 1 for share in cfg.search.probes):
        raise MinitronError(f"search.probes: expected shares between 0 and 1, found {cfg.search.probes}")
    serving.check(cfg.search.serving, "search.serving")
    if not cfg.model.get("restore_from_path"):
        return "predict"
    if until != "predict":
        required(cfg, "evaluate.data_prefix")
    if until == "distill" and not (cfg.model.get("data") or {}).get("data_prefix"):
        raise MinitronError(
            "model.data.data_prefix is required for the distillations; set it, or search.until=zero_shot"
        )
    return until


def check_compensation(cfg: SearchConfig, scores: Scores) -> None:
    """Refuse to cut the students of a search that is to re-solve them.

    Raises:
        MinitronError: the scores hold no calibration tokens.
    """
    if cfg.search.compensate and scores.tokens is None:
        raise MinitronError(
            "search.compensate=true: the scores hold no calibration tokens to re-solve weights on; "
            "run `minitron importance calibration.reconstruction=true`, or leave it out, and students are cut"
        )


def space_of(cfg: SearchConfig, shape: ModelShape) -> Space:
    """The sizes that are tried for a source of this shape, on the grid of the distillations."""
    steps = {
        "hidden_size": cfg.search.hidden_step,
        "ffn_hidden_size": cfg.search.ffn_step,
        "num_layers": cfg.search.layers_step,
        "num_query_groups": cfg.search.groups_step,
    }
    grid = Grid.of(cfg.model)
    return Space.of(
        shape,
        steps=steps,
        shrink=cfg.search.shrink,
        min_fraction=cfg.search.min_fraction,
        tensor_parallel=grid.tensor,
        pipeline_parallel=grid.pipeline,
    )


def budget_of(cfg: SearchConfig, shape: ModelShape, records: Records) -> Budget:
    """The budget, with the rates of this device, which are measured once and kept: others would allow other shapes."""
    values: dict[str, Any] = dataclasses.asdict(cfg.budget)
    values["seq_length"] = values["seq_length"] or min(POSITIONS, shape.longest_sequence)
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


def given_shapes(cfg: SearchConfig, source: ModelShape) -> list[ModelShape]:
    """``search.shapes``, in the words of ``prune``."""
    shapes = []
    for item in cfg.search.shapes:
        if not isinstance(item, dict):
            raise MinitronError(f"search.shapes: expected sizes such as {{hidden_size: 512}}, found {item!r}")
        for name in item:
            if name not in TARGETS:
                raise MinitronError(
                    f"search.shapes: unknown size '{name}'; known: {', '.join(TARGETS)}."
                    + did_you_mean(str(name), TARGETS)
                )
        try:
            shapes.append(target_shape(source, item))
        except MinitronError as error:
            raise MinitronError(f"search.shapes: {error}") from None
    return shapes


def probe_shapes(cfg: SearchConfig, space: Space) -> list[ModelShape]:
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
