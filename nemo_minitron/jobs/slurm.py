"""Submit a command to Slurm: ``minitron COMMAND … +cluster=slurm``.

Three files of one name are left in ``cluster.folder``: ``NAME.yaml``, the command's whole resolved config without its
``cluster`` section; ``NAME.sh``, the batch script, which starts the command from that file and nothing else (but for
keys that were removed, which a file cannot say), so that the job runs what was submitted, whatever becomes of the
user's files and of the shell that it came from; and ``NAME.job``, the number that Slurm gave it. A name is never used
for two different jobs: a job that waits in the queue keeps its files.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_minitron.config.schema import COMPOSITE
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import write_file

_TIME = re.compile(r"(\d+-)?\d+:\d\d(:\d\d)?|\d+-\d+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SBATCH = ["sbatch", "--parsable"]


def submit(command: str, cfg: DictConfig, overrides: Sequence[str] = ()) -> str | None:
    """Write the job of ``cfg`` and hand it to ``sbatch``; with ``cluster.dry_run`` print its script instead.

    Args:
        overrides: those that ``cfg`` was composed from.

    Returns:
        The job's number; None after a dry run.

    Raises:
        MinitronError: a value of ``cluster`` that Slurm cannot take, before anything is written; no ``sbatch``; the
            folder cannot be written; sbatch refused, in its own words.
    """
    options = cfg.cluster
    plain = _with_grid(command, cfg)
    if options.stages:
        raise MinitronError(f"cluster.stages: `minitron {command}` has none; it is for `minitron run`")
    check(options)
    removed = [text.partition("=")[0] for text in overrides if text.startswith("~") and not text.startswith("~cluster")]
    folder = Path(options.folder).absolute()

    def texts(base: Path) -> dict[Path, str]:
        config = Path(f"{base}.yaml")
        script = render(command, plain, options, config, removed)
        return {config: OmegaConf.to_yaml(plain), Path(f"{base}.sh"): script}

    script = Path(f"{write_scripts(folder, options.job_name or f'minitron-{command}', texts)}.sh")
    if options.dry_run:
        print(script.read_text(), end="")
        print(f"minitron: wrote {script}; not submitted", file=sys.stderr)
        return None
    number = sbatch(script)
    record = {"job": number, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": [*_SBATCH, str(script)]}
    write_file(script.with_suffix(".job"), json.dumps(record) + "\n")
    print(f"submitted job {number}: {script}; its output goes to {script.with_suffix('')}-{number}.out")
    return number


def render(command: str, cfg: DictConfig, options: DictConfig, config: Path, removed: Sequence[str] = ()) -> str:
    """The batch script that runs ``command`` from ``config`` (``FOLDER/NAME.yaml``).

    A command that starts the processes of its stages itself is one task, with a core for each of them.

    Args:
        cfg: the command's config, its ``trainer`` already holding the job's grid.
        options: the ``cluster`` section.
        removed: ``~KEY`` overrides.
    """
    nodes, processes = _grid(cfg)
    gpus = processes if options.gpus_per_node is None and "trainer" in cfg else options.gpus_per_node
    tasks, cpus = (1, processes) if command in COMPOSITE else (processes, None)
    job = Job(options.job_name or f"minitron-{command}", nodes, tasks, gpus or 0, cpus)
    run = [command, f"--config-path={config.parent}", f"--config-name={config.name}", *removed]
    step = Steps(options, [config.parent]).step(["nemo_minitron", *run])
    return script_of(job, options, str(config.with_suffix("")), [step])


@dataclass(frozen=True)
class Job:
    """What a job asks for: ``gpus`` and ``tasks`` on each of ``nodes`` machines, ``cpus`` for each task."""

    name: str
    nodes: int = 1
    tasks: int = 1
    gpus: int = 0
    cpus: int | None = None


class Steps:
    """Lines that start a Python module in a job, by srun, in the container if there is one.

    Args:
        options: the ``cluster`` section. folders: to mount beside the current one.
    """

    def __init__(self, options: DictConfig, folders: Sequence[Path]) -> None:
        here = Path.cwd()
        self._container: list[str] = []
        if options.container_image:
            mounts = dict.fromkeys([*(f"{folder}:{folder}" for folder in (here, *folders)), *options.container_mounts])
            self._container += [f"--container-image={options.container_image}"]
            self._container += [f"--container-mounts={','.join(mounts)}", f"--container-workdir={here}"]
        self._arguments = list(options.srun_args)
        self._python = options.python or ("python" if options.container_image else sys.executable)

    def step(self, words: Sequence[str], *, alone: bool = False) -> str:
        """Run ``python -m WORDS`` in all tasks of the job, or ``alone`` in one."""
        one = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1"] if alone else []
        srun = ["srun", "--kill-on-bad-exit=1", *one, *self._container, *self._arguments]
        return f"{shlex.join(srun)} \\\n  {shlex.join([self._python, '-u', '-m', *words])}"


def script_of(
    job: Job, options: DictConfig, output: str, steps: Sequence[str], *, note: str = "", dependent: bool = False
) -> str:
    """The batch script of a job.

    Args:
        options: the ``cluster`` section.
        output: path of the job's output, to which its number is added.
        steps: shell lines, of :class:`Steps`.
        note: a comment. dependent: the job is submitted with jobs that it waits for, and is cancelled with them.
    """
    directives = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks,
        "cpus-per-task": job.cpus,
        "gpus-per-node": job.gpus or None,
        "partition": options.partition,
        "account": options.account,
        "time": options.time_limit,
        "mem": options.mem,
        "dependency": None if dependent else options.dependency,
        "kill-on-invalid-dep": "yes" if dependent else None,
        "chdir": Path.cwd(),
        "output": f"{output.replace('%', '%%')}-%j.out",
    }
    lines = ["#!/bin/bash", *([f"# {note}"] if note else [])]
    lines += [f"#SBATCH {shlex.quote(f'--{key}={value}')}" for key, value in directives.items() if value is not None]
    lines += ["#SBATCH --exclusive"] if options.exclusive else []
    lines += [f"#SBATCH {shlex.quote(argument)}" for argument in options.sbatch_args]
    lines += ["", "set -euo pipefail", ""]
    if options.setup:
        lines += ["set +u # setup scripts read variables that are not set", *options.setup, "set -u", ""]
    lines += [f"export {name}={shlex.quote(str(value))}" for name, value in options.env.items() if value is not None]
    lines += [
        'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "export MASTER_ADDR=${hosts%%$'\\n'*}",
        "export MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000))",
        "",
    ]
    lines += ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # which srun does not take over", ""] if job.cpus else []
    return "\n".join([*lines, *steps]) + "\n"


def sbatch(script: Path, *arguments: str) -> str:
    """Hand a script to ``sbatch``; return the job's number.

    Raises:
        MinitronError: it refused, in its own words.
    """
    done = subprocess.run([*_SBATCH, *arguments, str(script)], capture_output=True, text=True, check=False)
    number = done.stdout.strip().partition(";")[0]
    if done.returncode or not number:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise MinitronError(f"sbatch refused {script}: {said[-1]}")
    return number


def _with_grid(command: str, cfg: DictConfig) -> DictConfig:
    """The config that the job runs: without ``cluster``, its trainer holding what Slurm will start."""
    options, plain = cfg.cluster, OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "cluster"])
    nodes, tasks = options.nodes, options.ntasks_per_node
    if "trainer" not in plain:
        for key, value in (("nodes", nodes), ("ntasks_per_node", tasks)):
            if value not in (None, 1):
                raise MinitronError(f"cluster.{key}={value}: `minitron {command}` runs in one process")
        return plain
    if tasks is None:
        tasks = plain.trainer.get("devices")
        if tasks in (None, "auto", -1, "-1"):
            tasks = options.gpus_per_node
        if tasks is None:
            raise MinitronError(
                f"trainer.devices={plain.trainer.get('devices')}: expected a number, as the machines of the job cannot "
                "be asked before it starts; set trainer.devices or cluster.ntasks_per_node"
            )
    plain.trainer.devices = tasks
    plain.trainer.num_nodes = nodes if nodes is not None else plain.trainer.get("num_nodes") or 1
    if command in COMPOSITE:
        check_one_machine(command, "trainer.num_nodes" if nodes is None else "cluster.nodes", plain.trainer.num_nodes)
    return plain


def _grid(cfg: DictConfig) -> tuple[int, int]:
    """(machines, processes on each)."""
    grid = []
    for key in ("num_nodes", "devices"):
        value = cfg.trainer[key] if "trainer" in cfg else 1
        if not str(value).isdecimal() or int(value) < 1:
            raise MinitronError(f"trainer.{key}: expected a number of at least 1, found {value!r}")
        grid.append(int(value))
    return grid[0], grid[1]


def check_one_machine(command: str, key: str, nodes: int) -> None:
    """Refuse several machines for a command that starts the processes of its stages itself.

    Raises:
        MinitronError: naming ``key``, which asks for them.
    """
    if nodes != 1:
        raise MinitronError(
            f"{key}={nodes}: expected 1, as `minitron {command}` starts the processes of its stages on the machine "
            "that it runs on"
        )


def check(options: DictConfig) -> None:
    """Refuse values of the ``cluster`` section that Slurm cannot take, and a machine without ``sbatch``.

    Raises:
        MinitronError: naming the key.
    """
    for key in ("nodes", "ntasks_per_node"):
        if options[key] is not None and options[key] < 1:
            raise MinitronError(f"cluster.{key}: expected at least 1, found {options[key]}")
    if options.gpus_per_node is not None and options.gpus_per_node < 0:
        raise MinitronError(f"cluster.gpus_per_node: expected 0 or more, found {options.gpus_per_node}")
    if options.time_limit is not None and not _TIME.fullmatch(options.time_limit):
        raise MinitronError(
            f"cluster.time_limit: expected [DAYS-]HOURS:MINUTES:SECONDS, found '{options.time_limit}' "
            "(in a YAML file it needs quotes)"
        )
    name = options.job_name
    if name is not None and (not _NAME.fullmatch(name) or name in ("bash", "interactive")):
        # Lightning takes a job named bash or interactive for a shell, and its tasks for unrelated processes
        raise MinitronError(
            f"cluster.job_name: expected letters, digits, '.', '_' and '-', and not bash or interactive, found '{name}'"
        )
    for variable in options.env:
        if not _VARIABLE.fullmatch(str(variable)):
            raise MinitronError(f"cluster.env: expected names of variables, found '{variable}'")
    for argument in (*options.sbatch_args, *options.srun_args):
        if not argument.startswith("-"):
            raise MinitronError(f"cluster.sbatch_args, cluster.srun_args: expected options, found '{argument}'")
    one_line = {str(key): options[key] for key in options if key not in ("setup", "env", "stages")}
    for key, value in one_line.items():
        if any("\n" in str(part) for part in (value if OmegaConf.is_list(value) else [value])):
            raise MinitronError(f"cluster.{key}: expected one line, found a line break")
    if not options.dry_run and shutil.which("sbatch") is None:
        raise MinitronError(
            "cluster: found no sbatch on this machine; submit from a login node of the cluster, or write the script "
            "with cluster.dry_run=true"
        )


def write_scripts(
    folder: Path, name: str, texts: Callable[[Path], Mapping[Path, str]], replaced: Collection[str] = ()
) -> Path:
    """Write scripts for jobs, or for those of ``NAME-2…`` where others have the name.

    Args:
        texts: makes files with their texts from ``FOLDER/NAME``, on which their paths begin.
        replaced: names of files that are written anew whatever they held.

    Returns:
        The ``FOLDER/NAME`` that was taken.

    Raises:
        MinitronError: the folder cannot be written.
    """
    for number in itertools.count(1):
        base = folder / (name if number == 1 else f"{name}-{number}")
        files = texts(base)
        try:
            kept = {path: text for path, text in files.items() if path.name not in replaced}
            if any(path.exists() and path.read_text() != text for path, text in kept.items()):
                continue
            for path, text in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, text)
        except OSError as error:
            raise MinitronError(f"cluster.folder: cannot write '{folder}': {error.strerror}") from None
        break
    return base
