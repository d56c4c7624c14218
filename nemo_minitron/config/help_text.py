"""What ``minitron --help`` and ``minitron COMMAND --help`` print: made of the schemas and ``conf/``, with the standard
library alone."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from nemo_minitron.config.examples import EXAMPLES
from nemo_minitron.config.keys import REQUIRED, choices_of, keys
from nemo_minitron.config.schema import COMMANDS, GROUPS, description, summary
from nemo_minitron.config.sections import Cluster

CONF = Path(__file__).parents[1] / "conf"
WIDTH = 100
OPTIONS = {
    "-h, --help": "this text; after a command, its keys",
    "--help-cluster": "after a command, its keys and those of +cluster=slurm",
    "--version": "the version",
    "--cfg job": "print the composed config and stop",
    "--config-path DIR": "take the config file from DIR instead, as NeMo's scripts do",
    "--config-dir DIR": "add DIR to the places where configs are found",
    "--config-name NAME": "name of the config file",
    "+cluster=slurm": "submit the command to Slurm, `run` as a job per stage; cluster.dry_run=true shows the script",
}

Rows = Iterable[tuple[str, str]]


def overview() -> str:
    """All commands, a line each."""
    usage = ["usage: minitron COMMAND [KEY=VALUE ...]", "       minitron help COMMAND"]
    completion = "completion in bash: complete -o nospace -o default -C 'minitron --complete' minitron"
    commands = [(name, summary(name)) for name in COMMANDS]
    return _text([*usage, "", "commands:", *_rows(commands), *_options(), "", completion])


def command_help(command: str, cluster: bool = False) -> str:
    """Examples, every key of ours with its default, what can be chosen by name, and ``conf/COMMAND.yaml``.

    Args:
        cluster: also the keys of ``+cluster=slurm``.
    """
    ours, foreign = [], []
    for name, kind, default, metadata in keys(COMMANDS[command]):
        if metadata.get("foreign"):
            foreign.append((f"{name}.*", metadata["help"]))
            continue
        shown = "required" if default == REQUIRED else "null" if default is None else str(default)
        choices = choices_of(metadata)
        what = " | ".join(choices) if choices else kind.replace(" | None", "").replace("Any", "value")
        ours.append((name, f"{metadata['help']}  [{what}; {shown}]"))
    lines = [f"usage: minitron {command} [KEY=VALUE ...]", "", *_paragraphs(description(command)), "", "examples:"]
    lines += [line for example in EXAMPLES[command] for line in _example(example)]
    lines += ["", "keys:", *_rows(ours)]
    if group := GROUPS.get(command):
        lines += ["", f"{group}=NAME:", *_rows(named(group))]
    if command == "run":
        lines += ["", "settings of recipes, recipe.settings.KEY=VALUE, where a recipe does not say otherwise:"]
        lines += [part for line in settings() for part in _yaml("  " + line.strip())]
    if foreign:
        lines += ["", "sections of NeMo and Lightning:", *_rows(foreign)]
        text = (CONF / f"{command}.yaml").read_text()
        shown_lines = (f"  {line}".rstrip() for line in text.splitlines() if not line.startswith("#"))
        lines += ["", *(part for line in shown_lines for part in _yaml(line))]
    if cluster:
        rows = [(name, metadata["help"]) for name, _, _, metadata in keys(Cluster, "cluster.")]
        lines += ["", "with +cluster=slurm:", *_rows(rows)]
    return _text([*lines, *_options()])


def named(group: str) -> Iterator[tuple[str, str]]:
    """Files of a config group, each with what it says of itself."""
    for file in sorted((CONF / group).glob("[!_]*.yaml")):
        text = file.read_text()
        said = re.search(r"^description: (.+)$", text, re.M)
        yield file.stem, said[1] if said else _first_comment(text)


def _first_comment(text: str) -> str:
    """The comment that a YAML file begins with, as one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


def settings() -> list[str]:
    """Lines of the recipes' common settings, with their comments."""
    block = re.search(r"^settings:\n(.*?)^(?=\w)", (CONF / "recipe" / "_journey.yaml").read_text(), re.M | re.S)
    return [line for line in (block[1] if block else "").splitlines() if line.strip()]


def _options() -> list[str]:
    return ["", "options:", *_rows(OPTIONS.items())]


def _rows(rows: Rows) -> list[str]:
    """Names and what they are in two columns, folded."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0) + 4
    lines = []
    for name, text in rows:
        folded = textwrap.wrap(text, WIDTH - width, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [f"  {name}".ljust(width) + folded[0], *(" " * width + line for line in folded[1:])]
    return [line.rstrip() for line in lines]


def _yaml(line: str) -> list[str]:
    """A line of YAML, its comment folded."""
    before, mark, comment = line.partition(" # ")
    if len(line) <= WIDTH or not mark:
        return [line]
    folded = textwrap.wrap(comment, max(20, WIDTH - len(before) - 3), break_long_words=False)
    return [f"{before} # {folded[0]}", *(" " * len(before) + f" # {part}" for part in folded[1:])]


def _paragraphs(text: str) -> list[str]:
    folded = [textwrap.fill(" ".join(part.split()), WIDTH) for part in text.split("\n\n")]
    return "\n\n".join(folded).splitlines()


def _example(command: str) -> list[str]:
    """A command line, folded as a shell takes it."""
    lines = textwrap.wrap(command, WIDTH - 8, break_long_words=False, break_on_hyphens=False)
    return [("  " if number == 0 else "      ") + line + (" \\" if line is not lines[-1] else "")
            for number, line in enumerate(lines)]  # fmt: skip


def _text(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"
