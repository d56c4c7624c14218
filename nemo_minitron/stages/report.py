"""``minitron report``: one HTML page and one Markdown page on a run folder."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from nemo_minitron.errors import MinitronError, required
from nemo_minitron.processes import place


def run(cfg: DictConfig) -> None:
    """Read ``run_dir`` and write ``output_path`` (``run_dir/report.html`` when null) and the ``.md`` beside it.

    Raises:
        MinitronError: a folder that is no run; a destination that cannot be written or does not end in ``.html``.
    """
    from nemo_minitron.report.page import render, write
    from nemo_minitron.report.run_folder import read_run

    where = place()
    if where is not None and where.rank > 0:
        return
    folder = Path(required(cfg, "run_dir"))
    path = Path(cfg.get("output_path") or folder / "report.html")
    if path.suffix != ".html":
        raise MinitronError(f"output_path: expected a file that ends in .html, found '{path}'")
    found = read_run(folder)
    other = write(*render(found), path)
    for line in found.absent:
        print(f"not in the report: {line}")
    print(f"report: {path} ({path.stat().st_size / 2**20:.1f} MiB), {other}")
