"""``minitron run``: walk a recipe's stages, skip what is done and unchanged, and compare the models at the end.

A stage is one of our commands with its configuration, run in a process of its own so that its memory is returned.
It is up to date when the fingerprint of all that decides its result equals the recorded one: its resolved
configuration, the content of its inputs, the version of this package; and its outputs are still those it wrote.
Contents are compared, never dates (dates only spare hashing a file again that was not touched).
"""

from __future__ import annotations

import contextlib
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from omegaconf import OmegaConf

from nemo_minitron.config.schema import RunConfig
from nemo_minitron.files.staging import write_file
from nemo_minitron.jobs import lifeline
from nemo_minitron.jobs.run_place import VARIABLE, RunPlace, forget
from nemo_minitron.jobs.terminal import clear_line
from nemo_minitron.recipe.comparison import report
from nemo_minitron.recipe.estimate import run_place
from nemo_minitron.recipe.order import readers
from nemo_minitron.recipe.records import Records, outdated
from nemo_minitron.recipe.stage import Compose, Stage, chosen, load_stages
from nemo_minitron.recipe.turn import begin, finish
from nemo_minitron.report.measures import duration


def run(cfg: RunConfig, compose: Compose) -> None:
    """Run the recipe of a composed ``run`` config: ``recipe``, ``run_dir``, ``stages``, ``force``.

    Every stage's configuration is checked before the first one starts. Writes, in ``run_dir``,
    ``recipe.yaml`` (the recipe with its settings, usable as ``recipe=``), ``.stages/NAME.yaml`` (the configuration that
    ran, usable by hand), ``.stages/NAME.json`` (its record) and ``metrics.json``.

    Raises:
        MinitronError: a stage's configuration is wrong, an input is absent, a stage failed or did not write what
            it declares. Names the stage; the next call resumes there.
    """
    stages = load_stages(cfg, compose)
    walked = chosen(cfg, stages)
    records = open_records(cfg)
    print(f"recipe {cfg.recipe['name']}: {len(walked)} stages in {Path(cfg.run_dir)}", flush=True)
    started = time.monotonic()
    reads, ran = readers(walked), set[str]()
    if cfg.stages is not None:
        _say_what_is_outdated(walked, stages, records)
    try:
        for number, stage in enumerate(walked):
            run_place(number, walked, reads, records, ran, cfg.force).hand_over()
            if run_stage(stage, records, f"[{number + 1}/{len(walked)}] {stage.name}", force=cfg.force):
                ran.add(stage.name)
    finally:
        forget()
    conclude(cfg, stages)
    print(f"recipe {cfg.recipe['name']}: done in {duration(time.monotonic() - started)}", flush=True)


def open_records(cfg: RunConfig) -> Records:
    """The records of a run, and ``recipe.yaml`` beside them as it is now."""
    run_dir = Path(cfg.run_dir)
    records = Records(run_dir / ".stages")
    write_file(run_dir / "recipe.yaml", OmegaConf.to_yaml(OmegaConf.create(cfg.recipe)))
    return records


def conclude(cfg: RunConfig, stages: Mapping[str, Stage]) -> None:
    """Compare the models that there are by now, and say where the report is.

    An evaluation of what the recipe as it is now would make anew is left out, and that is said.
    """
    roles = dict(cfg.recipe.get("roles") or {})
    every = list(stages.values())
    old = outdated(every, readers(every), Records(Path(cfg.run_dir) / ".stages"))
    for role, path in list(roles.items()):
        writer = next((stage.name for stage in every if path in stage.outputs), None)
        if writer in old and os.path.isfile(path):
            del roles[role]
            print(f"{role}: left out, as {path} is of stage '{old[writer]}' as it was before; it is to run again")
    if not any(map(os.path.isfile, roles.values())):
        Path(cfg.run_dir, "metrics.json").unlink(missing_ok=True)  # of what is left out
    report(roles, stages, Path(cfg.run_dir))
    for stage in stages.values():
        if stage.command == "report" and stage.outputs and os.path.isfile(stage.outputs[0]):
            print(f"report: {Path(stage.outputs[0]).absolute().as_uri()}", flush=True)


def _say_what_is_outdated(walked: list[Stage], stages: Mapping[str, Stage], records: Records) -> None:
    """Say of stages that are not walked, and whose outputs some that are will read, which would run again."""
    every = list(stages.values())
    reads = readers(every)
    old, here = outdated(every, reads, records), {stage.name for stage in walked}
    for stage in walked:
        for name in (name for name in reads[stage.name] if name in old and name not in here):
            print(
                f"{stage.name}: reads what stage '{name}' wrote, and stage '{old[name]}' was another then: it would "
                "run again, and is not among stages",
                flush=True,
            )


def run_stage(stage: Stage, records: Records, title: str, *, force: bool = False, quiet: bool = False) -> bool:
    """Run one stage, or skip it where it is done and unchanged; return whether it ran.

    Args:
        title: begins every line that is printed.
        quiet: print nothing, and send what the stage says to ``NAME.log`` beside its record.

    Raises:
        MinitronError: as :func:`run`.
    """
    log = records.folder / f"{stage.name}.log" if quiet else None
    say = (lambda text: None) if quiet else (lambda text: print(f"{title}: {text}", flush=True))
    turn = begin(stage, records, say, force=force)
    if turn is None:
        return False
    started = time.monotonic()
    flags = ["--config-path", str(records.folder), "--config-name", f"{stage.name}.yaml"]
    code = _launch([stage.command, *flags], log) if log else _launch([stage.command, *flags])
    if code and not quiet:
        clear_line()
    finish(turn, records, say, code, time.monotonic() - started, log)
    return True


def _launch(argv: list[str], log: Path | None = None) -> int:
    """Run ``python -m nemo_minitron ARGV`` to its end, its output streamed or sent to ``log``; return its exit status.

    A stage's process is forked from a server that has imported NeMo once, which takes some nine seconds; with an
    NVIDIA device, whose driver does not survive a fork, it starts from nothing. Whatever interrupts this process ends
    the stage by SIGTERM, and waits until it has left its destination in order. The stage is told its place in the run,
    unless its output is sent elsewhere.
    """
    place = None if log else RunPlace.here()
    stage: subprocess.Popen[bytes] | BaseProcess
    if Path("/dev/nvidiactl").exists():
        with lifeline.starting(), log.open("wb") if log else contextlib.nullcontext() as out:
            environment = {name: value for name, value in os.environ.items() if not log or name != VARIABLE}
            command = [sys.executable, "-m", "nemo_minitron", *argv]
            stage = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        wait: Callable[[], object] = stage.wait
    else:
        context = lifeline.fork_server(["nemo_minitron.nemo.training", "nemo_minitron.nemo.distillation"])
        stage = context.Process(target=_as_main, args=(argv, log, place))
        stage.start()
        wait = stage.join
    try:
        wait()
    except BaseException:
        stage.terminate()
        wait()
        raise
    code = stage.returncode if isinstance(stage, subprocess.Popen) else stage.exitcode
    return code or 0


def _as_main(argv: list[str], log: Path | None = None, place: RunPlace | None = None) -> None:
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    if place is None:
        forget()
    else:
        place.hand_over()  # the server that this was forked from has the environment of an earlier stage
    sys.argv = ["minitron", *argv]
    runpy.run_module("nemo_minitron", run_name="__main__")
