"""Which stage of a run a process works on, handed to it in the environment by ``minitron run``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

VARIABLE = "MINITRON_STAGE"


@dataclass(frozen=True)
class RunPlace:
    """A stage among those of a run.

    Attributes:
        number: from 1, of ``count``.
        ends: when the stage is to end, in seconds since the epoch, by what an earlier run of the same took.
        after: seconds that the stages after it took when they ran with the same configuration; None where that is not
            known of all of them.
    """

    number: int
    count: int
    name: str
    command: str
    ends: float | None = None
    after: float | None = None

    @classmethod
    def here(cls) -> RunPlace | None:
        """Return this process's; None where no run started it."""
        try:
            return cls(**json.loads(os.environ[VARIABLE]))
        except (KeyError, ValueError, TypeError):
            return None

    def hand_over(self) -> None:
        """Have this process, and those that it starts, know it."""
        os.environ[VARIABLE] = json.dumps(asdict(self))

    def left(self, now: float, own: float | None) -> float | None:
        """Seconds until the run ends; None where earlier runs do not say.

        Args:
            now: since the epoch. own: what is left of the work at hand, which may be a part of the stage.
        """
        if self.ends is None or self.after is None:
            return None
        return max(self.ends - now, own or 0.0) + self.after


def forget() -> None:
    """Have this process be of no run, for work whose output goes elsewhere."""
    os.environ.pop(VARIABLE, None)
