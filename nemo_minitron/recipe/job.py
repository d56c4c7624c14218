"""The two ends of a stage whose processes srun starts: ``python -m nemo_minitron.recipe.job begin|end RUN.yaml STAGE``.

``begin`` decides as ``minitron run`` does whether the stage runs, and writes its configuration; ``end``, which takes
the exit status of the stage's command as well, records it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.config.schema import RunConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.recipe.stage import Compose, Stage, load_stages
from nemo_minitron.recipe.turn import Say, Turn, begin, finish
from nemo_minitron.recipe.walk import conclude, open_records

UP_TO_DATE = 10
"""Exit status of ``begin`` where there is nothing to run."""


def begin_stage(cfg: RunConfig, stage: Stage) -> int:
    """Begin ``stage``; return the exit status."""
    turn = begin(stage, open_records(cfg), _say(stage), force=cfg.force)
    return UP_TO_DATE if turn is None else 0


def end_stage(cfg: RunConfig, stages: dict[str, Stage], stage: Stage, code: int) -> int:
    """Record what became of ``stage``, whose command ended with ``code``; return the exit status.

    Raises:
        MinitronError: it failed, or did not write what it declares.
    """
    records = open_records(cfg)
    record = records.read(stage.name)
    turn = Turn(stage, record["fingerprint"], record["began"], record["resumed"])
    finish(turn, records, _say(stage), code, time.time() - turn.began)
    conclude(cfg, stages)
    return 0


def main(argv: Sequence[str], compose: Compose) -> int:
    """Run ``begin RUN.yaml STAGE`` or ``end RUN.yaml STAGE CODE``; return the exit status."""
    part, path, name, *rest = argv
    from nemo_minitron.config.check import instance
    from nemo_minitron.config.compose import Source

    try:
        found = Source(path=str(Path(path).parent), name=Path(path).name)
        cfg = instance(RunConfig, compose("run", source=found))
        stages = load_stages(cfg, compose)
        return begin_stage(cfg, stages[name]) if part == "begin" else end_stage(cfg, stages, stages[name], int(rest[0]))
    except MinitronError as error:
        print(f"minitron: {error}", file=sys.stderr)
        return 2


def _say(stage: Stage) -> Say:
    return lambda text: print(f"{stage.name}: {text}", flush=True)


if __name__ == "__main__":
    from nemo_minitron.config.compose import compose

    sys.exit(main(sys.argv[1:], compose))
