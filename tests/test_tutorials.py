"""Tutorials run top to bottom on the tiny model, their notebooks are what their sources say, their commands are real.

In CI all run in their order in one kernel, whose names are forgotten in between, and in one run folder, as a reader has
it who goes through the series. The slow test runs each as the first one: fresh kernel, empty folder.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from nemo_minitron.config.compose import compose
from tests import test_docs as docs

FOLDER = Path(__file__).parents[1] / "tutorials"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
NAMES = [source.stem for source in SOURCES]
each = pytest.mark.parametrize("name", NAMES)


def load(name: str):
    """A module of the folder, which is no package."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))  # they import each other, as beside a notebook
    spec = importlib.util.spec_from_file_location(f"tutorials_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(name: str):
    """The notebook of a source, on the tiny model whatever model the committed outputs are of."""
    return jupytext.reads(load("workspace").source(name, "tiny"), fmt="py:percent")


def markdown(name: str) -> str:
    cells = jupytext.read(FOLDER / f"{name}.py").cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


# --------------------------------------------------------------------------------------------------------- as committed


def test_there_are_notebooks():
    assert len(NAMES) >= 9 and NAMES[0] == "00_journey"


@each
def test_notebook_is_paired_with_its_source(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    expected = jupytext.read(FOLDER / f"{name}.py")
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in expected.cells]


@each
def test_notebook_is_committed_with_its_outputs(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1)), "not executed from top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:  # of a figure the bytes may spell anything
        output.get("data", {}).pop("image/png", None)
    text = nbformat.writes(notebook)
    for mine in ("/tmp/", "/home/", "/work/", "/root/", "site-packages", r"\r"):
        assert mine not in text, f"{mine} of the machine that executed it"


def test_notebooks_are_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.ipynb")) < 3 << 20


def test_all_are_committed_on_the_same_model():
    assert len({re.search(r'^MODEL = "(\w+)"', path.read_text(), re.MULTILINE)[1] for path in SOURCES}) == 1


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
        assert "://" in target or (FOLDER / target).with_suffix(".py").exists(), target
    (tmp_path / "a.md").write_text(text)
    docs.test_named_keys_and_commands_are_known(tmp_path / "a.md")


@pytest.mark.parametrize("model", ["tiny", "smollm2"])
def test_commands_of_the_series_are_composed_on_either_model(model, tmp_path, monkeypatch):
    """Every command line that the cells would run, whatever its model; nothing runs."""
    commands = cells(model, tmp_path, monkeypatch)
    assert len(commands) > 25
    assert {words[0] for words in commands} >= {"convert", "finetune", "prune", "distill", "search", "report", "run"}
    for command, *overrides in commands:
        compose(command, overrides)


def cells(model: str, folder: Path, monkeypatch) -> list[list[str]]:
    """Words of all commands, of which none runs; other cells may fail for want of files."""
    import shlex

    monkeypatch.setenv("MINITRON_TUTORIALS", str(folder))
    monkeypatch.syspath_prepend(str(FOLDER))
    workspace = load("workspace")
    monkeypatch.setitem(sys.modules, "workspace", workspace)
    commands: list[list[str]] = []
    monkeypatch.setattr(workspace.Workspace, "needs", lambda self, *names: None)
    monkeypatch.setattr(workspace.Workspace, "minitron", lambda self, line: commands.append(shlex.split(line)) or "")
    monkeypatch.setattr(
        workspace.Workspace, "read", lambda self, name: pytest.fail("read in a cell that runs commands")
    )
    for name in NAMES:
        namespace: dict = {}
        for cell in jupytext.reads(workspace.source(name, model), fmt="py:percent").cells:
            runs = re.search(r"\bminitron\(|^import |^from |^[A-Z]+ = ", cell.source, re.MULTILINE)
            if cell.cell_type == "code" and runs:
                try:
                    exec(cell.source, namespace)
                except Exception:  # it reads what nothing has written
                    assert "minitron(" not in cell.source, f"{name}: a command needs what another cell reads"
    return commands


