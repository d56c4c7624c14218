"""Everything that ``minitron evaluate`` measures of one model, each part where it is asked for."""

from __future__ import annotations

import gc
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nemo_minitron import runtime
from nemo_minitron.checkpoint import HfReader, NemoReader
from nemo_minitron.checkpoint.hf_rope import older_reads
from nemo_minitron.config.grid import Grid, Machines
from nemo_minitron.config.schema import EvaluateConfig
from nemo_minitron.config.sections import Evaluate
from nemo_minitron.convert.temporary import exported
from nemo_minitron.data.blocks import mask_blocks, token_blocks
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.evaluate.energy import Meter
from nemo_minitron.evaluate.harness import Tasks, find_tasks, run_tasks
from nemo_minitron.evaluate.loss import evaluate, facts
from nemo_minitron.evaluate.throughput import throughput
from nemo_minitron.files.staging import Staging, write_file
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.nemo.scoring import load_for_forward

Metrics = dict[str, Any]
"""What a ``metrics.json`` has of a model: numbers by name, and sections ``throughput``, ``energy`` and ``lm_eval``."""


def measure(cfg: EvaluateConfig) -> Metrics:
    """Measure what ``evaluate`` asks for; from every rank of the job, the same on all.

    Raises:
        MinitronError: before any weight is read: missing files, unwritable output, tokens that the model does not have,
            a grid that does not fit, unknown tasks; later: tokens of another vocabulary, or a loss that is not finite.
    """
    source, options = Path(required(cfg, "model.restore_from_path")), cfg.evaluate
    on_grid = options.perplexity or options.throughput
    if not on_grid and not options.lm_eval.tasks:
        raise MinitronError(
            "evaluate: nothing is asked for; set evaluate.perplexity, evaluate.throughput or evaluate.lm_eval.tasks"
        )
    if cfg.output_path and runtime.rank() == 0:
        Staging(cfg.output_path).abort()  # proves that it can be written, before the work
    shape = shape_of(source, on_grid)
    tasks = _check_harness(cfg) if options.lm_eval.tasks else None
    metrics: Metrics = _on_grid(cfg, source) if on_grid else {**facts(shape)}
    if tasks is not None:
        gc.collect()  # the model that was measured above
        metrics["lm_eval"] = _harness(cfg, source, tasks)
    return metrics


def shape_of(source: Path, on_grid: bool) -> ModelShape:
    """Sizes of the model; an HF folder, which only the harness reads, is refused where NeMo's model is wanted."""
    if (source / "config.json").is_file():
        if on_grid:
            raise MinitronError(
                f"model.restore_from_path: expected a .nemo, found the HF folder {source}; convert it with `minitron "
                "convert`, or ask for evaluate.lm_eval.tasks alone (evaluate.perplexity=false)"
            )
        with HfReader(source) as reader:
            shape = reader.shape
            if not older_reads(reader.hf_config, (shape.rotary_base, shape.rope_scaling)):  # the harness reads by them
                raise MinitronError(
                    f"{source}: config.json: expected RoPE in rope_theta and rope_scaling, which the harness's "
                    "transformers reads, found it in rope_parameters alone; convert it to a .nemo and evaluate that"
                )
            return shape
    with NemoReader(source) as reader:
        return reader.shape


