"""The line of progress on stderr, one look for all long work.

In a terminal it is one line, written anew, which fits the width whatever that is. Elsewhere (a file, a pipe,
``TERM=dumb``) it is a whole line now and then: a second after the work began, then every half minute, and at its end;
what takes less than a second writes none.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from nemo_minitron.files.plain import plain
from nemo_minitron.jobs import line
from nemo_minitron.jobs.line import Pace, Part
from nemo_minitron.jobs.run_place import RunPlace
from nemo_minitron.jobs.terminal import moves

if TYPE_CHECKING:
    from rich.text import Text

START_SECONDS = 1.0
"""How long work takes before a log has a line of it."""

LOG_SECONDS = 30.0
"""Seconds between two lines of a log."""

REDRAW_SECONDS = 0.1
"""Seconds between two states of a terminal's line."""

_LEAST_BAR, _BAR = 10, 20

_hidden = False


@contextmanager
def hidden(hide: bool) -> Iterator[None]:
    """Show no progress within this context, if ``hide``: ``trainer.enable_progress_bar=false``."""
    global _hidden
    before, _hidden = _hidden, hide or _hidden
    try:
        yield
    finally:
        _hidden = before


class Progress:
    """Work of ``total`` units, of which ``done`` are done; a context, or :meth:`start` and :meth:`stop`.

    Args:
        work: what is done; ``unit``: of what, ``B`` for bytes, nothing for a share of 1.
        show: false on processes that are not the job's first one.

    Attributes:
        done, total: may be set; shown at the next :meth:`update`.
        now: what is being done instead of a unit, such as ``validating 3/8``.
        figures: further parts of the line, in their order.
    """

    def __init__(self, total: float, work: str, unit: str, *, done: float = 0, show: bool = True) -> None:
        self.total, self.done, self._unit = total, done, unit
        self.now = ""
        self.figures: list[Part] = []
        self._work = " ".join(plain(work).split())
        self._place = RunPlace.here()
        self._screen: _Screen | None = None
        self._show = show and not _hidden
        self._pace = Pace(time.monotonic(), done)
        self._ended = ""

    def start(self) -> None:
        """Show the line."""
        self._pace = Pace(time.monotonic(), self.done)
        if self._show:
            self._screen = _Terminal(self) if moves() else _Log(self)
            self._screen.start()

    def update(self, count: float = 1) -> None:
        """Say that ``count`` more units are done; 0 shows what else was set."""
        self.done += count
        self._pace.count(time.monotonic(), self.done)
        if self._screen is not None:
            self._screen.refresh()

    def stop(self, failed: bool = False) -> None:
        """Leave the line as it is in the end, and nothing that moves; once."""
        screen, self._screen = self._screen, None
        if screen is not None:
            spent = line.clock(time.monotonic() - self._pace.began)
            self._ended = f"stopped after {spent}" if failed else f"took {spent}"
            screen.stop()

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(failed=kind is not None and kind is not GeneratorExit)

    def share(self) -> float:
        """Done of all, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 1.0

    def parts(self) -> list[Part]:
        """All that the line could say now."""
        place, parts = self._place, []
        if place is None:
            parts.append(Part(self._work, line.NAME, "bold"))
        else:
            parts.append(Part(f"[{place.number}/{place.count}]", line.PLACE, "dim", after=" "))
            parts.append(Part(place.name, line.NAME, "bold"))
            if self._work != place.command:
                parts.append(Part(self._work, line.WORK))
        parts.append(Part(line.counted(self.done, self.total, self._unit), line.COUNT))
        if self.now and not self._ended:
            parts.append(Part(self.now, line.NOW))
        return [*parts, *self.figures, *self._times()]

    def _times(self) -> list[Part]:
        if self._ended:
            return [Part(self._ended, line.LEFT, "cyan")]
        left = self._pace.left(time.monotonic(), self.done, self.total)
        parts = [] if left is None else [Part(f"ETA {line.clock(left)}", line.LEFT, "cyan")]
        whole = None if self._place is None else self._place.left(time.time(), left)
        if whole is not None:
            parts.append(Part(f"recipe ETA {line.clock(whole)}", line.WHOLE, "cyan"))
        return parts


def progress_bar(total: float, work: str, unit: str, *, show: bool = True) -> Progress:
    """Progress of ``total`` units, a context; ``update`` counts. See :class:`Progress`."""
    return Progress(total, work, unit, show=show)


class _Screen(Protocol):
    def start(self) -> None: ...

    def refresh(self) -> None: ...

    def stop(self) -> None: ...


class _Log:
    """Whole lines. A thread writes the first one, so that a log says what hangs before its first unit."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self._written: float | None = None
        self._timer = threading.Timer(START_SECONDS, self._first)
        self._timer.daemon = True

    def start(self) -> None:
        if START_SECONDS > 0:
            self._timer.start()
        else:
            self._first()

    def refresh(self) -> None:
        with self._lock:
            if self._written is not None and time.monotonic() - self._written >= LOG_SECONDS:
                self._write()

    def stop(self) -> None:
        self._timer.cancel()
        with self._lock:
            if self._written is not None:
                self._write()
            self._written = time.monotonic()  # a timer that is running by now writes nothing

    def _first(self) -> None:
        with self._lock:
            if self._written is None:
                self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        sys.stderr.write(line.joined(self._progress.parts()) + "\n")
        sys.stderr.flush()


