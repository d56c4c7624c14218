"""What a recipe's stages are: each one of our commands with its configuration, composed and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_minitron.config.schema import COMMANDS, RunConfig
from nemo_minitron.errors import MinitronError, did_you_mean
from nemo_minitron.report.measures import ROLES

Compose = Callable[..., DictConfig]
"""``compose(command, overrides, config=mapping)``: the checked, resolved config of a command."""


@dataclass(frozen=True)
class Stage:
    """One step of a recipe, its configuration resolved.

    Attributes:
        inputs: files, folders or glob patterns whose content decides the result.
        outputs: files or folders that the stage writes.
        work: folder of its own for checkpoints; emptied before a start that is not a resumption.
    """

    name: str
    command: str
    config: DictConfig
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    work: Path | None


def load_stages(cfg: RunConfig, compose: Compose) -> dict[str, Stage]:
    """The recipe's stages in order, each configuration composed and checked."""
    recipe = cfg.recipe
    if not isinstance(recipe, Mapping) or not recipe.get("order"):
        raise MinitronError(f"recipe: expected recipe=NAME of a file that says its order of stages, found {recipe!r}")
    stages: dict[str, Stage] = {}
    known = recipe.get("stages") or {}
    for name in recipe["order"]:
        if name not in known:
            raise MinitronError(f"recipe.order: there is no stage '{name}'." + did_you_mean(name, known))
        node = known[name]
        if not node.get("command"):
            raise MinitronError(f"recipe.stages.{name}.command is missing")
        try:
            config = compose(node["command"], node.get("overrides") or (), config=_stage_config(node, cfg))
        except MinitronError as error:
            raise MinitronError(f"stage '{name}': {error}") from None
        if "cluster" in config:
            raise MinitronError(f"stage '{name}': a stage of a recipe runs here; its cluster section is not for it")
        work = Path(node["work"]) if node.get("work") else None
        if work is not None and not _is_inside(work, Path(cfg.run_dir)):
            raise MinitronError(f"recipe.stages.{name}.work: expected a folder inside {cfg.run_dir}, found {work}")
        inputs, outputs = (tuple(node.get(key) or ()) for key in ("inputs", "outputs"))
        inputs += tuple(config.get("extensions") or ())
        stages[name] = Stage(name, node["command"], config, inputs, outputs, work)
    for role, path in (recipe.get("roles") or {}).items():
        if role not in ROLES:
            raise MinitronError(f"recipe.roles: expected {', '.join(ROLES)}, found '{role}' ({path})")
    return stages


def chosen(cfg: RunConfig, stages: Mapping[str, Stage]) -> list[Stage]:
    """Those that ``stages=[…]`` names, or all; in the recipe's order, in which each finds what it reads.

    Raises:
        MinitronError: the recipe has no stage of a name.
    """
    for name in cfg.stages or ():
        if name not in stages:
            raise MinitronError(f"stages: the recipe has no stage '{name}'." + did_you_mean(name, stages))
    return [stage for stage in stages.values() if cfg.stages is None or stage.name in cfg.stages]


def _stage_config(node: Mapping[str, Any], cfg: RunConfig) -> dict[str, Any]:
    """A stage's own keys; the extensions of the run are those of every stage that takes some."""
    config = {**(node.get("config") or {})}
    if cfg.extensions and any(item.name == "extensions" for item in fields(COMMANDS[node["command"]])):
        config["extensions"] = [*cfg.extensions, *(config.get("extensions") or [])]
    return config


def _is_inside(path: Path, folder: Path) -> bool:
    path, folder = path.resolve(), folder.resolve()
    return path != folder and path.is_relative_to(folder)
