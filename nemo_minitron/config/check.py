"""Names and types: what a config may hold, and the message when it holds something else."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from nemo_minitron.config.keys import choices_of, keys, tree_of
from nemo_minitron.config.nemo_keys import Tree
from nemo_minitron.config.schema import COMMANDS, COMPOSITE, STRAY, key_called
from nemo_minitron.config.sections import Recipe, Stage, WithCluster
from nemo_minitron.errors import MinitronError, check_choice, did_you_mean

_KINDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}


def known_keys(command: str) -> Tree:
    """Nested names that ``command`` knows, ``cluster`` and the strays of NeMo's files included."""
    tree = tree_of(WithCluster) | tree_of(COMMANDS[command])
    return tree if command in COMPOSITE else STRAY | tree


def recipe_tree(recipe: DictConfig) -> Tree:
    """Names that this recipe knows: its own settings, and below each stage the keys of the stage's command."""
    tree = tree_of(Recipe)
    tree["settings"] = _tree_in(recipe._get_node("settings"))
    stages = recipe._get_node("stages")
    if isinstance(stages, DictConfig) and _has_keys(stages):
        tree["stages"] = {}
        for name, stage in ((str(key), stages[key]) for key in stages):
            command = stage.get("command") if isinstance(stage, DictConfig) else None
            if command not in COMMANDS:
                hint = did_you_mean(str(command), COMMANDS)
                raise MinitronError(f"recipe.stages.{name}.command: no command '{command}'.{hint}")
            tree["stages"][name] = tree_of(Stage) | {"config": known_keys(command)}
    return tree


def refuse_unknown(
    cfg: Any, tree: Tree | None, prefix: str = "", where: str = "", command_tree: Tree | None = None
) -> None:
    """Raise for the first key of ``cfg`` that ``tree`` does not know, naming it in full and the nearest known.

    Args:
        command_tree: of all keys of the command, of which ``tree`` are those below ``prefix``; ``tree`` when None.
    """
    if tree is None or not isinstance(cfg, DictConfig) or not _has_keys(cfg):
        return
    command_tree = tree if command_tree is None else command_tree
    for name in map(str, cfg):
        if name not in tree:
            hint = _suggest(name, tree, prefix, command_tree)
            raise MinitronError(f"unknown key '{prefix}{name}'{f' in {where}' if where else ''}.{hint}")
        refuse_unknown(cfg._get_node(name), tree[name], f"{prefix}{name}.", where, command_tree)


def refuse_unknown_path(key: str, tree: Tree | None, cfg: DictConfig) -> None:
    """The same for one dotted key; ``cfg`` is asked whether a plain value stands where keys are put."""
    prefix, command_tree = "", tree
    for name in key.split("."):
        if prefix:
            value = OmegaConf.select(cfg, prefix.rstrip("."), throw_on_resolution_failure=False)
            if isinstance(value, bool | int | float | str):
                raise MinitronError(f"unknown key '{key}': {prefix.rstrip('.')} is a single value ({value})")
        if tree is not None:
            refuse_unknown(OmegaConf.create({name: None}), tree, prefix, command_tree=command_tree)
            tree = tree[name]
        prefix += f"{name}."


def typed(schema: type, cfg: DictConfig) -> DictConfig:
    """``cfg`` over the defaults of the dataclass ``schema``, types and choices checked, as a plain config."""
    for item in dataclasses.fields(schema):
        node = cfg._get_node(item.name) if item.name in cfg else None
        below = dataclasses.is_dataclass(item.default_factory) or item.metadata.get("foreign")
        if below and node is not None and not isinstance(node, DictConfig):
            raise MinitronError(f"{item.name}: expected keys below it ({item.name}.KEY=…), found {node}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), cfg)
    except ValidationError as error:
        raise MinitronError(_type_message(schema, cfg, error)) from None
    plain = to_plain(merged)
    _refuse_other_choices(schema, plain)
    return plain


def instance(schema: type, cfg: DictConfig) -> Any:
    """The dataclass ``schema`` with the values of ``cfg``, a composed and resolved config.

    Sections of ours are dataclasses of their own, those of NeMo and Lightning plain mappings. Top-level keys that are
    not the command's (:data:`nemo_minitron.config.schema.STRAY`, ``cluster``) are left out.
    """
    names = [item.name for item in dataclasses.fields(schema) if item.name in cfg]
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.masked_copy(cfg, names)))


def to_plain(cfg: Any) -> DictConfig:
    """An untyped copy, interpolations kept."""
    return cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)))


def missing(cfg: Any, prefix: str = "") -> list[str]:
    """Full names of mandatory keys that have no value."""
    found: list[str] = []
    if isinstance(cfg, DictConfig) and _has_keys(cfg):
        for name in map(str, cfg):
            if OmegaConf.is_missing(cfg, name):
                found.append(f"{prefix}{name}")
            else:
                found += missing(cfg._get_node(name), f"{prefix}{name}.")
    return found


def resolve(cfg: DictConfig) -> None:
    """Resolve every ``${…}`` in place; an error names the key."""
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        cause: BaseException | None = error
        while cause is not None:  # a resolver of ours may have refused, underneath OmegaConf's own error
            if isinstance(cause, MinitronError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        name = f"{error.full_key}: " if error.full_key else ""
        raise MinitronError(name + first_lines(error)) from None


def first_lines(error: Exception) -> str:
    """The first line of another library's message, which is the one for users."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _tree_in(cfg: Any) -> Tree | None:
    if isinstance(cfg, DictConfig) and _has_keys(cfg):
        return {str(name): _tree_in(cfg._get_node(name)) for name in cfg}
    return None


def _has_keys(cfg: DictConfig) -> bool:
    return not (cfg._is_none() or cfg._is_interpolation() or cfg._is_missing())


def _suggest(name: str, tree: Tree, prefix: str, command_tree: Tree) -> str:
    if hint := did_you_mean(name, tree):
        return hint.replace("'", f"'{prefix}", 1)
    # the right name in the wrong section: of this command first
    for known in (command_tree, *map(known_keys, COMMANDS)):
        if full := key_called(name, known):
            return f" Did you mean '{full}'?"
    return ""


def _type_message(schema: type, cfg: DictConfig, error: ValidationError) -> str:
    full_key = error.full_key or ""
    for name, kind, _, _ in keys(schema):
        if name == full_key.partition("[")[0]:
            value = OmegaConf.select(cfg, name)
            expected = _KINDS.get(kind.split(" ")[0].split("[")[0], kind)
            if kind.startswith("list["):
                expected += f" of {kind[5:-1]}"
            return f"{full_key}: expected {expected}, found {value!r}"
    return f"{full_key}: {first_lines(error)}"


def _refuse_other_choices(cls: type, cfg: DictConfig, prefix: str = "") -> None:
    for item in dataclasses.fields(cls):
        if isinstance(item.default_factory, type) and dataclasses.is_dataclass(item.default_factory):
            _refuse_other_choices(item.default_factory, cfg[item.name], f"{prefix}{item.name}.")
        choices = choices_of(item.metadata)
        if not choices or OmegaConf.is_missing(cfg, item.name) or OmegaConf.is_interpolation(cfg, item.name):
            continue
        given = cfg[item.name]
        for value in given if isinstance(given, ListConfig) else [given]:
            if value is not None:
                check_choice(f"{prefix}{item.name}", value, choices)
