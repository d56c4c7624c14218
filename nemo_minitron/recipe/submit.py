"""``minitron run … +cluster=slurm``: each stage that is to run as a job of its own, after those whose outputs it reads.

In ``cluster.folder/NAME`` lie ``run.yaml``, the whole resolved configuration of the run, ``STAGE.sh`` for each stage,
and ``submit.sh``, which hands them to sbatch as this does. A stage of one process is ``minitron run stages=[STAGE]``;
one of a grid has its processes started by srun, between two steps that decide, and record, as a run does
(:mod:`nemo_minitron.recipe.job`). Fingerprints are those of a run at this machine: what is done is not submitted.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from nemo_minitron.config.check import typed
from nemo_minitron.config.schema import COMPOSITE, RunConfig
from nemo_minitron.config.sections import Cluster, WithCluster
from nemo_minitron.errors import MinitronError, did_you_mean
from nemo_minitron.files.staging import write_file
from nemo_minitron.jobs.slurm import Job, Steps, check, check_one_machine, script_of, write_scripts
from nemo_minitron.jobs.slurm_chain import Link, submit_chain, waiting
from nemo_minitron.recipe.job import UP_TO_DATE
from nemo_minitron.recipe.order import readers
from nemo_minitron.recipe.records import Records, read_record
from nemo_minitron.recipe.stage import Compose, Stage, chosen, load_stages
from nemo_minitron.recipe.turn import is_done
from nemo_minitron.recipe.walk import open_records

JOBS = ".jobs.json"
"""Beside the records of a run's stages: the jobs that were submitted last, by stage."""

BY_HAND = "submit.sh"

OF_A_STAGE = tuple(
    item.name
    for item in dataclasses.fields(Cluster)
    if item.name not in ("nodes", "ntasks_per_node", "job_name", "dependency", "folder", "dry_run", "stages")
)
"""Keys of ``cluster`` that may differ between stages."""


def submit(cfg: RunConfig, plain: DictConfig, options: DictConfig, compose: Compose) -> None:
    """Submit the stages of a run; with ``cluster.dry_run`` print their scripts instead.

    Args:
        plain: what ``cfg`` was made of, as the jobs are to read it. options: the ``cluster`` section.

    Raises:
        MinitronError: a stage's configuration is wrong, an input that no stage writes is absent, a value of ``cluster``
            that Slurm cannot take, jobs of this run still wait, sbatch refused; nothing of the chain then stays
            submitted.
    """
    stages = chosen(cfg, load_stages(cfg, compose))
    per_stage = {stage.name: _options(stage, stages, options) for stage in stages}
    for some in per_stage.values():
        check(some)
    sizes = {stage.name: job_of(stage, per_stage[stage.name]) for stage in stages}
    records = open_records(cfg)
    _refuse_waiting(records, cfg.run_dir)
    reads = readers(stages)
    wanted = to_run(stages, reads, records, force=cfg.force)
    _tell_done(stages, wanted)
    if not wanted:
        print(f"recipe {cfg.recipe['name']}: all {len(stages)} stages are up to date, nothing to submit")
        return
    name = options.job_name or re.sub(r"[^A-Za-z0-9._-]", "-", f"minitron-{cfg.recipe['name']}")
    config = OmegaConf.to_yaml(plain)

    def texts(folder: Path) -> dict[Path, str]:
        files = {"run.yaml": config}
        for stage in (stage for stage in stages if stage.name in wanted):
            job = dataclasses.replace(sizes[stage.name], name=f"{name}-{stage.name}")
            after = reads[stage.name]  # the same whatever is done by now
            files[f"{stage.name}.sh"] = _script(stage, job, per_stage[stage.name], folder, records.folder, after)
        files[BY_HAND] = by_hand(wanted, folder, options.dependency)
        return {folder / file: text for file, text in files.items()}

    folder = write_scripts(Path(options.folder).absolute(), name, texts, [BY_HAND])
    if options.dry_run:
        for file in (*(f"{stage}.sh" for stage in wanted), BY_HAND):
            print(f"==> {folder / file}\n{(folder / file).read_text()}")
        print(f"minitron: wrote {folder}; not submitted, bash {folder / BY_HAND} does", file=sys.stderr)
        return
    links = [Link(stage, folder / f"{stage}.sh", after) for stage, after in wanted.items()]
    path = records.folder / JOBS
    numbers = submit_chain(links, options.dependency, lambda found: write_file(path, json.dumps(found) + "\n"))
    _tell(numbers, wanted, sizes, folder)


