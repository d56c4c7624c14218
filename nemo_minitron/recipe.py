"""``minitron run``: walk a recipe's stages, skip what is done and unchanged, and compare the models at the end.

A stage is one of our commands with its configuration, run in a process of its own so that its memory is returned.
It is up to date when the fingerprint of all that decides its result equals the recorded one: its resolved
configuration, the content of its inputs, the version of this package; and its outputs are still those it wrote.
Contents are compared, never dates (dates only spare hashing a file again that was not touched).
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import metadata
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_minitron import __version__
from nemo_minitron.config.schema import COMMANDS, RunConfig
from nemo_minitron.errors import MinitronError, did_you_mean
from nemo_minitron.files.staging import write_file
from nemo_minitron.files.text import read_json
from nemo_minitron.jobs import lifeline
from nemo_minitron.report.measures import ROLES, duration, gap_closed

Compose = Callable[..., DictConfig]
"""``compose(command, overrides, config=mapping)``: the checked, resolved config of a command."""

PACKAGES = (
    "torch",
    "nemo_toolkit",
    "megatron-core",
    "lightning",
    "transformers",
    "numpy",
    "hydra-core",
    "omegaconf",
    "transformer_engine",
    "apex",
)
"""What a stage's result may depend on; the last two are optional."""


@dataclass(frozen=True)
class Stage:
    """One step of a recipe, its configuration resolved.

    Attributes:
        inputs: files, folders or glob patterns whose content decides the result.
        outputs: files or folders that the stage writes.
        work: folder of its own for checkpoints; emptied before a start that is not a resumption.
    """

    name: str
    command: str
    config: DictConfig
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    work: Path | None


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
    chosen = list(cfg.stages) if cfg.stages is not None else list(stages)
    for name in chosen:
        if name not in stages:
            raise MinitronError(f"stages: the recipe has no stage '{name}'." + did_you_mean(name, stages))
    run_dir = Path(cfg.run_dir)
    records = Records(run_dir / ".stages")
    write_file(run_dir / "recipe.yaml", OmegaConf.to_yaml(OmegaConf.create(cfg.recipe)))
    print(f"recipe {cfg.recipe['name']}: {len(chosen)} stages in {run_dir}", flush=True)
    started = time.monotonic()
    for number, name in enumerate(chosen, start=1):
        run_stage(stages[name], records, f"[{number}/{len(chosen)}] {name}", force=cfg.force)
    report(cfg.recipe.get("roles") or {}, stages, run_dir)
    for stage in stages.values():
        if stage.command == "report" and stage.outputs and os.path.isfile(stage.outputs[0]):
            print(f"report: {Path(stage.outputs[0]).absolute().as_uri()}", flush=True)
    print(f"recipe {cfg.recipe['name']}: done in {duration(time.monotonic() - started)}", flush=True)


def load_stages(cfg: RunConfig, compose: Compose) -> dict[str, Stage]:
    """The recipe's stages in order, each configuration composed and checked."""
    recipe = cfg.recipe
    if not isinstance(recipe, Mapping) or not recipe.get("order"):
        raise MinitronError(f"recipe: expected recipe=NAME of a file that says its order of stages, found {recipe!r}")
    stages: dict[str, Stage] = {}
    known = recipe.get("stages") or {}
    for name in recipe["order"]:
        if name not in known:
            raise MinitronError(f"recipe.order: there is no stage '{name}'." + did_you_mean(name, known))
        node = known[name]
        if not node.get("command"):
            raise MinitronError(f"recipe.stages.{name}.command is missing")
        try:
            config = compose(node["command"], node.get("overrides") or (), config=_stage_config(node, cfg))
        except MinitronError as error:
            raise MinitronError(f"stage '{name}': {error}") from None
        if "cluster" in config:
            raise MinitronError(f"stage '{name}': a stage of a recipe runs here; its cluster section is not for it")
        work = Path(node["work"]) if node.get("work") else None
        if work is not None and not _is_inside(work, Path(cfg.run_dir)):
            raise MinitronError(f"recipe.stages.{name}.work: expected a folder inside {cfg.run_dir}, found {work}")
        inputs, outputs = (tuple(node.get(key) or ()) for key in ("inputs", "outputs"))
        inputs += tuple(config.get("extensions") or ())
        stages[name] = Stage(name, node["command"], config, inputs, outputs, work)
    for role, path in (recipe.get("roles") or {}).items():
        if role not in ROLES:
            raise MinitronError(f"recipe.roles: expected {', '.join(ROLES)}, found '{role}' ({path})")
    return stages