class _Terminal:
    """A line that rich writes anew at each refresh, below all that is printed. No thread: a training forks."""

    def __init__(self, progress: Progress) -> None:
        from rich.console import Console
        from rich.live import Live

        class Shown(Console):
            def show_cursor(self, show: bool = True) -> bool:
                """Leave the cursor alone: a process that is killed could not bring it back."""
                return False

        self._progress, self._drawn = progress, 0.0
        self._utf = (sys.stderr.encoding or "").lower().startswith("utf")
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._console = Shown(
            stderr=True, force_terminal=True, force_interactive=True, force_jupyter=False, soft_wrap=True,
            highlight=False, markup=False, emoji=False,
        )  # fmt: skip
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),  # else it goes where it was sent
            get_renderable=self._text,
            vertical_overflow="visible",
        )

    def start(self) -> None:
        before = {id(stream): name for name in ("stdout", "stderr") if (stream := getattr(sys, name)) is not None}
        self._live.start(refresh=True)
        for handler in _stream_handlers():
            if name := before.get(id(handler.stream)):
                self._handlers.append((handler, handler.setStream(getattr(sys, name))))

    def refresh(self) -> None:
        now = time.monotonic()
        if now - self._drawn >= REDRAW_SECONDS:
            self._drawn = now
            self._live.refresh()

    def stop(self) -> None:
        for handler, stream in self._handlers:
            if stream is not None:
                handler.setStream(stream)
        sys.stdout.flush()  # a line that was not ended would be lost
        sys.stderr.flush()
        self._live.stop()

    def _text(self) -> Text:
        """The line as it fits, one column short of the width, where some terminals begin a new line."""
        from rich.cells import cell_len
        from rich.text import Text

        width, plain_style = self._console.width - 1, self._console.no_color
        parts = line.fit(self._progress.parts(), width, cell_len)
        room = width - cell_len(line.joined(parts)) - 2
        text = Text(no_wrap=True, end="")
        for number, part in enumerate(parts):
            text.append(part.text, "" if plain_style else part.style)
            if part.importance == line.NAME and room >= _LEAST_BAR and not self._progress._ended:
                length = _BAR if room >= _BAR else _LEAST_BAR
                full = round(self._progress.share() * length)
                text.append("  ")
                text.append(("━" if self._utf else "=") * full, "" if plain_style else "cyan")
                text.append(("─" if self._utf else "-") * (length - full), "" if plain_style else "dim")
            text.append(part.after if number < len(parts) - 1 else "")
        return text


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    """Handlers of all loggers: they hold a stream of their own, whatever ``sys.stderr`` is by now."""
    known = logging.root.manager.loggerDict.values()
    loggers = [logging.root, *(logger for logger in known if isinstance(logger, logging.Logger))]
    for logger in loggers:
        yield from (handler for handler in logger.handlers if isinstance(handler, logging.StreamHandler))
