"""Coverage-guided fuzzing of the readers, with atheris (not a dependency: pip install atheris):

    python -m tests.fuzz.fuzz CORPUS tests/fuzz/seeds -max_total_time=600 -rss_limit_mb=1024 -max_len=40000 -timeout=20
    KIND=8 python -m tests.fuzz.fuzz CORPUS …      # one reader only: plans

Inputs that reach new code gather in CORPUS; an input that crashes (anything but a MinitronError) or that takes more
memory or time is written to ./crash-…, ./oom-… or ./timeout-…. Fix the defect and put the input into
``tests/fuzz/seeds``, where ``test_seeds.py`` reads it ever after.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

OURS = ["arrays", "checkpoint", "data.blocks", "data.index", "distill.cache"]
OURS += ["plan", "scores", "shape", "stored_zip", "text"]

with atheris.instrument_imports(include=[*(f"nemo_minitron.{name}" for name in OURS), "pickle"]):
    from tests.fuzz.readers import Readers


def main() -> None:
    warnings.simplefilter("ignore")
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        readers = Readers(Path(folder))
        kind = os.environ.get("KIND")
        first = bytes([int(kind)]) if kind else b""
        atheris.Setup(sys.argv, lambda data: readers.read(first + data) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
