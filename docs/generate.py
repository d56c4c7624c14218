"""Write ``docs/commands/``: a page per command with every key, from the schemas and ``conf/``.

    python docs/generate.py

``tests/test_docs.py`` fails where the pages are not what this writes. Keys of our own come from
``nemo_minitron/config/schema.py``; those that NeMo and Lightning own, from ``conf/COMMAND.yaml`` with its comments.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nemo_minitron.config import nemo_keys  # noqa: E402
from nemo_minitron.config.help_text import named  # noqa: E402
from nemo_minitron.config.keys import REQUIRED, choices_of, keys  # noqa: E402
from nemo_minitron.config.schema import COMMANDS, GROUPS, description, summary  # noqa: E402
from nemo_minitron.config.sections import Cluster  # noqa: E402
from nemo_minitron.values.check import rules  # noqa: E402
from nemo_minitron.values.rules import shown  # noqa: E402

CONF = ROOT / "nemo_minitron" / "conf"
FOLDER = ROOT / "docs" / "commands"
Row = tuple[str, str, Any, str]
"""Key, type, default, help."""


def pages() -> dict[str, str]:
    """Name of every file in ``docs/commands/``, and its text."""
    found = {f"{command}.md": command_page(command) for command in COMMANDS}
    return found | {"README.md": index(), "cluster.md": cluster_page(), "nemo.md": nemo_page()}


def command_page(command: str) -> str:
    """What a command does, the shortest call, its keys, and what may be chosen by name."""
    ours, foreign, sections = [], [], []
    for name, kind, default, metadata in keys(COMMANDS[command]):
        if metadata.get("foreign"):
            sections.append((name, metadata["help"]))
            foreign += [row for row in yaml_rows(CONF / f"{command}.yaml") if row[0].startswith(f"{name}.")]
        else:
            choices = choices_of(metadata)
            ours.append((name, " \\| ".join(choices) if choices else kind_of(kind), default, metadata["help"]))
    needed = [name for name, _, default, _ in ours + foreign if default == REQUIRED]
    call = " ".join([f"minitron {command}", *(f"{name}=…" for name in needed)])
    lines = [f"# minitron {command}", "", description(command), "", "```", call, "```", "", "## Keys", "", *table(ours)]
    if sections:
        lines += ["", "## Sections of NeMo and Lightning", ""]
        lines += [f"- `{name}`: {text}" for name, text in sections]
        lines += ["", f"Defaults, from `conf/{command}.yaml`; [more names](nemo.md) are known:", ""]
        lines += table(foreign) if foreign else ["none."]
    lines += options(command)
    lines += ["", "## As a Slurm job", "", "`+cluster=slurm` and the keys of [`cluster`](cluster.md)."]
    return page(lines)


def options(command: str) -> list[str]:
    """Files of config groups that the command takes by name, with the first line of what they say of themselves."""
    if command not in GROUPS:
        return []
    group = GROUPS[command]
    lines = ["", f"## {group}=NAME", "", "| name | |", "|---|---|"]
    lines += [f"| `{name}` | {cell(said)} |" for name, said in named(group)]
    if command == "run":
        journey = yaml_rows(CONF / "recipe" / "_journey.yaml")
        lines += [
            "",
            "Their settings, `recipe.settings.KEY=…`, and what they are where a recipe does not say otherwise",
            "(`conf/recipe/_journey.yaml`):",
            "",
        ]
        lines += table((f"recipe.{name}", *rest) for name, *rest in journey if name.startswith("settings."))
    return lines


def cluster_page() -> str:
    """Keys of the ``cluster`` section."""
    rows = [(name, kind_of(kind), default, meta["help"]) for name, kind, default, meta in keys(Cluster, "cluster.")]
    lines = [
        "# +cluster=slurm",
        "",
        "Submits a command to Slurm instead of running it here; every command takes it. `run` becomes a job per stage.",
    ]
    return page([*lines, "How it is used is told in [running.md](../running.md).", "", *table(rows)])


def nemo_page() -> str:
    """Names of NeMo's and Lightning's that are known."""
    lines = [
        "# Names of NeMo and Lightning",
        "",
        "What may stand below these sections, beside the keys that a command's own page lists with their defaults.",
        "They keep the meaning that NeMo 2.4 and Lightning 2.4 give them; any other name is refused.",
        "",
        "In a training every value of theirs is applied, or has no effect and may be given all the same, or is refused",
        "by name before a weight is read:",
    ]
    lines += values_tables()
    lines += ["", "# All names"]
    for section, tree in (
        ("model", nemo_keys.MODEL),
        ("trainer", nemo_keys.TRAINER),
        ("exp_manager", nemo_keys.EXP_MANAGER),
        ("inference", nemo_keys.INFERENCE),
    ):
        for prefix, names in names_below(section, tree):
            lines += ["", f"## {prefix}", "", ", ".join(f"`{name}`" for name in sorted(names))]
    return page(lines)


def values_tables() -> list[str]:
    """What is done with each key's values, in a table per section."""
    lines: list[str] = []
    section = ""
    for key, rule in rules():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines += ["", f"## Values of {section}", "", "| key | |", "|---|---|"]
        only = " or ".join(f"`{shown(value)}`" for value in rule.values) or "`null`"
        said = {"applied": rule.note, "neutral": f"no effect: {rule.note}", "fixed": f"only {only}: {rule.note}"}
        lines.append(f"| `{key.rpartition('.')[2]}` | {cell(said[rule.kind])} |")
    return lines


