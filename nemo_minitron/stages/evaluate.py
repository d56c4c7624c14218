"""``minitron evaluate``: held-out loss, size, speed, energy and lm-eval's tasks of a ``.nemo`` or an HF folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from nemo_minitron.config.schema import EvaluateConfig


def run(cfg: EvaluateConfig) -> Mapping[str, object]:
    """Measure what ``evaluate`` asks for (:func:`nemo_minitron.evaluate.measure.measure`), print it, write it to
    ``output_path``, and return it."""
    from nemo_minitron import runtime
    from nemo_minitron.evaluate.measure import lines_of, measure

    metrics = measure(cfg)
    if runtime.rank() == 0:
        print("\n".join(lines_of(metrics)))
        if cfg.output_path:
            write_json(Path(cfg.output_path), metrics)
    return metrics


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON."""
    from nemo_minitron.files.staging import write_file

    write_file(path, json.dumps(content, indent=2) + "\n")
