"""What the notebooks share: a run folder, ``minitron`` as a call, and what an earlier notebook would have made.

    workspace = Workspace("tiny")
    workspace.needs("01_model_and_data")          # runs that notebook's source if its files are not there
    workspace.minitron("evaluate key=value ...")    # the command line `minitron evaluate …` in workspace.folder

Commands run in processes of their own, as in a terminal. They are forked from one that has imported NeMo, which would
otherwise take ten seconds or more of each. What a command wrote is found again by later notebooks: it runs anew only
where its words, or those of the commands that made its inputs, have changed. Delete the folder to begin again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).parent
MODELS = ("tiny", "smollm2")
LAST_FILE = {
    "01_model_and_data": "data/validation_text_document.idx",
    "02_teacher_finetuning": "evaluation/teacher.json",
    "03a_depth_pruning": "depth/evaluation/pruned.json",
    "03b_width_pruning": "width/evaluation/pruned.json",
    "04a_distilling_depth": "depth/evaluation/distilled.json",
    "04b_distilling_width": "width/evaluation/distilled.json",
}
"""Notebook → the last file that it makes and a later one reads."""

WRITES = {
    "output_path": "{}",
    "output_prefix": "{}_text_document",
    "model.nemo_path": "{}",
    "export.save_path": "{}",
}
"""Key → what a command with this key writes."""

ALONE = ("run", "search")
"""Commands that start processes themselves."""
WITH_NEMO = ("finetune", "importance", "distill", "evaluate")


class Printed(str):
    """What a command printed: text, which a notebook whose cell ends in the command does not show a second time."""

    def _ipython_display_(self) -> None:
        """Nothing is left to show."""


class Workspace:
    """One model's run folder: ``$MINITRON_TUTORIALS/MODEL``, or a folder of temporary files named after the model."""

    def __init__(self, model: str) -> None:
        if model not in MODELS:
            raise ValueError(f"MODEL: expected one of {', '.join(MODELS)}, found {model!r}")
        self.model = model
        given = os.environ.get("MINITRON_TUTORIALS")
        self.folder = Path(given) / model if given else Path(tempfile.gettempdir()) / f"minitron-tutorials-{model}"
        self.folder = self.folder.absolute()
        (self.folder / ".log").mkdir(parents=True, exist_ok=True)
        if model == "tiny":  # its matrices are too small to share
            os.environ.setdefault("OMP_NUM_THREADS", "1")

    def minitron(self, command: str) -> Printed:
        """Run ``minitron COMMAND`` in the folder, show the command and what it printed; return what it printed.

        Raises:
            RuntimeError: the command failed; with its last words.
        """
        words = shlex.split(command)
        output = _output(words)
        known = self._known()
        digest = _digest(words, output, known)
        print(_shown(words))
        found = known.get(output or "")
        logs = dict(word.split("=", 1) for word in words[1:]).get("exp_manager.exp_dir", "")
        if found and found["digest"] == digest and self._is_there(output) and (self.folder / logs).is_dir():
            print(f"{found['printed']}(made before: {output})")
            return Printed(found["printed"])
        if _audience is not None:
            print(f"  minitron {words[0]} {output or ''}", file=_audience, flush=True)
        if logs and output:
            shutil.rmtree(self.folder / logs, ignore_errors=True)  # of a training with other settings
        printed = self._run(words)
        print(printed, end="")
        if output:
            known = self._known() | {output: {"digest": digest, "printed": printed}}
            part = self.folder / ".commands.json.part"
            part.write_text(json.dumps(known, indent=1))
            part.replace(self.folder / ".commands.json")
        return Printed(printed)

    def needs(self, *notebooks: str) -> None:
        """Make what these notebooks would have made, by running their sources, unless it is there."""
        global _audience
        for name in notebooks:
            if (self.folder / LAST_FILE[name]).exists():
                continue
            outermost, _audience = _audience, _audience or sys.stdout
            print(f"running {name} first", file=_audience, flush=True)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    code = compile(source(name, self.model), str(HERE / f"{name}.py"), "exec")
                    exec(code, {"__name__": "__main__"})
            finally:
                _audience = outermost
            import matplotlib.pyplot as plt

            plt.close("all")  # what it has drawn belongs to it

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder."""
        return json.loads((self.folder / name).read_text())

    def _known(self) -> dict[str, dict[str, str]]:
        path = self.folder / ".commands.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _is_there(self, output: str | None) -> bool:
        return output is not None and any((self.folder / f"{output}{end}").exists() for end in ("", ".idx"))

    def _run(self, words: list[str]) -> str:
        logs = [self.folder / ".log" / f"{words[0]}.{end}" for end in ("out", "err")]
        for log in logs:
            log.write_bytes(b"")
        alone = words[0] in ALONE or Path("/dev/nvidiactl").exists()  # a GPU's driver does not survive a fork
        poll, stop = (_start if alone else _fork)(words, self.folder, logs)
        shown, started = "", time.monotonic()
        try:
            while (code := poll()) is None:
                time.sleep(0.1)
                line = _last_line(max(logs, key=lambda log: log.stat().st_mtime_ns))
                if line != shown and time.monotonic() - started > 2:
                    started, shown = time.monotonic(), line
                    print(f"\r{line:<110}", end="", flush=True, file=_audience)
        except BaseException:
            stop()
            raise
        finally:
            if shown:
                print(f"\r{'':<110}\r", end="", flush=True, file=_audience)
        if code:
            last = "\n".join(_lines(logs[1])[-15:] or _lines(logs[0])[-15:])
            raise RuntimeError(f"minitron {words[0]} ended with status {code}; {logs[1]} ends with:\n{last}")
        return "".join(f"{line}\n" for line in _lines(logs[0]))


def source(name: str, model: str) -> str:
    """A notebook's ``py:percent`` source with the switch ``MODEL`` set."""
    text = (HERE / f"{name}.py").read_text()
    text, count = re.subn(r'^MODEL = "\w+"', f'MODEL = "{model}"', text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f'{name}.py: expected one line MODEL = "…", found {count}')
    return text


