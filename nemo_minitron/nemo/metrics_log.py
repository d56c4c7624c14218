"""``metrics.csv`` of a training that may be resumed: one row a step, whatever ended the run in between."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from nemo_minitron.files.staging import write_file


class MetricsLog(CSVLogger):
    """Lightning's CSV logger, which goes on with the table of an earlier run.

    Lightning's own deletes it. Rows are on disk before a checkpoint counts as finished, so that none is missing where
    a run resumes from it.

    Args:
        folder: of the experiment; the table is ``csv/metrics.csv`` in it.
        resumed_at: the step that the run resumes at, whose rows and later ones are taken again; None begins anew.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        super().__init__(str(folder), name="", version="csv")
        self._resumed_at = resumed_at

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _Table(self.log_dir, self._resumed_at)
        return self._experiment

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Called when a checkpoint is written, before its mark of being unfinished is removed."""
        self.save()


class _Table(ExperimentWriter):
    def __init__(self, log_dir: str, resumed_at: int | None) -> None:
        self._resumed_at = resumed_at
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """Called by the parent before anything is written."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        if self._resumed_at is None:
            path.unlink()
            return
        names, rows = _read(path)
        kept = [row for row in rows if row["step"].isdecimal() and int(row["step"]) < self._resumed_at]
        self.metrics_keys = names
        _write(path, names, kept)

    def save(self) -> None:
        """Add the rows that were logged since; a new column rewrites the table, beside its place."""
        path = Path(self.metrics_file_path)
        if not self.metrics:
            return
        new = self._record_new_keys()
        if new or not path.is_file():
            _write(path, self.metrics_keys, [*(_read(path)[1] if path.is_file() else []), *self.metrics])
        else:
            with path.open("a", newline="", encoding="utf-8") as file:
                file.write(_text(self.metrics_keys, self.metrics, header=False))
        self.metrics = []


def _read(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Column names and rows; a line that was cut short has no ``step``, which sorts behind most other names."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, restval="")
        rows = list(reader)
        return list(reader.fieldnames or []), rows


def _write(path: Path, names: list[str], rows: list[dict[str, Any]]) -> None:
    write_file(path, _text(names, rows))


def _text(names: list[str], rows: list[dict[str, Any]], header: bool = True) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=names)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
