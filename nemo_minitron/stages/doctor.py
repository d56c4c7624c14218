"""``minitron doctor``: a page on this machine."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.config.schema import DoctorConfig
from nemo_minitron.doctor.page import as_json, examine, problems, text
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import write_file
from nemo_minitron.jobs.processes import place


def run(cfg: DoctorConfig) -> None:
    """Print the page, write it to ``output_path`` too where that is given; once in a job, by its first process.

    Raises:
        MinitronError: what stops every command, after the page; a destination that cannot be written.
    """
    try:
        where = place()
    except (ValueError, KeyError):  # the page says so
        where = None
    if where is not None and where.rank > 0:
        return
    page = examine()
    print(text(page), end="", flush=True)
    if cfg.output_path:
        write_file(Path(cfg.output_path), as_json(page))
    if found := problems(page):
        stop = "1 problem stops" if len(found) == 1 else f"{len(found)} problems stop"
        raise MinitronError(f"doctor: {stop} every command: {'; '.join(found)}")