# ------------------------------------------------------------------------------------------------ what a command writes


def _output(words: list[str]) -> str | None:
    """What a command writes, relative to the folder; None where it is not to be remembered."""
    if words[0] in ("run", "report") or "plan_only=true" in words:  # they see for themselves what is new, or are quick
        return None
    for word in words[1:]:
        key, _, value = word.partition("=")
        if key in WRITES:
            return WRITES[key].format(value)
    return None


def _digest(words: list[str], output: str | None, known: dict[str, dict[str, str]]) -> str:
    """Of the words and of the commands that made what they name."""
    from nemo_minitron import __version__

    named = set(re.findall(r"[\w./-]+", " ".join(words))) - {output}
    inputs = {name: known[name]["digest"] for name in sorted(named & known.keys())}
    return hashlib.sha256(json.dumps([__version__, words, inputs]).encode()).hexdigest()


def _shown(words: list[str], width: int = 110) -> str:
    """The command as one would type it, folded."""
    lines = [f"$ minitron {words[0]}"]
    for word in words[1:]:
        key, equals, value = word.partition("=")
        word = key + equals + (shlex.quote(value) if value else "")
        if len(lines[-1]) + len(word) + 3 > width:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


def _lines(log: Path) -> list[str]:
    """A log without progress bars."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", log.read_text(errors="replace"))
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
    return [line for line in lines if line.strip() and not re.search(r"%\||(it|s)/(s|it)[],]|\[NeMo ", line)]


def _last_line(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 1000))
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", stream.read().decode(errors="replace"))
    return (re.split(r"[\r\n]+", text.strip()) or [""])[-1][:110]


# ------------------------------------------------------------------------------------------------------------ processes

_audience: TextIO | None = None
"""Where progress is told while a notebook's source runs for another one; that one's own output is not shown."""
_server: subprocess.Popen[str] | None = None

Running = tuple[Callable[[], int | None], Callable[[], None]]
"""``poll()``: the exit status, None while it runs; ``stop()``: end it."""


def _start(words: list[str], folder: Path, logs: list[Path]) -> Running:
    with logs[0].open("w") as out, logs[1].open("w") as err:
        argv = [sys.executable, "-m", "nemo_minitron", *words]
        process = subprocess.Popen(argv, cwd=folder, stdout=out, stderr=err, start_new_session=True)
    return process.poll, lambda: _stop(process)


def _fork(words: list[str], folder: Path, logs: list[Path]) -> Running:
    global _server
    if _server is None or _server.poll() is not None:
        with (folder / ".log" / "server.err").open("w") as err:
            _server = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,  # what importing NeMo warns of
                text=True,
                start_new_session=True,
            )
    server = _server
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps([words, str(folder), *map(str, logs)]) + "\n")
    server.stdin.flush()

    def poll() -> int | None:
        if not select.select([server.stdout], [], [], 0)[0]:
            return None
        answer = server.stdout.readline()  # type: ignore[union-attr]
        if not answer:
            raise RuntimeError(f"the process that starts commands ended; see {logs[1].with_name('server.err')}")
        return int(answer)

    return poll, lambda: _stop(server)


def _stop(process: subprocess.Popen[Any]) -> None:
    """End a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    process.wait()


def _serve() -> None:
    """Read ``[words, folder, stdout, stderr]`` per line, run each in a fork, answer with its exit status."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is imported may print
    import nemo_minitron.convert
    import nemo_minitron.prune.resolve

    for line in sys.stdin:
        words, folder, out, err = json.loads(line)
        if words[0] in WITH_NEMO:
            import nemo_minitron.nemo.distillation
            import nemo_minitron.nemo.training  # noqa: F401
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.chdir(folder)
                for number, log in ((1, out), (2, err)):
                    os.dup2(os.open(log, os.O_WRONLY | os.O_TRUNC), number)
                sys.argv = ["minitron", *words]
                runpy.run_module("nemo_minitron", run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
