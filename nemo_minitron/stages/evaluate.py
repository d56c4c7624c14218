"""``minitron evaluate``: held-out loss, perplexity, size, speed and memory of a ``.nemo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_minitron.errors import MinitronError, required


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate ``model.restore_from_path`` on ``evaluate.data_prefix``; write and return its metrics.

    Raises:
        MinitronError: before any weight is read: missing files, unwritable output, tokens that the model does not have,
            a grid that does not fit; later: tokens of another vocabulary, or a loss that is not finite.
    """
    from nemo_minitron import runtime
    from nemo_minitron.checkpoint import NemoReader
    from nemo_minitron.checkpoint.staging import Staging
    from nemo_minitron.data.blocks import token_blocks
    from nemo_minitron.evaluate import evaluate
    from nemo_minitron.nemo.restore import load_model
    from nemo_minitron.nemo.trainer import inference_trainer
    from nemo_minitron.nemo.training import check_tokens

    source, prefix = required(cfg, "model.restore_from_path"), required(cfg, "evaluate.data_prefix")
    options = cfg.evaluate
    if cfg.get("output_path") and runtime.rank() == 0:
        Staging(cfg.output_path).abort()  # proves that it can be written, before the work
    with NemoReader(source) as reader:
        length = int(options.get("seq_length") or reader.config["encoder_seq_length"])
        blocks = token_blocks(
            Path(prefix),
            length,
            num_samples=options.get("num_samples"),
            seed=int(cfg.get("seed", 1234)),
            vocab_size=reader.shape.vocab_size,
        )
    precision, devices, nodes = (
        cfg.trainer.get(k, v) for k, v in (("precision", 32), ("devices", 1), ("num_nodes", 1))
    )
    trainer = inference_trainer(precision, devices, nodes)
    model = load_model(source, trainer, {**cfg.model, "precision": precision, "encoder_seq_length": length})
    check_tokens(model, [str(prefix)], "evaluate.data_prefix")
    metrics = evaluate(model, blocks, micro_batch_size=int(options.get("micro_batch_size", 1)))
    import torch

    if torch.distributed.get_rank() == 0:
        print("  ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in metrics.items()))
        if cfg.get("output_path"):
            write_json(Path(cfg.output_path), metrics)
    return metrics


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON beside its destination and rename."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        raise MinitronError(f"output_path {path} cannot be written: {error.strerror}") from error