def _stage_config(node: Mapping[str, Any], cfg: RunConfig) -> dict[str, Any]:
    """A stage's own keys; the extensions of the run are those of every stage that takes some."""
    config = {**(node.get("config") or {})}
    if cfg.extensions and any(item.name == "extensions" for item in fields(COMMANDS[node["command"]])):
        config["extensions"] = [*cfg.extensions, *(config.get("extensions") or [])]
    return config


class Records:
    """What is known of the stages of one run folder: ``FOLDER/NAME.json``, and digests of files already read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MinitronError(f"run_dir {folder.parent} cannot be written: {error.strerror}") from None
        self._digests: dict[str, list] = _read_json(folder / "digests.json")

    def read(self, name: str) -> dict[str, Any]:
        """The record of a stage, empty when there is none."""
        return _read_json(self.folder / f"{name}.json")

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Replace the record of a stage."""
        write_file(self.folder / f"{name}.json", json.dumps(record, indent=2) + "\n")

    def fingerprint(self, stage: Stage, known: Mapping[str, str] | None = None) -> str:
        """sha256 over the command, its resolved config, its inputs' content and this package's version.

        Args:
            known: content of inputs that need not be there any more, by path.

        Raises:
            MinitronError: an input is absent.
        """
        inputs: dict[str, str] = {}
        for pattern in stage.inputs:
            if known and pattern in known:
                inputs[pattern] = known[pattern]
                continue
            paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
            if not paths or not all(os.path.exists(path) for path in paths):
                raise MinitronError(f"stage '{stage.name}': input {pattern} does not exist")
            inputs |= {path: self.content(path) for path in paths}
        what = [stage.command, OmegaConf.to_container(stage.config), inputs, __version__]
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()

    def outputs(self, stage: Stage) -> dict[str, str] | None:
        """Content of each declared output, or None when one is absent."""
        if not all(os.path.exists(path) for path in stage.outputs):
            return None
        return {path: self.content(path) for path in stage.outputs}

    def content(self, path: str) -> str:
        """sha256 of a file, or of the names and contents in a folder."""
        root = Path(path)
        if root.is_file():
            digest = self._file(root)
        else:
            files = sorted(file for file in root.rglob("*") if file.is_file())
            lines = (f"{file.relative_to(root)} {self._file(file)}\n" for file in files)
            digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        write_file(self.folder / "digests.json", json.dumps(self._digests))
        return digest

    def _file(self, file: Path) -> str:
        stat = file.stat()
        name = str(file.resolve())
        # the time of change, unlike that of modification, is nobody's to set
        known = [stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]
        if self._digests.get(name, [])[:-1] == known:
            return self._digests[name][-1]
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        self._digests[name] = [*known, digest.hexdigest()]
        return digest.hexdigest()


def settled(stages: Sequence[Stage], records: Records) -> bool:
    """Whether a chain, of which only the last output is wanted, need not run: all done, unchanged, that output there.

    What the earlier ones wrote may have been deleted since; its recorded content stands in for it.
    """
    known: dict[str, str] = {}
    record: dict[str, Any] = {}
    for stage in stages:
        record = records.read(stage.name)
        if record.get("state") != "done" or record.get("fingerprint") != records.fingerprint(stage, known):
            return False
        known |= record["outputs"]
    return records.outputs(stages[-1]) == record["outputs"]


def run_stage(stage: Stage, records: Records, title: str, *, force: bool = False, quiet: bool = False) -> None:
    """Run one stage, or skip it where it is done and unchanged.

    Args:
        title: begins every line that is printed.
        quiet: print nothing, and send what the stage says to ``NAME.log`` beside its record.

    Raises:
        MinitronError: as :func:`run`.
    """
    log = records.folder / f"{stage.name}.log" if quiet else None
    say = (lambda text: None) if quiet else (lambda text: print(f"{title}: {text}", flush=True))
    fingerprint = records.fingerprint(stage)
    record = records.read(stage.name)
    same = record.get("fingerprint") == fingerprint
    done = same and record.get("state") == "done"
    if done and not force and stage.outputs and records.outputs(stage) == record.get("outputs"):
        say(f"up to date, skipped (took {duration(record['seconds'])})")
        return
    resume = same and not done and not force
    if stage.work is not None and not resume and stage.work.exists():
        shutil.rmtree(stage.work)  # checkpoints of another configuration must not be resumed
    say(f"{'resuming' if resume and record else 'running'} minitron {stage.command}")
    records.write(stage.name, {"state": "started", "fingerprint": fingerprint})
    write_file(records.folder / f"{stage.name}.yaml", OmegaConf.to_yaml(stage.config))
    started = time.monotonic()
    flags = ["--config-path", str(records.folder), "--config-name", f"{stage.name}.yaml"]
    code = _launch([stage.command, *flags], log) if log else _launch([stage.command, *flags])
    seconds = time.monotonic() - started
    outputs = records.outputs(stage)
    if code:
        raise MinitronError(
            f"stage '{stage.name}' failed (minitron {stage.command}, exit status {code}, after {duration(seconds)}); "
            f"the same command starts again from this stage{_last_words(log)}"
        )
    if outputs is None:
        absent = [path for path in stage.outputs if not os.path.exists(path)]
        raise MinitronError(f"stage '{stage.name}' ended well but did not write {', '.join(absent)}")
    done_record = {"state": "done", "fingerprint": fingerprint, "seconds": round(seconds, 3), "outputs": outputs}
    records.write(stage.name, done_record | {"versions": versions()})
    say(f"done in {duration(seconds)}")