def index() -> str:
    """Table of contents."""
    lines = ["# Commands", "", "| command | does |", "|---|---|"]
    lines += [f"| [`minitron {command}`]({command}.md) | {cell(summary(command))} |" for command in COMMANDS]
    return page([*lines, "", "Also: [`+cluster=slurm`](cluster.md), [names of NeMo and Lightning](nemo.md)."])


# ------------------------------------------------------------------------------------------------------------ pieces


def table(rows: Any) -> list[str]:
    """Markdown of :data:`Row`."""
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for name, kind, default, text in rows:
        shown = "**required**" if default == REQUIRED else f"`{plain(default)}`"
        lines.append(f"| `{name}` | {kind} | {shown} | {cell(text)} |")
    return lines


def plain(value: Any) -> str:
    """A default as one would write it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(plain, value))}]"
    return str(value)


def kind_of(kind: str) -> str:
    """A schema's type in a word."""
    return kind.replace(" | None", "").replace("Any", "value").replace("str", "text")


def cell(text: str) -> str:
    """Text that a table can hold."""
    return " ".join(text.replace("|", "\\|").split())


def yaml_rows(file: Path) -> Iterator[Row]:
    """Leaves of a YAML file in block style, each with the comment on its line."""
    values = yaml.safe_load(file.read_text()) or {}
    path: list[tuple[int, str]] = []
    for line in file.read_text().splitlines():
        match = re.match(r"( *)([\w]+):(?: +(.*))?$", line)
        if not match or line.lstrip().startswith("#"):
            continue
        indent = len(match[1])
        path = [*((depth, name) for depth, name in path if depth < indent), (indent, match[2])]
        value: Any = values
        for _, name in path:
            value = value.get(name) if isinstance(value, dict) else None
        rest = f" {match[3] or ''}"
        comment = rest.partition(" #")[2].strip()
        if isinstance(value, dict) and not rest.partition(" #")[0].strip():
            continue
        kind = {bool: "bool", int: "int", float: "float", str: "text", list: "list"}.get(type(value), "value")
        yield ".".join(name for _, name in path), "value" if value == REQUIRED else kind, value, comment


def names_below(prefix: str, tree: nemo_keys.Tree) -> Iterator[tuple[str, list[str]]]:
    """Every section at and below ``prefix`` with the names that are leaves there."""
    yield prefix, [name for name, below in tree.items() if below is None]
    for name, below in tree.items():
        if below is not None:
            yield from names_below(f"{prefix}.{name}", below)


def page(lines: list[str]) -> str:
    """A file's text, with a word on where it comes from."""
    head = "<!-- Made by docs/generate.py: change nemo_minitron/config/ or conf/, not this. -->"
    return "\n".join([head, "", *lines]) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file in FOLDER.glob("*.md"):
        file.unlink()
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
