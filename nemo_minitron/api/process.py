"""One command of ``minitron`` in a process of its own, called from Python.

Each call is a process, as each stage of a recipe is: its memory is returned, its process groups end with it, and a
notebook's kernel stays as it was. With several devices that process starts one for each.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import write_file
from nemo_minitron.jobs import lifeline

_LAST_LINES = 15
"""Lines of a failed command's output that its error shows."""

Settings = Mapping[str, Any]
"""Values by their dotted keys, those of the command line: ``{"model.optim.lr": 1e-4}``; or below them, as a YAML file
has them: ``{"model": {"optim": {"lr": 1e-4}}}``."""


def call(
    command: str,
    config: Mapping[str, Any],
    settings: Settings | None = None,
    words: Sequence[str] = (),
    *,
    verbose: bool = False,
) -> str:
    """Run ``minitron COMMAND`` to its end.

    Args:
        config: values by their dotted keys; those that are None are left to the command's defaults.
        settings: further ones, which win.
        words: overrides in the grammar of the command line, which win over both.
        verbose: show what the command prints, progress included, on ``sys.stdout``; else nothing is shown.

    Returns:
        What it printed.

    Raises:
        MinitronError: what the command would have said to a user: a bad key, value or file.
        RuntimeError: it failed otherwise; with its last lines.
        KeyboardInterrupt: it was interrupted, and has left its destination in order.
    """
    values = {key: value for key, value in config.items() if value is not None} | dict(settings or {})
    with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
        write_file(Path(folder) / "call.yaml", json.dumps(nested(values), default=os.fspath, ensure_ascii=False))
        argv = [command, *words, "--config-path", folder, "--config-name", "call.yaml"]
        code, printed = _run(argv, verbose)
    if code == 0:
        return printed
    lines = [line for line in re.split(r"[\r\n]+", printed) if line.strip()]
    said = [line for line in lines if line.startswith("minitron: ")]
    if code == 2 and said:
        raise MinitronError(said[-1].removeprefix("minitron: "))
    if code == 130:
        raise KeyboardInterrupt
    raise RuntimeError(f"minitron {command} ended with status {code}:\n" + "\n".join(lines[-_LAST_LINES:]))


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as a tree, later ones winning.

    A mapping adds its own keys to those that are there, as ``{"trainer": {"precision": "bf16"}}`` does to
    ``trainer.max_steps``. ``values`` is left as it is.

    Raises:
        MinitronError: a key below one that holds a value.
    """
    tree: dict[str, Any] = {}
    for key, value in values.items():
        _put(tree, key, value)
    return tree


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    node = tree
    for name in above:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise MinitronError(f"{key}: '{name}' above it has a value, {node!r:.80}, and cannot hold keys")
    if not isinstance(value, Mapping):
        node[last] = value
        return
    if not isinstance(node.get(last), dict):
        node[last] = {}
    for name, below in value.items():
        _put(node[last], str(name), below)


def _run(argv: Sequence[str], verbose: bool) -> tuple[int, str]:
    """Exit status and output of ``python -m nemo_minitron ARGV``, both streams in the order in which they came."""
    root = str(Path(__file__).parents[2])  # a child must find the package that called it
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    with lifeline.starting():  # which tells the child by its environment
        process = subprocess.Popen(
            [sys.executable, "-m", "nemo_minitron", *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
        )
    assert process.stdout is not None
    parts: list[bytes] = []
    try:
        while part := os.read(process.stdout.fileno(), 1 << 16):
            parts.append(part)
            if verbose:
                sys.stdout.write(part.decode(errors="replace"))
                sys.stdout.flush()
        process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        process.stdout.close()
    return process.returncode, b"".join(parts).decode(errors="replace")