def _last_words(log: Path | None) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log and log.is_file() else []
    return f"; {log} ends with: {lines[-1]}" if lines else ""


def _launch(argv: list[str], log: Path | None = None) -> int:
    """Run ``python -m nemo_minitron ARGV`` to its end, its output streamed or sent to ``log``; return its exit status.

    A stage's process is forked from a server that has imported NeMo once, which takes some nine seconds; with an
    NVIDIA device, whose driver does not survive a fork, it starts from nothing. Whatever interrupts this process ends
    the stage by SIGTERM, and waits until it has left its destination in order.
    """
    stage: subprocess.Popen[bytes] | BaseProcess
    if Path("/dev/nvidiactl").exists():
        with lifeline.starting(), log.open("wb") if log else contextlib.nullcontext() as out:
            stage = subprocess.Popen([sys.executable, "-m", "nemo_minitron", *argv], stdout=out, stderr=out)
        wait: Callable[[], object] = stage.wait
    else:
        context = lifeline.fork_server(["nemo_minitron.nemo.training", "nemo_minitron.nemo.distillation"])
        stage = context.Process(target=_as_main, args=(argv, log))
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


def _as_main(argv: list[str], log: Path | None = None) -> None:
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    sys.argv = ["minitron", *argv]
    runpy.run_module("nemo_minitron", run_name="__main__")


def report(roles: Mapping[str, str], stages: Mapping[str, Stage], run_dir: Path) -> None:
    """Gather the roles' evaluations into ``run_dir/metrics.json`` and print them; roles not yet there are left out."""
    metrics = {role: _read_json(Path(roles[role])) for role in ROLES if role in roles and Path(roles[role]).is_file()}
    if not metrics:
        return
    write_file(run_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(f"\n{table(metrics)}")
    closed = gap_closed(metrics)
    if closed is not None:
        tokens = sum(_training_tokens(stage.config) for stage in stages.values() if stage.command == "distill")
        print(f"distillation on {tokens:,} tokens closed {closed:.1%} of the loss that pruning cost")
    print(f"written: {run_dir / 'metrics.json'}", flush=True)


def table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per model, as text."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "parameters": lambda m: f"{m['num_parameters'] / 1e6:,.1f}M",
        "layers": lambda m: str(m["num_layers"]),
        "hidden": lambda m: str(m["hidden_size"]),
        "ffn": lambda m: str(m["ffn_hidden_size"]),
        "heads/groups": lambda m: f"{m['num_attention_heads']}/{m['num_query_groups']}",
        "val_loss": lambda m: f"{m['val_loss']:.4f}",
        "perplexity": lambda m: f"{m['perplexity']:,.2f}",
        "peak memory": lambda m: f"{m['peak_memory_bytes'] / 2**30:.2f} GiB",
    }
    rows = [["", *columns]]
    for role, values in metrics.items():
        try:
            rows.append([role, *(show(values) for show in columns.values())])
        except KeyError as error:
            raise MinitronError(f"the evaluation of '{role}' lacks {error}") from None
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Version of this package, of Python, and of what stages compute with, as far as installed."""
    found = {"nemo_minitron": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _training_tokens(config: DictConfig) -> int:
    return int(config.trainer.max_steps) * int(config.model.global_batch_size) * int(config.model.data.seq_length)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except MinitronError:
        return {}  # a record cut short is no record


def _is_inside(path: Path, folder: Path) -> bool:
    path, folder = path.resolve(), folder.resolve()
    return path != folder and path.is_relative_to(folder)
