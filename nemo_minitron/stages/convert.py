"""``minitron convert``: a checkpoint of one format to another."""

from __future__ import annotations

import dataclasses

from nemo_minitron.config.schema import ConvertConfig


def run(cfg: ConvertConfig) -> None:
    """Convert ``input_name_or_path`` to ``output_path``; see :func:`nemo_minitron.convert.convert`."""
    from nemo_minitron.convert import convert

    written = convert(
        cfg.input_name_or_path,
        cfg.output_path,
        format=cfg.format,
        precision=cfg.precision,
        make_vocab_size_divisible_by=cfg.make_vocab_size_divisible_by,
        transformer_engine=cfg.transformer_engine,
        verify=cfg.verify,
        vocab=cfg.vocab,
        untie=cfg.untie,
        max_shard_size=cfg.max_shard_size,
        tokenizer=dataclasses.asdict(cfg.tokenizer),
        quantization=cfg.quantization,
        model=cfg.model,
    )
    print(f"wrote {written}")
