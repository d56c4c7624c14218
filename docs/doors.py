"""Write ``docs/doors.md``: which model goes through which door, by the tests that prove it.

    python docs/doors.py

Runs ``tests/doors``, slow tests too (some minutes), and makes a table of what passed. A cell is one test, or for a
refusal a test that it is refused. ``tests/doors/test_table.py`` fails where the page lacks a row, a column or a note.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "doors.md"
sys.path.insert(0, str(ROOT))

from nemo_minitron.config.schema import CONVERT_FORMATS  # noqa: E402
from tests.doors.models import CONFIGS  # noqa: E402
from tests.doors.refused import REFUSED, refusal  # noqa: E402
from tests.doors.sources import SOURCES  # noqa: E402

INTRODUCTION = """# Doors

Each cell is a test (`tests/doors`) on a random model with awkward numbers: 3 layers, hidden size 48, 6 heads in 2
groups of width 16, vocabulary 310, RoPE base 10⁶. The measure is transformers' logits of the folder that it saved.

- **in**: converted to `.nemo`, the logits are those to 1e-4, and shape and every tensor equal those of other origins.
- **pruned**: scored, cut to 2 layers, hidden size 32, 48 neurons, and solved anew; **distilled**: two steps. Once for
  each model, since its `.nemo` files are equal; transformers loads the exports with the student's own logits.
- **out to** a format: read back bit by bit, with the logits to 1e-4; HF and GGUF are loaded by transformers as well.

Origins are laid as their tools lay them: HF by transformers, GGUF by the `gguf` package, NeMo's and Megatron's folders
with the configs of NeMo 2.4, Megatron-Bridge 0.6 and Megatron-LM. Made by `python docs/doors.py`.
"""


def outcomes() -> dict[str, bool]:
    """Whether each test passed, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            str(ROOT / "tests" / "doors" / "test_doors.py"),
            f"--junitxml={report}",
        ]
        subprocess.run(command, cwd=ROOT, check=False)
        cases = ElementTree.parse(report).iter("testcase")
        return {case.get("name", ""): case.find("failure") is None and case.find("error") is None for case in cases}


def page(passed: dict[str, bool]) -> str:
    """The whole text.

    Raises:
        SystemExit: a test that failed, by name.
    """
    if failed := [name for name, good in passed.items() if not good]:
        raise SystemExit(f"failed: {', '.join(failed)}")
    notes: list[str] = []

    def cell(test: str, model: str, source: str, target: str | None = None) -> str:
        if test not in passed:
            raise SystemExit(f"not run: {test}")
        why = refusal(model, source, target)
        if why is None:
            return "yes"
        if why not in notes:
            notes.append(why)
        return f"no ({notes.index(why) + 1})"

    head = ["model", "from", "in", "pruned", "distilled", *(f"to {name}" for name in CONVERT_FORMATS)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for model in CONFIGS:
        for source in SOURCES:
            cells = [cell(f"test_comes_in[{model}|{source}]", model, source)]
            journey = ("test_is_pruned", "test_is_distilled")
            cells += [cell(f"{test}[{model}]", model, source) for test in journey]
            for target in CONVERT_FORMATS:
                cells.append(cell(f"test_goes_out[{model}|{source}|{target}]", model, source, target))
            lines.append(f"| {' | '.join([model, source, *cells])} |")
    text = [INTRODUCTION, *lines, ""]
    text += [f"{number}. Refused, and the message says: {why} …" for number, why in enumerate(notes, start=1)] + [
        ""
    ] * bool(notes)
    return "\n".join(text)


if __name__ == "__main__":
    PAGE.write_text(page(outcomes()), encoding="utf-8")
    print(f"wrote {PAGE}: {len(REFUSED)} refusals")