# ------------------------------------------------------------------------------------------------------------- executed


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        path = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        patch.setenv("MINITRON_TUTORIALS", str(tmp_path_factory.mktemp("tutorials")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield patch


@pytest.fixture(scope="module")
def kernel(environment):
    """One kernel for all, so that NeMo is imported once."""
    with load("execute").kernel() as client:
        yield client


@each
def test_tutorial_executes_on_the_tiny_model(name, kernel):
    notebook = tiny(name)
    load("execute").execute_in(kernel, notebook)
    check(name, notebook)


@pytest.mark.slow
@each
def test_tutorial_executes_by_itself(name, environment, tmp_path):
    environment.setenv("MINITRON_TUTORIALS", str(tmp_path))
    notebook = tiny(name)
    client = NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": FOLDER}})
    client.execute()
    check(name, notebook)


def check(name: str, notebook) -> None:
    """It ends with a figure, and what it prints says what its files say."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    printed = "".join(output.get("text", "") for output in outputs)
    if found := re.search(r"pruning cost ([\d.]+) nats/token, .* won ([-\d.]+) back: (-?\d+)%", printed):
        cost, won, share = map(float, found.groups())
        assert cost > 0 and abs(100 * won / cost - share) < 2
        assert won > 0, "the tiny student learns"
    elif name.startswith("04"):
        pytest.fail("no result is printed")
    if name == "05_results":
        above = [float(value) for value in re.findall(r"([+-]\d+\.\d{3})$", printed, re.MULTILINE)]
        teacher, depth, depth_taught, width, width_taught = above
        assert teacher == 0 and depth > depth_taught > 0 and width > width_taught > 0
    if name == "06_search":
        assert re.search(r"best: \d+ layers, hidden \d+, ffn \d+", printed)


# ------------------------------------------------------------------------------------------------------ what they share


def test_a_command_is_found_again_until_it_or_what_it_reads_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINITRON_TUTORIALS", str(tmp_path))
    workspace = load("workspace").Workspace("tiny")
    ran: list[list[str]] = []

    def run(words: list[str]) -> str:
        ran.append(words)
        (workspace.folder / words[-1].partition("=")[2]).write_text("written")
        return "printed\n"

    monkeypatch.setattr(workspace, "_run", run)
    first, second = "convert precision=32 output_path=a.nemo", "evaluate model.restore_from_path=a.nemo output_path=b"
    for command in (first, second, first, second):
        assert workspace.minitron(command) == "printed\n"
    assert len(ran) == 2 and "made before" in capsys.readouterr().out
    workspace.minitron("convert precision=bf16 output_path=a.nemo")
    workspace.minitron(second)
    assert len(ran) == 4, "its input was made anew"
    (workspace.folder / "b").unlink()
    workspace.minitron(second)
    assert len(ran) == 5


def test_logs_of_a_training_stay_as_long_as_it_does(tmp_path, monkeypatch):
    monkeypatch.setenv("MINITRON_TUTORIALS", str(tmp_path))
    workspace = load("workspace").Workspace("tiny")
    train, log = "distill model.nemo_path=a.nemo exp_manager.exp_dir=logs", workspace.folder / "logs" / "metrics.csv"
    ran: list[list[str]] = []

    def run(words: list[str]) -> str:
        ran.append(words)
        if "plan_only=true" not in words:
            assert not log.exists(), "curves of two trainings would be mixed"
            log.parent.mkdir()
            log.write_text("")
            (workspace.folder / "a.nemo").write_text("")
        return ""

    monkeypatch.setattr(workspace, "_run", run)
    for command in (train, f"{train} plan_only=true", train):
        workspace.minitron(command)
    assert len(ran) == 2 and log.exists()
    workspace.minitron(f"{train} trainer.max_steps=2")
    log.unlink()
    log.parent.rmdir()
    workspace.minitron(f"{train} trainer.max_steps=2")
    assert len(ran) == 4, "it left no logs"


def test_a_failed_command_stops_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setenv("MINITRON_TUTORIALS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    workspace = load("workspace").Workspace("tiny")
    with pytest.raises(RuntimeError, match=r"(?s)status 2.*minitron: unknown key 'output_pat'"):
        workspace.minitron("synthesize model=tiny output_pat=source")


def test_what_is_printed_is_text_and_shown_once():
    from IPython.core.formatters import DisplayFormatter

    printed = load("workspace").Printed("a line\n")
    assert printed == "a line\n" and re.search("line", printed)
    assert DisplayFormatter().format(printed) == ({}, {})


def test_cleaning_leaves_nothing_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("MINITRON_TUTORIALS", str(tmp_path))
    cell = nbformat.v4.new_code_cell("1")
    text = f"$ minitron\n 10%|#  | left\rdone in {tmp_path}/tiny/a\n(made before: a)\n"
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=part) for part in (text[:20], text[20:])]
    cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="a warning"))
    cell.metadata["execution"] = {"iopub.execute_input": "2020-01-01"}
    notebook = nbformat.v4.new_notebook(cells=[cell])
    load("execute").clean(notebook)
    assert [output.text for output in cell.outputs] == ["$ minitron\ndone in RUN/a\n"]
    assert "execution" not in cell.metadata and cell.id == "cell-0"


def test_index_files_are_read_as_megatron_reads_them(tmp_path):
    """The reader that 01 shows against Megatron's own writer."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    code = next(c.source for c in jupytext.read(FOLDER / "01_model_and_data.py").cells if "def read_tokens" in c.source)
    namespace: dict = {"np": np, "RUN": tmp_path}
    exec(code.partition("\ndocuments =")[0], namespace)
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    written = [np.arange(5), np.array([7]), np.arange(100, 103)]
    for document in written:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "a.idx"))
    for got, expected in zip(namespace["read_tokens"]("a"), written, strict=True):
        np.testing.assert_array_equal(got, expected)