def _on_grid(cfg: EvaluateConfig, source: Path) -> Metrics:
    """Loss, throughput and their energy, of NeMo's model on the grid of this job."""
    from nemo_minitron.nemo.vocabulary import check_tokens

    options, blocks, counts = cfg.evaluate, None, None
    with NemoReader(source) as reader:
        length = int(options.seq_length or reader.config["encoder_seq_length"])
        if options.perplexity:
            prefix = required(cfg, "evaluate.data_prefix")
            reader.shape.check_window(length, "evaluate.seq_length")
            vocab_size = reader.shape.vocab_size
            blocks = token_blocks(prefix, length, num_samples=options.num_samples, seed=cfg.seed, vocab_size=vocab_size)
            counts = mask_blocks(prefix, length, num_samples=options.num_samples, seed=cfg.seed)
        else:
            length = min(length, reader.shape.longest_sequence)
        if options.throughput:
            _check_throughput(options, reader.shape, Grid.of(cfg.model))
    model = load_for_forward(source, cfg.model, cfg.trainer, length)
    meter = Meter() if options.energy else None
    metrics: Metrics = {}
    joules: dict[str, float] | None = None
    if blocks is not None:
        check_tokens(model, [prefix], "evaluate.data_prefix")
        before = meter.read() if meter else []
        metrics = evaluate(model, blocks, options.micro_batch_size, counts)
        if meter and (total := meter.of_the_job([meter.since(before)])) is not None:
            joules = {"perplexity": total[0] / metrics["tokens"]}
    else:
        metrics = {**facts(model.shape)}
    if options.throughput:
        speed = throughput(
            model,
            options.batch_size,
            options.prefill_tokens,
            options.decode_tokens,
            options.repeats,
            cfg.seed,
            meter,
        )
        if (more := speed.pop("joules_per_token", None)) is not None:
            joules = {**(joules or {}), **more}
        metrics["throughput"] = speed
    if meter is not None:
        metrics["energy"] = meter.report(joules)
    return metrics


def _check_throughput(options: Evaluate, shape: ModelShape, grid: Grid) -> None:
    for name in ("batch_size", "prefill_tokens", "decode_tokens", "repeats"):
        if getattr(options, name) < 1:
            raise MinitronError(f"evaluate.{name}: expected at least 1, found {getattr(options, name)}")
    length = options.prefill_tokens + options.decode_tokens
    shape.check_window(length, "evaluate.prefill_tokens + evaluate.decode_tokens")
    if length > shape.max_position_embeddings:
        raise MinitronError(
            f"evaluate.prefill_tokens + evaluate.decode_tokens ({length}) is longer than the checkpoint's "
            f"max_position_embeddings={shape.max_position_embeddings}"
        )
    if grid.sequence_parallel:
        raise MinitronError(
            "evaluate.throughput: decoding runs one token at a time, which model.sequence_parallel cannot divide; "
            "set model.sequence_parallel=false"
        )


def _check_harness(cfg: EvaluateConfig) -> Tasks:
    options = cfg.evaluate.lm_eval
    if options.log_samples and not cfg.output_path:
        raise MinitronError("evaluate.lm_eval.log_samples: the items are written beside output_path, which is missing")
    if runtime.world_size() > 1:
        raise MinitronError(
            f"evaluate.lm_eval: the harness runs in one process, found {runtime.world_size()}; run it by itself with "
            "trainer.devices=1 evaluate.perplexity=false"
        )
    return find_tasks(options.tasks, options.include_path)


def _harness(cfg: EvaluateConfig, source: Path, tasks: Tasks) -> Metrics:
    """lm-eval's tasks on ``source``, a ``.nemo`` as the HF folder that ``minitron convert`` makes of it."""
    options, output = cfg.evaluate.lm_eval, Path(cfg.output_path)
    with ExitStack() as stack:
        folder = source
        if not (source / "config.json").is_file():
            folder = stack.enter_context(exported(source, output))
        summary, items = run_tasks(folder, tasks, options, Machines.of(cfg.trainer).precision, cfg.seed)
    if options.log_samples:
        lines = "".join(json.dumps(item) + "\n" for item in items)
        write_file(output.with_name(f"{output.stem}.samples.jsonl"), lines)
    return summary


def lines_of(metrics: Metrics) -> list[str]:
    """One line of the model's own numbers, one for each section, and one for each task."""
    rows: dict[str, dict[str, Any]] = {"": {k: v for k, v in metrics.items() if not isinstance(v, dict)}}
    for name in ("throughput", "energy"):
        if name in metrics:
            rows[f"{name}: "] = metrics[name].get("joules_per_token") or metrics[name]
    for task, values in metrics.get("lm_eval", {}).get("tasks", {}).items():
        rows[f"{task}: "] = values
    return [
        start + "  ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        for start, values in rows.items()
    ]
