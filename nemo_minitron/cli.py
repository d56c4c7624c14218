"""``minitron COMMAND [KEY=VALUE …]``: help, configuration, relaunching on several processes, dispatch.

Help answers from the schema alone; Hydra, torch and NeMo are imported only once there is something to run.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_minitron import __version__
from nemo_minitron.errors import MinitronError, did_you_mean
from nemo_minitron.jobs import lifeline
from nemo_minitron.jobs.interruption import Interrupted, how_to_go_on, orderly_end
from nemo_minitron.jobs.processes import place
from nemo_minitron.jobs.terminal import clear_line

if TYPE_CHECKING:
    from omegaconf import DictConfig

_FLAGS = {
    "--config-path": "config_path",
    "-cp": "config_path",
    "--config-dir": "config_dir",
    "-cd": "config_dir",
    "--config-name": "config_name",
    "-cn": "config_name",
    "--cfg": "cfg",
    "-c": "cfg",
}


@dataclass
class Arguments:
    """A parsed command line. ``overrides`` are in Hydra's grammar."""

    command: str | None = None
    help: bool = False
    help_cluster: bool = False
    version: bool = False
    config_path: str | None = None
    config_dir: str | None = None
    config_name: str | None = None
    cfg: str | None = None
    overrides: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit status.

    Returns:
        0; 2 for a user's error (one message on stderr); 130 when interrupted; 1 when another rank of the job failed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--complete"]:  # the shell adds what it completes
        from nemo_minitron.config.completion import completions

        print("\n".join(completions(os.environ)))
        return 0
    try:
        with orderly_end():
            return _main(arguments)
    except MinitronError as error:
        from nemo_minitron.files.plain import plain
        from nemo_minitron.jobs import launch

        where, message = place(), plain(str(error)).replace("\n", " ")  # it may hold names of another's
        if not launch.hand_over(message):
            rank = f"[rank {where.rank}] " if where and where.rank else ""
            if rank:
                clear_line()  # of the first one
            print(f"minitron: {rank}{message}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        return _interrupted()


def _interrupted(advice: str = "") -> int:
    """Say so, once in a job, and return the exit status."""
    from nemo_minitron.jobs import launch

    where = place()
    if not launch.has_reporter() and not (where and where.rank):
        print(f"\nminitron: interrupted{advice}", file=sys.stderr)  # a progress bar may hold the line
    return 130


def console() -> int:
    """:func:`main` as a process of its own, which leaves torch.distributed's groups once its work is done.

    NCCL warns of groups that are still there when a process ends. Ranks take them down together, so after a failure
    they stay: the others may never come.
    """
    lifeline.hold()
    status = 1
    try:
        status = main()
    finally:
        if status:
            lifeline.end_children()  # Megatron-Core's saver would go on, and complain of what is gone
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to do that a traceback could tell of
    if status == 0 and (distributed := sys.modules.get("torch.distributed")) and distributed.is_initialized():
        distributed.destroy_process_group()
    return status


def parse(argv: Sequence[str]) -> Arguments:
    """Split flags from command and overrides; flags may stand anywhere, as ``--flag VALUE`` or ``--flag=VALUE``."""
    found = Arguments()
    rest = iter(argv[1:] if argv[:1] == ["help"] else argv)
    found.help = argv[:1] == ["help"]
    for word in rest:
        flag, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            found.help = True
        elif word == "--help-cluster":
            found.help = found.help_cluster = True
        elif word == "--version":
            found.version = True
        elif flag in _FLAGS:
            if not equals and (value := next(rest, "")) == "":
                raise MinitronError(f"{flag} needs a value")
            setattr(found, _FLAGS[flag], value)
        elif word.startswith("-"):
            raise MinitronError(f"unknown option '{flag}'.{_instead_of(flag, value or next(rest, ''), found.command)}")
        elif found.command is None:
            found.command = word
        else:
            found.overrides.append(word)
    if found.cfg not in (None, "job"):
        raise MinitronError(f"--cfg: expected job, found '{found.cfg}'")
    return found


def _instead_of(flag: str, value: str, command: str | None) -> str:
    """Hint at what was meant by an option that there is not: a key of the command, or another option."""
    from nemo_minitron.config.keys import tree_of
    from nemo_minitron.config.schema import COMMANDS, key_called

    name = flag.lstrip("-").replace("-", "_")
    candidates = [COMMANDS[command]] if command in COMMANDS else COMMANDS.values()
    if key := next(filter(None, (key_called(name, tree_of(schema)) for schema in candidates)), None):
        return f" Keys are given without dashes: {key}={value if value and not value.startswith('-') else '…'}"
    return did_you_mean(flag, [*_FLAGS, "--help", "--help-cluster", "--version"])


def _main(argv: list[str]) -> int:
    arguments = parse(argv)
    if arguments.version:
        print(f"minitron {__version__}")
        return 0
    if arguments.command is None:
        from nemo_minitron.config.help_text import overview

        print(overview(), end="", file=sys.stdout if arguments.help else sys.stderr)
        return 0 if arguments.help else 2
    from nemo_minitron.config.schema import COMMANDS, COMPOSITE

    if arguments.command not in COMMANDS:
        raise MinitronError(
            f"unknown command '{arguments.command}'; commands are {', '.join(COMMANDS)}."
            + did_you_mean(arguments.command, COMMANDS)
        )
    if arguments.help:
        from nemo_minitron.config.help_text import command_help

        print(command_help(arguments.command, cluster=arguments.help_cluster), end="")
        return 0

    try:
        from nemo_minitron.config.compose import Source, compose
    except ImportError as error:
        if arguments.command == "doctor":
            _doctor_alone(arguments.overrides, error)
        raise
    source = Source(arguments.config_path, arguments.config_dir, arguments.config_name)
    cfg = compose(arguments.command, arguments.overrides, source, complete=arguments.cfg is None)
    if arguments.cfg:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(cfg), end="")
        return 0
    if "cluster" in cfg:
        _submit(arguments, cfg)
        return 0
    from nemo_minitron.config.inputs import refuse_absent

    refuse_absent(arguments.command, cfg)
    started = time.time()
    try:
        if arguments.command not in COMPOSITE and (processes := processes_to_launch(cfg)):
            from nemo_minitron.jobs import launch

            return launch.launch(processes, [*argv, f"++trainer.devices={processes}"])
        dispatch(arguments.command, cfg)
    except (Interrupted, KeyboardInterrupt):
        return _interrupted(f"; {how_to_go_on(arguments.command, cfg, started)}")
    return 0


