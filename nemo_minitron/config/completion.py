"""Completion of a command line in bash and zsh, from the schemas alone.

    complete -o nospace -o default -C 'minitron --complete' minitron

Bash calls the program with the line and the cursor in ``COMP_LINE`` and ``COMP_POINT``, and takes each line that it
prints for one completion; zsh does so after ``autoload -U bashcompinit && bashcompinit``.
"""

from __future__ import annotations

from collections.abc import Mapping

from nemo_minitron.config.help_text import OPTIONS, named
from nemo_minitron.config.keys import choices_of, keys
from nemo_minitron.config.schema import COMMANDS, GROUPS


def completions(environment: Mapping[str, str]) -> list[str]:
    """What the word before the cursor may become; nothing where a file name is meant, which the shell completes.

    A word that holds ``=`` is completed behind it, where bash splits words.
    """
    line = environment.get("COMP_LINE", "")
    before = line[: int(environment.get("COMP_POINT") or len(line))].split(" ")
    word, earlier = before[-1], [part for part in before[1:-1] if part]
    command = next((part for part in earlier if part in COMMANDS), None)
    if word.startswith("-"):
        found = [flag for option in OPTIONS for flag in option.split(", ") if flag.startswith("-")]
        return [flag.split(" ")[0] for flag in found if flag.startswith(word)]
    if command is None:
        return [f"{name} " for name in (*COMMANDS, "help") if name.startswith(word)]
    key, equals, value = word.partition("=")
    if equals:
        return [f"{choice} " for choice in _values(command, key) if choice.startswith(value)]
    return [f"{name}=" for name in _names(command) if name.startswith(word)]


def _names(command: str) -> list[str]:
    names = [name for name, _, _, metadata in keys(COMMANDS[command]) if not metadata.get("foreign")]
    group = GROUPS.get(command)
    return sorted({*names, *([group] if group else [])})


def _values(command: str, key: str) -> list[str]:
    if key == GROUPS.get(command):
        return [name for name, _ in named(key)]
    for name, kind, _, metadata in keys(COMMANDS[command]):
        if name == key:
            return list(choices_of(metadata)) or (["true", "false"] if kind.startswith("bool") else [])
    return []
