"""Bounds of the house: sizes of modules and functions, no circle of imports, typed signatures, docstrings that name."""

import ast
import re
from pathlib import Path
from statistics import median

import grimp
import pytest

import nemo_minitron

PACKAGE = Path(nemo_minitron.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
TYPED = ("stages/", "prune/", "importance/", "distill/")
OPENINGS = re.compile(r"(Of|As|By|Through|For|With|In|At|On|Under|From|To|And|That)\b")
ARCHAIC = re.compile(
    r"\b(foretells?|foretold|surer|lest|thereof|wherein|whereby|whence|thence|hitherto|henceforth|naught|nought)\b",
    re.I,
)


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def circles(graph):
    """Strongly connected modules, more than one (Tarjan's algorithm)."""
    order, lowest, stack, found = {}, {}, [], []

    def visit(module):
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for other in sorted(graph.find_modules_directly_imported_by(module)):
            if other not in order:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], order[other])
        if lowest[module] == order[module]:
            members = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(members) > 1:
                found.append(members)

    for module in sorted(graph.modules):
        if module not in order:
            visit(module)
    return found


def test_no_modules_import_each_other_in_a_circle():
    graph = grimp.build_graph("nemo_minitron", exclude_type_checking_imports=False, cache_dir=None)
    assert circles(graph) == []


def test_a_circle_would_be_found():
    graph = grimp.ImportGraph()
    for importer, imported in (("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")):
        graph.add_import(importer=importer, imported=imported)
    assert [sorted(circle) for circle in circles(graph)] == [["b", "c"]]


def test_modules_are_small():
    lines = {name: source.count("\n") for name, source in SOURCES.items() if source}
    assert {name: count for name, count in lines.items() if count > 400} == {}
    assert median(lines.values()) <= 150


def test_functions_are_small():
    long = {
        f"{name}: {node.name}": node.end_lineno - node.lineno + 1
        for name, tree in TREES.items()
        for node in functions(tree)
        if node.end_lineno - node.lineno >= 60
    }
    assert long == {}


def test_the_core_takes_and_gives_typed_values():
    untyped = [
        f"{name}: {node.name}"
        for name, tree in TREES.items()
        if name.startswith(TYPED)
        for node in functions(tree)
        if "dict[str, Any]" in ast.unparse(node.args) + ast.unparse(node.returns or ast.Constant(""))
    ]
    assert untyped == []


def strings(tree):
    """Docstrings, of attributes too, with their lines."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


def test_docstrings_begin_with_what_they_are_about():
    odd = [
        f"{name}:{line}: {text.strip()[:60]}"
        for name, tree in TREES.items()
        for line, text in strings(tree)
        if OPENINGS.match(text.strip())
    ]
    assert odd == []


@pytest.mark.parametrize("place", ["nemo_minitron", "docs", "tutorials", "README.md", "CONTRIBUTING.md"])
def test_words_are_those_of_today(place):
    root = PACKAGE.parent / place
    files = [root] if root.is_file() else [file for kind in ("py", "md", "yaml") for file in root.rglob(f"*.{kind}")]
    assert files
    assert [f"{file.name}: {found[0]}" for file in files if (found := ARCHAIC.search(file.read_text()))] == []


def test_readme_is_read_in_a_minute_or_little_more():
    assert len((PACKAGE.parent / "README.md").read_text().split()) <= 900


def test_where_things_are_is_true():
    """Each answer of CONTRIBUTING's table names a file and what it defines."""
    table = (PACKAGE.parent / "CONTRIBUTING.md").read_text().partition("## Where is")[2].partition("\n## ")[0]
    answers = [row.split("|")[2] for row in table.splitlines() if row.startswith("| ")][1:]
    assert len(answers) >= 5
    for answer in answers:
        file = ""
        for word in re.findall(r"`([^`]+)`", answer):
            if "/" in word or word.endswith(".py"):
                file = word
                assert (PACKAGE / file).exists(), answer
            else:
                owner, _, attribute = word.partition(".")
                assert re.search(rf"^(def|class) {owner}\b", SOURCES[file], re.M), answer
                assert re.search(rf"^    {attribute}: ", SOURCES[file], re.M) or not attribute, answer
