"""``minitron convert``: HF folder or GGUF → ``.nemo``, or ``.nemo`` → HF folder."""

from __future__ import annotations

from omegaconf import DictConfig


def run(cfg: DictConfig) -> None:
    """Convert ``input_name_or_path`` to ``output_path``; see :func:`nemo_minitron.convert.convert`."""
    from nemo_minitron.convert import convert

    written = convert(
        cfg.input_name_or_path,
        cfg.output_path,
        precision=cfg.get("precision"),
        make_vocab_size_divisible_by=cfg.get("make_vocab_size_divisible_by"),
        verify=bool(cfg.get("verify", False)),
        max_shard_size=cfg.get("max_shard_size") or "5GB",
        tokenizer=cfg.get("tokenizer"),
    )
    print(f"wrote {written}")
