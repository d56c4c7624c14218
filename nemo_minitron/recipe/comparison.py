"""Teacher, pruned and distilled model side by side, at the end of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import write_file
from nemo_minitron.recipe.records import read_record
from nemo_minitron.recipe.stage import Stage
from nemo_minitron.report.measures import ROLES, gap_closed, measured_alike, unlike


def report(roles: Mapping[str, str], stages: Mapping[str, Stage], run_dir: Path) -> None:
    """Gather the roles' evaluations into ``run_dir/metrics.json`` and print them; roles not yet there are left out."""
    metrics = {role: read_record(Path(roles[role])) for role in ROLES if role in roles and Path(roles[role]).is_file()}
    if not metrics:
        return
    write_file(run_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(f"\n{table(metrics)}")
    closed = gap_closed(metrics)
    if closed is not None:
        trainings = [stage.config for stage in stages.values() if stage.command == "distill"]
        on = "" if any(map(_may_end_early, trainings)) else f" on {sum(map(_training_tokens, trainings)):,} tokens"
        print(f"distillation{on} closed {closed:.1%} of the loss that pruning cost")
    if not measured_alike(metrics):
        print(unlike(metrics))
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


def _training_tokens(config: DictConfig) -> int:
    return int(config.trainer.max_steps) * int(config.model.global_batch_size) * int(config.model.data.seq_length)


def _may_end_early(config: DictConfig) -> bool:
    """Whether a training may have had fewer steps than it was laid out for."""
    manager = config.exp_manager
    limits = (
        config.trainer.get("max_time"),
        manager.get("max_time_per_run"),
        manager.get("create_early_stopping_callback"),
    )
    return any(limits)
