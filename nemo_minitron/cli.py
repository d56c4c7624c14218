"""``minitron COMMAND [KEY=VALUE …]``: help, configuration, relaunching on several processes, dispatch.

Help answers from the schema alone; Hydra, torch and NeMo are imported only once there is something to run.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from nemo_minitron import __version__
from nemo_minitron.errors import MinitronError, did_you_mean

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

_USAGE = """\
usage: minitron COMMAND [KEY=VALUE ...]
       minitron COMMAND --help
"""

_OPTIONS = """\
options:
  -h, --help           this text; after a command, its keys
  --version            the version
  --cfg job            print the composed config and stop
  --config-path DIR    take the config file from DIR instead, as NeMo's scripts do
  --config-dir DIR     add DIR to the places where configs are found
  --config-name NAME   name of the config file
"""


@dataclass
class Arguments:
    """A parsed command line. ``overrides`` are in Hydra's grammar."""

    command: str | None = None
    help: bool = False
    version: bool = False
    config_path: str | None = None
    config_dir: str | None = None
    config_name: str | None = None
    cfg: str | None = None
    overrides: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return 0, 2 for a user's error (one message on stderr), or 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(arguments)
    except MinitronError as error:
        rank = os.environ.get("RANK", "0")
        print(f"minitron: {'' if rank == '0' else f'[rank {rank}] '}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minitron: interrupted", file=sys.stderr)
        return 130


def parse(argv: Sequence[str]) -> Arguments:
    """Split flags from command and overrides; flags may stand anywhere, as ``--flag VALUE`` or ``--flag=VALUE``."""
    found = Arguments()
    rest = iter(argv)
    for word in rest:
        flag, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            found.help = True
        elif word == "--version":
            found.version = True
        elif flag in _FLAGS:
            if not equals and (value := next(rest, "")) == "":
                raise MinitronError(f"{flag} needs a value")
            setattr(found, _FLAGS[flag], value)
        elif word.startswith("-"):
            raise MinitronError(f"unknown option '{flag}'." + did_you_mean(flag, [*_FLAGS, "--help", "--version"]))
        elif found.command is None:
            found.command = word
        else:
            found.overrides.append(word)
    if found.cfg not in (None, "job"):
        raise MinitronError(f"--cfg: expected job, found '{found.cfg}'")
    return found


def _main(argv: list[str]) -> int:
    arguments = parse(argv)
    if arguments.version:
        print(f"minitron {__version__}")
        return 0
    if arguments.command is None:
        print(help_text(), end="", file=sys.stdout if arguments.help else sys.stderr)
        return 0 if arguments.help else 2
    from nemo_minitron.config.schema import COMMANDS

    if arguments.command not in COMMANDS:
        raise MinitronError(
            f"unknown command '{arguments.command}'; commands are {', '.join(COMMANDS)}."
            + did_you_mean(arguments.command, COMMANDS)
        )
    if arguments.help:
        print(command_help(arguments.command), end="")
        return 0

    from nemo_minitron.config.compose import Source, compose

    source = Source(arguments.config_path, arguments.config_dir, arguments.config_name)
    cfg = compose(arguments.command, arguments.overrides, source, complete=arguments.cfg is None)
    if arguments.cfg:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(cfg), end="")
        return 0
    if processes := processes_to_launch(cfg):
        relaunch(processes, argv)
    dispatch(arguments.command, cfg)
    return 0


def dispatch(command: str, cfg: DictConfig) -> None:
    """Import the command's module, and only that, and run it."""
    if command == "run":
        from nemo_minitron import recipe
        from nemo_minitron.config.compose import compose

        recipe.run(cfg, compose)
        return
    importlib.import_module(f"nemo_minitron.stages.{command}").run(cfg)


def processes_to_launch(cfg: DictConfig) -> int:
    """How many processes this one must start instead of running itself; 0 under a launcher or for one device.

    ``trainer.devices`` is made a number: ``auto`` and -1 mean every GPU, or one process without CUDA.
    """
    trainer: Any = cfg.get("trainer")
    if not trainer or trainer.get("devices") is None:
        return 0
    devices = trainer.devices
    if devices in ("auto", -1, "-1"):
        import torch

        devices = max(1, torch.cuda.device_count())
    try:
        devices = int(devices)
    except (TypeError, ValueError):
        raise MinitronError(f"trainer.devices: expected a number or auto, found {trainer.devices!r}") from None
    if devices < 1:
        raise MinitronError(f"trainer.devices: expected at least 1, found {devices}")
    trainer.devices = devices
    if launched():
        return 0
    if int(trainer.get("num_nodes") or 1) > 1:
        raise MinitronError(
            f"trainer.num_nodes={trainer.num_nodes}: start the command on every machine with torchrun "
            "(torchrun --nnodes=… -m nemo_minitron …) or under Slurm with srun"
        )
    return devices if devices > 1 else 0


def launched() -> bool:
    """Whether torchrun or Slurm (with more than one task) started this process."""
    return "LOCAL_RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1


def relaunch(processes: int, argv: Sequence[str]) -> NoReturn:
    """Become ``torchrun`` with ``processes`` copies of this command line; does not return."""
    sys.stdout.flush()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.execv(
        sys.executable,
        [sys.executable, *launcher, "-m", "nemo_minitron", *argv, f"++trainer.devices={processes}"],
    )


def help_text() -> str:
    """What ``minitron --help`` prints."""
    from nemo_minitron.config.schema import COMMANDS, summary

    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary(name)}" for name in COMMANDS]
    return "\n".join([_USAGE, "commands:", *lines, "", _OPTIONS])


def command_help(command: str) -> str:
    """What ``minitron COMMAND --help`` prints: every key of ours with its default, then ``conf/COMMAND.yaml``."""
    from pathlib import Path

    from nemo_minitron.config.schema import COMMANDS, REQUIRED, keys, summary

    ours, foreign = [], []
    for name, kind, default, metadata in keys(COMMANDS[command]):
        if metadata.get("foreign"):
            foreign.append((f"{name}.*", metadata["help"]))
            continue
        shown = "required" if default == REQUIRED else "null" if default is None else str(default)
        choices = metadata.get("choices")
        what = " | ".join(choices) if choices else kind.replace(" | None", "").replace("Any", "value")
        ours.append((name, f"{metadata['help']}  [{what}; {shown}]"))
    width = max(len(name) for name, _ in ours + foreign) + 2
    lines = [f"usage: minitron {command} [KEY=VALUE ...]", "", summary(command), "", "keys:"]
    lines += [f"  {name:<{width}}{text}" for name, text in ours]
    if foreign:
        lines += ["", "sections of NeMo and Lightning:"]
        lines += [f"  {name:<{width}}{text}" for name, text in foreign]
        text = (Path(__file__).parent / "conf" / f"{command}.yaml").read_text()
        lines += ["", *(f"  {line}".rstrip() for line in text.splitlines() if not line.startswith("#"))]
    return "\n".join([*lines, "", _OPTIONS])