def to_run(
    stages: list[Stage], reads: Mapping[str, tuple[str, ...]], records: Records, *, force: bool = False
) -> dict[str, tuple[str, ...]]:
    """Stages that a run would not skip, or may not, since they read what one of these writes; each with the latter.

    Args:
        reads: as :func:`nemo_minitron.recipe.order.readers` gives it.

    Raises:
        MinitronError: an input that no stage writes is absent.
    """
    found: dict[str, tuple[str, ...]] = {}
    for stage in stages:
        after = tuple(name for name in reads[stage.name] if name in found)
        if force or after or not is_done(stage, records):
            found[stage.name] = after
    return found


def job_of(stage: Stage, options: DictConfig) -> Job:
    """Machines, processes and GPUs of a stage: those of its trainer; else one process, with as many cores as workers,
    and a GPU only for ``generate``.

    Raises:
        MinitronError: its processes are no number, as the machines of the job cannot be asked before it starts.
    """
    config = stage.config
    trainer = None if config.get("plan_only") else config.get("trainer")
    if trainer is None:
        gpus = int(stage.command == "generate" and config.get("accelerator") != "cpu")
        workers = config.get("workers", 1)
        return Job(
            stage.name,
            gpus=min(gpus, 1 if options.gpus_per_node is None else options.gpus_per_node),
            cpus=workers if isinstance(workers, int) and workers > 1 else None,
        )
    counts = {"devices": trainer.get("devices") or 1, "num_nodes": trainer.get("num_nodes") or 1}
    if counts["devices"] in ("auto", -1, "-1") and options.gpus_per_node:
        counts["devices"] = options.gpus_per_node
    for key, value in counts.items():
        if not str(value).isdecimal() or int(value) < 1:
            raise MinitronError(
                f"stage '{stage.name}': trainer.{key}={value}: expected a number of at least 1, as the machines of the "
                "job cannot be asked before it starts"
            )
    nodes, tasks = int(counts["num_nodes"]), int(counts["devices"])
    gpus = tasks if options.gpus_per_node is None else min(tasks, options.gpus_per_node)
    if stage.command not in COMPOSITE:
        return Job(stage.name, nodes, tasks, gpus)
    check_one_machine(stage.command, f"stage '{stage.name}': trainer.num_nodes", nodes)
    return Job(stage.name, gpus=gpus, cpus=tasks)


def by_hand(wanted: Mapping[str, tuple[str, ...]], folder: Path, dependency: str | None) -> str:
    """Shell lines that submit the scripts in ``folder``; those that were are cancelled when one is refused."""
    cancel = "trap '[ $? = 0 ] || [ ${#job[@]} = 0 ] || scancel \"${job[@]}\"' EXIT"
    lines = ["#!/bin/bash", "set -euo pipefail", "declare -A job=()", cancel]
    for stage, after in wanted.items():
        waits = "afterok" + "".join(f":${{job[{shlex.quote(name)}]}}" for name in after) if after else dependency
        words = f'"--dependency={waits}" ' if waits else ""
        name, script = f"job[{shlex.quote(stage)}]", shlex.quote(str(folder / f"{stage}.sh"))
        lines += [f"number=$(sbatch --parsable {words}{script})"]
        lines += [f'{name}=${{number%%;*}}; echo "job ${{{name}}}: {stage}"']
    return "\n".join(lines) + "\n"


