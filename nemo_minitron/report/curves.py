"""What a training logged, against the tokens it had seen.

TensorBoard's event files are read first: a resumed training adds to them, while Lightning's ``metrics.csv`` begins
anew. Of one training's log at most 64 MiB (16 of ``metrics.csv``) in 256 files are read.
"""

from __future__ import annotations

import csv
import io
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import one_line
from nemo_minitron.report.inventory import Inventory
from nemo_minitron.report.measures import LARGEST

LOGGED = (
    "train_kd_loss",
    "train_lm_loss",
    "val_kd_loss",
    "val_lm_loss",
    "val_top1_agreement",
    "tokens",
)
_EVENTS, _CSV = "events.out.tfevents.", "metrics.csv"
_MOST_EVENTS, _MOST_CSV, _LONGEST_EVENT, _MOST_FILES = 64 << 20, 16 << 20, 1 << 20, 256
_LONGEST_FIELD = 1 << 16
_LAST_STEP = 1 << 53  # a larger one is none in float64


@dataclass(frozen=True)
class Curve:
    """One logged value: ``at`` tokens (or optimizer steps) ``[n]``, ascending, and ``values`` ``[n]``; float64."""

    at: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Training:
    """One training's log.

    Attributes:
        name: of its folder. curves: by the name that was logged; never empty, and no curve is.
        by_tokens: whether ``Curve.at`` counts tokens; otherwise optimizer steps, where tokens were not logged.
        tokens: seen in all; None where not logged. steps: optimizer steps taken.
    """

    name: str
    curves: dict[str, Curve] = field(default_factory=dict)
    by_tokens: bool = True
    tokens: int | None = None
    steps: int = 0

    @property
    def is_distillation(self) -> bool:
        return "train_kd_loss" in self.curves or "val_kd_loss" in self.curves


def read_training(folder: Path) -> Training | None:
    """The log below ``folder``, None where there is none; links are not followed.

    Raises:
        MinitronError: a log that is too long, or a ``metrics.csv`` that is not one, where there are no event files.
    """
    files = Inventory(folder)
    return read_log(folder.name, files, [path for path in files.files if is_log(path)])


def is_log(path: Path) -> bool:
    """Whether a file has the name of a log."""
    return path.name == _CSV or path.name.startswith(_EVENTS)


def read_log(name: str, files: Inventory, paths: list[Path]) -> Training | None:
    """Read a training as :func:`read_training` does, from these logs among ``files``."""
    events = sorted((path for path in paths if path.name != _CSV), key=lambda path: path.name)
    logged = _from_events(_contents(files, events, _MOST_EVENTS))
    if not logged:
        logged = _from_csv(_contents(files, [path for path in paths if path.name == _CSV], _MOST_CSV))
    logged = {name: values for name, values in logged.items() if values}
    if not logged.keys() - {"tokens"}:
        return None
    steps, tokens = (np.array(list(part), dtype=np.float64) for part in _sorted(logged.pop("tokens", {})))
    curves = {}
    for tag, values in logged.items():
        at, found = (np.array(list(part), dtype=np.float64) for part in _sorted(values))
        curves[tag] = Curve(np.interp(at, steps, tokens) if len(steps) else at + 1, found)
    last = max(max(values) for values in logged.values())
    return Training(
        name, curves, bool(len(steps)), int(tokens[-1]) if len(tokens) else None, int(max([last, *steps])) + 1
    )


def thinned(curve: Curve, most: int = 300) -> Curve:
    """Thin a curve to at most ``most`` points, each the mean of its neighbourhood."""
    count = len(curve.at)
    if count <= most:
        return curve
    edges = np.linspace(0, count, most + 1).astype(int)[:-1]
    sizes = np.diff(np.append(edges, count))
    return Curve(np.add.reduceat(curve.at, edges) / sizes, np.add.reduceat(curve.values, edges) / sizes)


def _contents(files: Inventory, paths: list[Path], most: int) -> Iterator[tuple[Path, bytes]]:
    """One file after the other, of ``most`` bytes together."""
    if len(paths) > _MOST_FILES:
        raise MinitronError(f"'{paths[0].parent}': expected at most {_MOST_FILES} files of a log, found {len(paths)}")
    for path in paths:
        data = files.read(path, most)
        most -= len(data)
        yield path, data


def _from_events(files: Iterable[tuple[Path, bytes]]) -> dict[str, dict[int, float]]:
    """{name: {step: value}}; files in the order in which they were begun."""
    logged: dict[str, dict[int, float]] = {}
    for _, data in files:
        found: dict[str, list[tuple[int, float]]] = {}
        for name, step, value in _scalars(data):
            if name in LOGGED and _is_possible(step, value):
                found.setdefault(name, []).append((step, value))
        for name, points in found.items():
            before = logged.setdefault(name, {})
            for step in [step for step in before if step >= points[0][0]]:
                del before[step]  # a resumed training took these steps again
            before.update(points)
    return logged


def _scalars(data: bytes) -> Iterator[tuple[str, int, float]]:
    """(name, step, value) of what an event file holds, up to where it is cut short or damaged.

    TensorBoard's own reader is not used: it allocates what a record says of its length. A record is its length (8
    bytes), a checksum of that (4), an event and a checksum of it (4).
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    start = 0
    while start + 16 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        if length > len(data) - start - 16:
            return
        if length <= _LONGEST_EVENT:  # longer ones hold pictures and graphs
            try:
                event = Event.FromString(data[start + 12 : start + 12 + length])
            except DecodeError:
                return
            for value in event.summary.value[:1000]:
                if value.HasField("simple_value"):
                    yield value.tag, event.step, value.simple_value
        start += 16 + length


def _from_csv(files: Iterable[tuple[Path, bytes]]) -> dict[str, dict[int, float]]:
    logged: dict[str, dict[int, float]] = {}
    csv.field_size_limit(_LONGEST_FIELD)  # of the process: what reads texts wants more
    for file, data in files:
        try:
            rows = csv.reader(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline=""))
            head = next(rows, [])
            columns = [(name, head.index(name)) for name in LOGGED if name in head]
            at = head.index("step") if "step" in head else len(head)
            for row in rows:
                for name, column in columns:
                    if len(row) > max(at, column) and row[at] and row[column]:
                        step, value = int(row[at]), float(row[column])
                        if _is_possible(step, value):
                            logged.setdefault(name, {})[step] = value
        except (ValueError, csv.Error) as error:
            raise MinitronError(f"{file}: expected a training's metrics.csv, found: {one_line(error)}") from None
    return logged


def _is_possible(step: int, value: float) -> bool:
    return 0 <= step < _LAST_STEP and abs(value) < LARGEST  # False for NaN, too


def _sorted(values: dict[int, float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if not values:
        return (), ()
    steps, found = zip(*sorted(values.items()), strict=True)
    return steps, found
