"""Tutorials run top to bottom on the tiny model, their notebooks are what their sources say, their commands are real.

In CI the cells of all run in their order in this process, in one run folder, as a reader has it who goes through the
series; commands run in forks of a process that has imported NeMo. The slow test runs each as the first one, in a kernel
of its own, with an empty folder and commands that start cold.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import symtable
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jupytext
import nbformat
import numpy as np
import pytest

from nemo_minitron.api import process, stages, training
from nemo_minitron.config.compose import compose
from tests import test_docs as docs
from tests.zygote import Zygote

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tutorials"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
NAMES = [source.stem for source in SOURCES]
TOP = 2
"""Cells of code at the top, which say what is missing and set paths and sizes."""
each = pytest.mark.parametrize("name", NAMES)


def load(name: str) -> ModuleType:
    """A script that is in no package."""
    spec = importlib.util.spec_from_file_location(f"loaded_{Path(name).stem}", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def execute():
    return load("tutorials/execute.py")


def markdown(name: str) -> str:
    cells = jupytext.read(FOLDER / f"{name}.py").cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def code(name: str) -> list[str]:
    return [cell.source for cell in jupytext.read(FOLDER / f"{name}.py").cells if cell.cell_type == "code"]


# --------------------------------------------------------------------------------------------------------- as committed


def test_there_are_tutorials():
    assert len(NAMES) >= 9 and NAMES[0] == "00_journey"


@each
def test_notebook_is_paired_with_its_source(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    expected = jupytext.read(FOLDER / f"{name}.py")
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in expected.cells]


@each
def test_notebook_is_committed_with_its_outputs(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "not executed from top to bottom"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:  # of a figure the bytes may spell anything
        output.get("data", {}).pop("image/png", None)
    text = nbformat.writes(notebook)
    for mine in ("/tmp/", "/home/", "/work/", "/root/", "site-packages", r"\r", "torchao"):
        assert mine not in text, f"{mine} of the machine that executed it"


def test_notebooks_are_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.ipynb")) < 3 << 20


def test_all_are_committed_on_the_same_model():
    assert len({re.search(r'^MODEL = "(\w+)"', path.read_text(), re.MULTILINE)[1] for path in SOURCES}) == 1


@each
def test_tutorial_begins_with_a_drawing_and_what_it_takes(name, execute):
    top = jupytext.read(FOLDER / f"{name}.py").cells[0].source
    assert f"](pictures/{name}.svg)" in top
    (model,) = re.findall(r'^MODEL = "(\w+)"', (FOLDER / f"{name}.py").read_text(), re.MULTILINE)
    rows = re.findall(r'^\| `"(\w+)"` \| \d+ (?:s|min) \| \d+\.\d GiB \|$', top, re.MULTILINE)
    assert model in rows and set(rows) <= set(execute.MODELS), "time and memory"
    assert len(rows) == len(re.findall(r'^\| `"', top, re.MULTILINE)), "a row that was not measured"


@each
def test_tutorial_ends_with_exercises(name):
    exercises = re.search(r"\n## Exercises\n\n(.*?)\n## ", markdown(name), re.DOTALL)[1]
    assert 2 <= len(re.findall(r"^\d\. ", exercises, re.MULTILINE)) <= 3


@each
def test_what_is_missing_is_said_with_what_installs_it(name, monkeypatch, capsys):
    (demo,) = re.findall(r'"demo": \["(.+?)"\]', (ROOT / "setup.py").read_text())
    exec(code(name)[0], {})
    assert capsys.readouterr().out == "all packages are there\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    exec(code(name)[0], {})
    assert capsys.readouterr().out.splitlines()[1:] == ["pip install -e ..", f"pip install --no-deps {demo}"]


@each
def test_a_cell_can_be_taken_elsewhere_with_the_cell_that_sets_paths(name):
    """Names that a cell uses are its own, or of the cells at the top."""
    cells = code(name)
    given = set().union(*(names(cell)[0] for cell in cells[1:TOP])) | set(dir(builtins))
    for cell in cells:
        own, used = names(cell)
        assert used <= own | given, f"{sorted(used - own - given)}:\n{cell}"


def names(cell: str) -> tuple[set[str], set[str]]:
    """Names that a cell gives a value at its outermost level, and those that it uses from there."""
    outermost = symtable.symtable(cell, "cell", "exec")
    own = {s.get_name() for s in outermost.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    used = {s.get_name() for s in outermost.get_symbols() if s.is_referenced()}
    inner = outermost.get_children()
    while inner:
        table = inner.pop()
        used |= {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
        inner += table.get_children()
    return own, used


def test_a_name_of_another_cell_is_found():
    assert names("import os\nx = [y * z for y in os.environ]") == ({"os", "x"}, {"os", "z"})


# ------------------------------------------------------------------------------------------------------------- drawings


def test_drawings_are_up_to_date_and_small():
    drawings = load("docs/drawings.py")
    files = {path.stem: path for path in drawings.FOLDER.iterdir()}
    assert sorted(files) == sorted(drawings.DRAWINGS) == NAMES
    for name, file in files.items():
        text = file.read_text(encoding="utf-8")
        assert drawings.digest() in text, f"{name}: run python docs/drawings.py"
        assert len(text.encode()) <= 100 << 10


def test_drawings_are_drawn(tmp_path):
    drawings = load("docs/drawings.py")
    drawings.main(folder=tmp_path)
    assert sorted(path.stem for path in tmp_path.glob("*.svg")) == NAMES


# -------------------------------------------------------------------------------------------------------- what is shown


def shown(folder: Path) -> list[docs.Shown]:
    found = []
    for name in NAMES:
        (folder / f"{name}.md").write_text(markdown(name))
        found += docs.commands(folder / f"{name}.md")
    return found


def test_every_command_for_8b_is_composed(tmp_path):
    commands = shown(tmp_path)
    assert {command.file.removesuffix(".md") for command in commands} == set(NAMES), "each shows the 8B commands"
    for command in commands:
        argv = docs.minitron_words(docs.words_of(command))
        assert argv is not None, command
        docs.compose_as_shown(argv)


def test_an_unknown_key_in_a_console_block_is_found(tmp_path):
    (tmp_path / "a.md").write_text("```console\n$ minitron convert input_path=a output_path=b\n```\n")
    (command,) = docs.commands(tmp_path / "a.md")
    with pytest.raises(Exception, match="input_path"):
        docs.compose_as_shown(docs.minitron_words(docs.words_of(command)))


@each
def test_linked_files_and_named_keys_are_there(name, tmp_path):
    text = re.sub(r"```.*?```", "", markdown(name), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        there = (FOLDER / target).with_suffix(".py") if target.endswith(".ipynb") else FOLDER / target
        assert "://" in target or there.exists(), target
    (tmp_path / "a.md").write_text(text)
    docs.test_named_keys_and_commands_are_known(tmp_path / "a.md")


@pytest.mark.parametrize("model", ["tiny", "smollm2"])
def test_calls_of_the_series_are_composed_and_agree(model, execute, tmp_path, monkeypatch):
    """Every call that the cells would make, each tutorial by itself: what two make of one name, they make alike."""
    known: dict[str, tuple[str, Any]] = {}
    commands = set()
    for name in NAMES:
        folder = tmp_path / name
        folder.mkdir()
        for command, config in asked(execute.source(name, model), folder, monkeypatch):
            commands.add(command)
            plain = json.loads(json.dumps(config, default=str).replace(str(folder), "RUN"))
            for key in ("output_path", "output_prefix", "model.nemo_path", "export.save_path"):
                if command not in ("generate", "run") and key in plain and not plain.get("plan_only"):
                    made = known.setdefault(plain[key], (name, plain))
                    assert made[1] == plain, f"{plain[key]}: {made[0]} and {name}"
    assert commands == {
        "convert", "preprocess", "finetune", "importance", "prune", "distill", "evaluate", "generate", "run", "search",
        "report", *(["synthesize"] if model == "tiny" else []),
    }  # fmt: skip


RESULT: dict[str, Any] = {"val_loss": 3.0, "perplexity": 20.1, "num_parameters": 1000, "answer": ""}
RESULT |= {"source": {"loss": 3.0}, "winner": "a", "candidates": [{"name": "a", "plan": "plans/a.yaml"}]}
"""What a command that does not run leaves, for a cell that reads it."""
FOLDERS = {"importance": ["scores.json"], "search": ["candidates.yaml"]}
"""Commands whose output is a folder, with a file in it."""


def asked(source: str, folder: Path, monkeypatch) -> list[tuple[str, dict[str, Any]]]:
    """Commands with their configs, of which none runs. Cells may fail for want of files, once their calls are made."""
    found: list[tuple[str, dict[str, Any]]] = []

    def call(command, config, settings=None, words=(), *, verbose=False):
        values = {key: value for key, value in config.items() if value is not None} | dict(settings or {})
        values = json.loads(json.dumps(values, default=os.fspath))
        compose(command, words, config=process.nested(values))
        found.append((command, values | {"words": list(words)}))
        for key, end in (("output_path", ""), ("output_prefix", "_text_document.idx"), ("model.nemo_path", ""),
                         ("export.save_path", "")):  # fmt: skip
            if key in values and not values.get("plan_only"):
                path = Path(values[key] + end, *FOLDERS.get(command, ()))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(RESULT))
        return ""

    monkeypatch.setenv("MINITRON_TUTORIALS", str(folder))
    for module in (stages, training):
        monkeypatch.setattr(module, "call", call)
    namespace: dict[str, Any] = {}
    for cell in jupytext.reads(source, fmt="py:percent").cells:
        if cell.cell_type == "code":
            before = len(found)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
                exec(cell.source, namespace)
            calls = set(re.findall(r"\bnm\.([a-z]+)\(", cell.source)) - {"synthesize"}
            assert calls <= {command for command, _ in found[before:]}, cell.source
    return found


# ------------------------------------------------------------------------------------------------------------- executed


@pytest.fixture(scope="module")
def forked(tmp_path_factory) -> Iterator[Path]:
    """Commands run in forks of one process, in a folder in which all tutorials work."""
    folder, zygote = tmp_path_factory.mktemp("tutorials"), Zygote()

    def run(argv: list[str], verbose: bool) -> tuple[int, str]:
        ((status, printed),) = zygote.run("tests.test_docs:run", 1, list(argv), str(folder))
        if verbose:
            print(printed, end="")
        return status, printed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "_run", run)
        patch.setenv("MINITRON_TUTORIALS", str(folder))
        patch.setenv("MPLBACKEND", "agg")
        yield folder
    zygote.close()


@each
def test_tutorial_executes_on_the_tiny_model(name, forked, execute, monkeypatch):
    from IPython import display

    pictures: list[Any] = []
    monkeypatch.setattr(display, "display", pictures.append)
    printed, namespace = io.StringIO(), {"__name__": "__main__"}
    for cell in jupytext.reads(execute.source(name, "tiny"), fmt="py:percent").cells:
        if cell.cell_type == "code":
            tree = ast.parse(cell.source)
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else ast.parse("None").body[0]
            with contextlib.redirect_stdout(printed):
                exec(compile(tree, name, "exec"), namespace)
                value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
            pictures += [value] if type(value).__name__ == "Figure" else []
    check(name, len(pictures), printed.getvalue())


@pytest.mark.slow
@each
def test_tutorial_executes_by_itself(name, execute, tmp_path, monkeypatch):
    monkeypatch.setenv("MINITRON_TUTORIALS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = jupytext.reads(execute.source(name, "tiny"), fmt="py:percent")
    took = execute.execute(notebook)
    assert took.seconds > 0 and took.peak > 100 << 20
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    check(name, pictures, "".join(output.get("text", "") for output in outputs))


def check(name: str, pictures: int, printed: str) -> None:
    """It has a figure, and what it prints says what its files say."""
    assert pictures >= (3 if name == "06_search" else 1)
    if name.startswith("04"):
        cost, won, share = map(
            float, re.search(r"pruning cost ([\d.]+) nats/token, .* won ([-\d.]+) back: (-?\d+)%", printed).groups()
        )
        assert cost > 0 and abs(100 * won / cost - share) < 2
        assert won > 0, "the tiny student learns"
    if name == "05_results":
        above = [float(value) for value in re.findall(r"([+-]\d+\.\d{3})$", printed, re.MULTILINE)]
        teacher, depth, depth_taught, width, width_taught = above
        assert teacher == 0 and depth > depth_taught > 0 and width > width_taught > 0
    if name == "06_search":
        assert re.search(r"best: \d+ layers, hidden \d+, ffn \d+; loss", printed)


# ------------------------------------------------------------------------------------------------------ what makes them


def test_cleaning_leaves_nothing_of_the_machine(execute, monkeypatch):
    cell = nbformat.v4.new_code_cell("1")
    text = f"done in {execute.FOLDER}/tiny/a and {execute.HERE}/b\n[1/13] distill  step 2/9  ETA 0:02\n"
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=part) for part in (text[:20], text[20:])]
    cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="a warning"))
    cell.metadata["execution"] = {"iopub.execute_input": "2020-01-01"}
    notebook = nbformat.v4.new_notebook(cells=[cell])
    execute.clean(notebook)
    assert [output.text for output in cell.outputs] == ["done in runs/tutorial/tiny/a and b\n"]
    assert "execution" not in cell.metadata and cell.id == "cell-0"


def test_time_and_memory_are_put_in_the_row_of_their_model(execute):
    text = '# | `"tiny"` | ? |\n# | `"smollm2"` | 1 h | 9 GiB |\n# more'
    text = execute.told(execute.told(text, "smollm2", 301, 4 << 30), "tiny", 14.2, 1 << 29)
    assert text == '# | `"tiny"` | 10 s | 0.5 GiB |\n# | `"smollm2"` | 5 min | 4.0 GiB |\n# more'
    new = execute.told("# | `MODEL` | time |\n# |---|--:|\n# more", "tiny", 14.2, 1 << 29)
    assert new == '# | `MODEL` | time |\n# |---|--:|\n# | `"tiny"` | 10 s | 0.5 GiB |\n# more'
    with pytest.raises(ValueError, match="row of tiny, found 0"):
        execute.told("nothing", "tiny", 1, 1)


def test_time_and_memory_of_what_is_started_are_counted(execute):
    work = (
        "import time; kept = bytearray(300 << 20); end = time.process_time() + 1\nwhile time.process_time() < end: pass"
    )
    others = execute.Looks()  # what else this process has started
    with others:
        time.sleep(2 * execute.EVERY_S)
    looks = execute.Looks()
    with looks:
        subprocess.run([sys.executable, "-c", work + "\ntime.sleep(1.5)"], check=True)
    assert 250 << 20 < looks.peak - others.peak < 500 << 20 and looks.seconds >= others.seconds + 1


def test_texts_alone_are_brought_up_to_date(execute, tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "HERE", tmp_path)
    source = tmp_path / "a.py"
    source.write_text("# %% [markdown]\n# before\n\n# %%\n1 + 1\n")
    notebook = jupytext.read(source)
    notebook.cells[1].update(execution_count=1, outputs=[nbformat.v4.new_output("stream", name="stdout", text="2")])
    (tmp_path / "a.ipynb").write_text(nbformat.writes(notebook))
    source.write_text("# %% [markdown]\n# after\n\n# %%\n1 + 1\n\n# %% [markdown]\n# more\n")
    execute.retell("a")
    cells = nbformat.read(tmp_path / "a.ipynb", as_version=4).cells
    assert [cell.source for cell in cells] == ["after", "1 + 1", "more"] and cells[1].outputs[0].text == "2"
    source.write_text("# %%\n1 + 2\n")
    with pytest.raises(SystemExit, match="its code has changed"):
        execute.retell("a")


def test_index_files_are_read_as_megatron_reads_them(tmp_path):
    """The reader that 01 shows against Megatron's own writer."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    (cell,) = [cell for cell in code("01_model_and_data") if "def read_tokens" in cell]
    namespace: dict = {}
    exec(cell.partition("\nfor prefix in")[0], namespace)
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    written = [np.arange(5), np.array([7]), np.arange(100, 103)]
    for document in written:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "a.idx"))
    for got, expected in zip(namespace["read_tokens"](tmp_path / "a"), written, strict=True):
        np.testing.assert_array_equal(got, expected)
