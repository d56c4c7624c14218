"""A measurement in steps: what one found is on disk before the next begins, and one that fails ends no other."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # provenance.py, for all benchmarks

from provenance import provenance


class Record:
    """The JSON of one script: where it comes from, and what each step found.

    Attributes:
        table: what is written; a script may add to it.
    """

    def __init__(self, path: Path | None, seconds: float = float("inf")) -> None:
        """Begin.

        Args:
            path: file to write; None: none.
            seconds: no step begins later than this.
        """
        self._path, self._seconds, self._started = path, seconds, time.monotonic()
        self.table: dict[str, Any] = {"torch": sys.modules["torch"].__version__, **provenance(), "steps": {}}
        self.write()

    def left(self) -> float:
        """Seconds until no further step begins."""
        return self._started + self._seconds - time.monotonic()

    def step(self, name: str, action: Callable[[], Any], needs: float = 0.0) -> Any:
        """What ``action`` returns, which JSON must hold unless it is None, and is kept as ``steps.NAME``.

        None, with the reason in the table, where it raised, or where fewer than ``needs`` seconds are left.
        """
        if self.left() < needs:
            self.table["steps"][name] = {"skipped": f"{self.left():.0f} s left, {needs:.0f} wanted"}
            print(f"{name}: skipped, {self.left():.0f} s left", flush=True)
            self.write()
            return None
        start = time.monotonic()
        try:
            found = action()
        except Exception as error:
            found, kept = None, {"error": f"{type(error).__name__}: {error}"[:500]}
            print(f"{name}: {traceback.format_exc()}", flush=True)
        else:
            kept = found if isinstance(found, dict) else {"found": found}
        self.table["steps"][name] = kept | {"wall_s": round(time.monotonic() - start, 2)}
        print(f"{name}: {json.dumps(self.table['steps'][name], ensure_ascii=False)}", flush=True)
        self.write()
        return found

    def write(self) -> None:
        """Put the table on disk as it is now."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_name(self._path.name + ".part")
        beside.write_text(json.dumps(self.table, indent=2, ensure_ascii=False) + "\n")
        os.replace(beside, self._path)
