"""``minitron report``: one HTML page and one Markdown page on a run folder."""

from __future__ import annotations

import os
from pathlib import Path

from nemo_minitron.config.schema import ReportConfig
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.jobs.processes import place


def run(cfg: ReportConfig) -> None:
    """Read ``run_dir`` and write ``output_path`` (``run_dir/report.html`` when null) and the ``.md`` beside it.

    Raises:
        MinitronError: a folder that is no run; a destination that cannot be written, does not end in ``.html``, or lies
            behind a link in the run folder.
    """
    from nemo_minitron.files.plain import plain
    from nemo_minitron.report.page import render, write
    from nemo_minitron.report.run_folder import read_run

    where = place()
    if where is not None and where.rank > 0:
        return
    folder = Path(required(cfg, "run_dir"))
    path = Path(cfg.output_path or folder / "report.html")
    if path.suffix != ".html":
        raise MinitronError(f"output_path: expected a file that ends in .html, found '{path}'")
    _check_way(folder, path)
    found = read_run(folder)
    other = write(*render(found), path)
    lines = [f"not in the report: {line}" for line in found.absent]
    lines.append(f"report: {path} ({path.stat().st_size / 2**20:.1f} MiB), {other}")
    print("\n".join(plain(line) for line in lines))


def _check_way(folder: Path, path: Path) -> None:
    """The folder was made by another: its links could lead the pages anywhere."""
    root, where = (Path(os.path.abspath(one)) for one in (folder, path.parent))
    while root in where.parents:
        if where.is_symlink():
            raise MinitronError(f"output_path: expected no links within run_dir, found '{where}'")
        where = where.parent