def _options(stage: Stage, stages: list[Stage], options: DictConfig) -> DictConfig:
    """The ``cluster`` section for a stage: what is said of its command, and then of itself, comes first."""
    for key in ("nodes", "ntasks_per_node"):
        if options[key] is not None:
            raise MinitronError(
                f"cluster.{key}={options[key]}: a run takes machines and processes from each stage's trainer.num_nodes "
                "and trainer.devices (recipe.settings.devices=…)"
            )
    known = {name for other in stages for name in (other.name, other.command)}
    merged = OmegaConf.masked_copy(options, [str(key) for key in options if key != "stages"])
    for name, keys in options.stages.items():
        where = f"cluster.stages.{name}"
        if name not in known:
            raise MinitronError(
                f"{where}: there is no such stage, and no such command.{did_you_mean(str(name), known)}"
            )
        if not isinstance(keys, Mapping | DictConfig):
            raise MinitronError(f"{where}: expected keys of cluster below it, found {keys}")
        for key in keys:
            if key not in OF_A_STAGE:
                raise MinitronError(f"{where}.{key}: no key of a stage.{did_you_mean(str(key), OF_A_STAGE)}")
    for name in (stage.command, stage.name):
        if options.stages.get(name):
            merged = cast(DictConfig, OmegaConf.merge(merged, options.stages[name]))
    try:
        return cast(DictConfig, typed(WithCluster, cast(DictConfig, OmegaConf.create({"cluster": merged}))).cluster)
    except MinitronError as error:
        raise MinitronError(f"cluster.stages, for stage '{stage.name}': {error}") from None


def _script(stage: Stage, job: Job, options: DictConfig, folder: Path, records: Path, after: tuple[str, ...]) -> str:
    run_dir, config = records.absolute().parent, folder / "run.yaml"
    steps = Steps(options, [folder, run_dir])
    if job.nodes * job.tasks == 1 or stage.command in COMPOSITE:
        words = ["nemo_minitron", "run", f"--config-path={folder}", f"--config-name={config.name}"]
        lines = [steps.step([*words, f"stages=[{stage.name}]"], alone=True)]
    else:
        module = "nemo_minitron.recipe.job"
        command = [stage.command, f"--config-path={records.absolute()}", f"--config-name={stage.name}.yaml"]
        lines = [
            "code=0",
            f"{steps.step([module, 'begin', str(config), stage.name], alone=True)} || code=$?",
            f"case $code in 0) ;; {UP_TO_DATE}) exit 0 ;; *) exit $code ;; esac # {UP_TO_DATE}: up to date",
            f"{steps.step(['nemo_minitron', *command])} || code=$?",
            f'{steps.step([module, "end", str(config), stage.name], alone=True)} "$code"',
        ]
    note = f"stage {stage.name}" + (f", after {', '.join(after)}" if after else "")
    return script_of(job, options, str(folder / stage.name), lines, note=note, dependent=True)


def _refuse_waiting(records: Records, run_dir: str) -> None:
    """Refuse a run of which jobs are still in the queue: two jobs of one stage would write the same files."""
    known = {str(name): str(number) for name, number in read_record(records.folder / JOBS).items()}
    states = waiting(known.values())
    for name, number in known.items():
        if number in states:
            raise MinitronError(
                f"run_dir: stage '{name}' of {run_dir} is job {number}, {states[number]}; wait for it, or "
                f"scancel {' '.join(states)}"
            )


def _tell_done(stages: list[Stage], wanted: Mapping[str, Any]) -> None:
    done = [stage.name for stage in stages if stage.name not in wanted]
    if done and wanted:
        print(f"up to date, not submitted: {', '.join(done)}")


def _tell(
    numbers: Mapping[str, str], wanted: Mapping[str, tuple[str, ...]], sizes: Mapping[str, Job], folder: Path
) -> None:
    """Say which jobs there are now, a line each."""
    widths = max(map(len, numbers.values())), max(map(len, numbers))
    for name, number in numbers.items():
        job = sizes[name]
        count, gpus = job.nodes * job.tasks, job.nodes * job.gpus
        size = f"{count} process{'es' * (count > 1)}, {gpus or 'no'} GPU{'s' * (gpus > 1)}"
        after = f"after {', '.join(numbers[other] for other in wanted[name])}" if wanted[name] else ""
        print(f"job {number:<{widths[0]}}  {name:<{widths[1]}}  {size:<22}  {after}".rstrip())
    print(
        f"submitted {len(numbers)} job{'s' * (len(numbers) > 1)}, scripts and output in {folder}; "
        f"to cancel: scancel {' '.join(numbers.values())}"
    )
