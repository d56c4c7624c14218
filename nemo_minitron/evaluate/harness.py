"""Tasks of EleutherAI's lm-evaluation-harness, on an HF folder.

The harness runs transformers' model, not ours: its numbers are those that others get for the exported model.
"""

from __future__ import annotations

import gc
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron import runtime
from nemo_minitron.config.sections import LmEval
from nemo_minitron.errors import MinitronError, did_you_mean

_DTYPES = {"32": "float32", "bf16": "bfloat16", "16": "float16"}


@dataclass(frozen=True)
class Tasks:
    """What is to be run, found and checked.

    Attributes:
        names: as the harness takes them: names of tasks, groups or tags, or paths of YAML files.
        manager: the harness's ``TaskManager`` that knows them.
    """

    names: tuple[str, ...]
    manager: Any


def find_tasks(tasks: Sequence[str], include_path: str | None = None) -> Tasks:
    """Look every task up before any model is read.

    Args:
        tasks: names, patterns of names, YAML files, or folders of YAML files (all tasks in them).
        include_path: folder of YAML files whose tasks and groups are known by name too.

    Raises:
        MinitronError: lm-eval is absent; no such task, file or folder; a folder without a task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MinitronError(
            "evaluate.lm_eval.tasks: lm-evaluation-harness cannot be imported "
            f"({error}); install it with: pip install 'nemo_minitron[lm-eval]'"
        ) from None
    folders = [Path(task) for task in tasks if Path(task).is_dir()]
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise MinitronError(f"evaluate.lm_eval.include_path: expected a folder, found nothing at {include_path}")
        folders.append(Path(include_path))
    paths = [str(folder) for folder in folders]
    manager = TaskManager(include_path=paths, include_defaults=False)
    # The harness's own thousands of YAML files take seconds to read; local tasks do not need them, a group may.
    is_local = all(Path(task).exists() or manager.match_tasks([task]) for task in tasks)
    if not is_local or manager.all_groups or any(_is_group(Path(task)) for task in tasks):
        manager = TaskManager(include_path=paths)
    names: list[str] = []
    for task in tasks:
        if Path(task).is_dir():
            own = TaskManager(include_path=task, include_defaults=False)
            if not (found := [*own.all_groups] or [*own.all_subtasks]):
                raise MinitronError(f"evaluate.lm_eval.tasks: found no task in the YAML files of {task}")
            names += found
        elif Path(task).is_file():
            names.append(task)
        elif found := manager.match_tasks([task]):
            names += found
        else:
            raise MinitronError(
                f"evaluate.lm_eval.tasks: no task '{task}', neither by name nor as a file."
                + did_you_mean(task, manager.all_tasks)
            )
    return Tasks(tuple(dict.fromkeys(names)), manager)


def _is_group(path: Path) -> bool:
    return path.is_file() and any(line.startswith("group:") for line in path.read_text().splitlines())


def run_tasks(
    folder: Path, tasks: Tasks, options: LmEval, precision: str | int, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run ``tasks`` on the HF model in ``folder``, on the GPU where there is one.

    Args:
        options: ``num_fewshot``, ``limit``, ``batch_size``; with ``log_samples`` every item is returned.
        precision: 32, bf16 or 16: what the weights are computed in.
        seed: of few-shot examples and of everything random in the harness.

    Returns:
        The ``lm_eval`` entry of a ``metrics.json`` (every task's metrics, each with its ``_stderr``), and the items.

    Raises:
        MinitronError: the harness cannot read a task's data, or has no use for it.
    """
    import lm_eval
    from datasets.exceptions import DatasetsError

    dtype = _DTYPES.get(str(precision).removesuffix("-mixed").removesuffix("-true"), "float32")
    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": dtype, "trust_remote_code": False},
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            batch_size=options.batch_size,
            device="cuda" if runtime.has_cuda() else "cpu",
            log_samples=options.log_samples,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ValueError, DatasetsError) as error:  # a task's data or YAML, or what its items need of the model
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise MinitronError(f"evaluate.lm_eval: the harness could not run {', '.join(tasks.names)}: {said}") from error
    assert found is not None  # it is on its rank 0, which this only process is
    gc.collect()
    return _summary(found, dtype, options.limit, seed), [
        {"task": name, **_item(sample)} for name, items in (found.get("samples") or {}).items() for sample in items
    ]


def _summary(found: Mapping[str, Any], dtype: str, limit: float | None, seed: int) -> dict[str, Any]:
    """The harness's results under the names that a ``metrics.json`` has for them."""
    return {
        "version": importlib.metadata.version("lm_eval"),
        "dtype": dtype,
        "num_fewshot": found.get("n-shot"),
        "limit": limit,
        "seed": seed,
        "items": {name: count["effective"] for name, count in found["n-samples"].items()},
        "tasks": {name: _plain(values) for name, values in {**found["results"], **(found.get("groups") or {})}.items()},
    }


def _plain(values: Mapping[str, Any]) -> dict[str, float]:
    """``acc,none: 0.5`` → ``acc: 0.5``; a filter that is one stays in the name. What is not a number goes."""
    found = {}
    for name, value in values.items():
        metric, _, filtered = name.partition(",")
        if isinstance(value, int | float) and filtered:
            found[metric if filtered == "none" else name] = float(value)
    return found


def _item(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Number, target, raw answers (for a choice: log-likelihood and whether it is the greedy one) and metrics."""
    answers = [response[0] if len(response) == 1 else response for response in sample["resps"]]
    metrics = {name: sample[name] for name in sample.get("metrics", []) if name in sample}
    return {"item": sample["doc_id"], "target": str(sample["target"]), "answers": answers, **metrics}