def _submit(arguments: Arguments, cfg: DictConfig) -> None:
    """Hand a command to Slurm, and ``run`` stage by stage."""
    assert arguments.command is not None
    from nemo_minitron.config.schema import COMPOSITE

    if arguments.command not in COMPOSITE:
        from nemo_minitron.jobs import slurm

        slurm.submit(arguments.command, cfg, arguments.overrides)
        return
    from omegaconf import OmegaConf

    from nemo_minitron.config.check import instance
    from nemo_minitron.config.compose import compose
    from nemo_minitron.config.schema import COMMANDS

    plain = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "cluster"])
    command = instance(COMMANDS[arguments.command], plain)
    if arguments.command == "search":
        from nemo_minitron.search.submit import submit as submit_search

        submit_search(command, cfg, arguments.overrides)
    else:
        from nemo_minitron.recipe.submit import submit

        submit(command, plain, cfg.cluster, compose)


def _doctor_alone(overrides: Sequence[str], error: ImportError) -> None:
    """Run ``minitron doctor`` where packages that read a configuration are missing or broken.

    Raises:
        MinitronError: always, after the page.
    """
    from nemo_minitron.config.schema import DoctorConfig

    given = dict(word.partition("=")[::2] for word in overrides)
    importlib.import_module("nemo_minitron.stages.doctor").run(DoctorConfig(given.get("output_path")))
    raise MinitronError(f"doctor: 1 problem stops every command: configurations cannot be read: {error}")


def dispatch(command: str, cfg: DictConfig) -> None:
    """Import the command's module, and only that, and run it on the command's own dataclass."""
    from nemo_minitron.config.check import instance
    from nemo_minitron.config.schema import COMMANDS
    from nemo_minitron.jobs.progress import hidden

    with hidden((cfg.get("trainer") or {}).get("enable_progress_bar") is False):
        importlib.import_module(f"nemo_minitron.stages.{command}").run(instance(COMMANDS[command], cfg))


def processes_to_launch(cfg: DictConfig) -> int:
    """How many processes this one must start instead of running itself; 0 under a launcher or for one device.

    ``trainer.devices`` and ``trainer.num_nodes`` are made the numbers that run: ``auto`` and -1 mean every GPU, or one
    process without CUDA; under torchrun or Slurm a value of 1 means as many as the launcher started.

    Raises:
        MinitronError: no number; not what the launcher started; several machines without a launcher.
    """
    trainer: Any = cfg.get("trainer")
    if not trainer or trainer.get("devices") is None or cfg.get("plan_only"):
        return 0
    where = place()
    nodes = int(trainer.get("num_nodes") or 1)
    devices = trainer.devices
    if devices in ("auto", -1, "-1"):
        devices = 1 if where else _visible_devices()
    try:
        devices = int(devices)
    except (TypeError, ValueError):
        raise MinitronError(f"trainer.devices: expected a number or auto, found {trainer.devices!r}") from None
    if devices < 1:
        raise MinitronError(f"trainer.devices: expected at least 1, found {devices}")
    if where and where.local_world_size:
        devices = _as_launched("trainer.devices", devices, where.local_world_size, "processes on each machine")
        nodes = _as_launched("trainer.num_nodes", nodes, where.world_size // where.local_world_size, "machines")
    trainer.devices, trainer.num_nodes = devices, nodes
    if where:
        return 0
    if nodes > 1:
        raise MinitronError(
            f"trainer.num_nodes={nodes}: start the command on every machine with torchrun "
            "(torchrun --nnodes=… -m nemo_minitron …), under Slurm with srun, or submit it with +cluster=slurm"
        )
    return devices if devices > 1 else 0


def _visible_devices() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _as_launched(key: str, asked: int, started: int, what: str) -> int:
    if asked not in (1, started):
        raise MinitronError(f"{key}={asked}, but the launcher started {started} {what}")
    return started
