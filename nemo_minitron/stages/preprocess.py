"""``minitron preprocess``: text to token files."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_minitron.errors import MinitronError


def run(cfg: DictConfig) -> list[Path]:
    """Tokenize ``input`` into ``<output_prefix>_<key>_document.bin/.idx`` and say in one line what was written.

    Keys: ``input``, ``output_prefix``, ``json_keys``, ``on_bad_record`` (stop or skip),
    ``tokenizer.{library,type,model,split_special_tokens}``, ``dataset.{name,config,split}``, ``document`` (article,
    line or file), ``append_eod``, ``heldout_every``, ``heldout_part`` (train or heldout), ``workers``, ``apply_ftfy``.
    """
    from nemo_minitron.data.preprocess import preprocess, read_facts
    from nemo_minitron.data.sources import Source

    output_prefix = _text(cfg, "output_prefix")
    if output_prefix is None:
        raise MinitronError("output_prefix is required: expected a prefix such as data/train, found nothing")
    source = Source(
        _text(cfg, "input"),
        name=_text(cfg, "dataset.name"),
        config=_text(cfg, "dataset.config"),
        split=_text(cfg, "dataset.split") or "train",
        document=_text(cfg, "document") or "article",
        heldout_every=cfg.get("heldout_every"),
        heldout_part=_text(cfg, "heldout_part") or "train",
    )
    keys = cfg.get("json_keys") or ["text"]
    prefixes = preprocess(
        source,
        output_prefix,
        tokenizer_library=_text(cfg, "tokenizer.library") or "huggingface",
        tokenizer_type=_text(cfg, "tokenizer.type"),
        tokenizer_model=_text(cfg, "tokenizer.model"),
        json_keys=[keys] if isinstance(keys, str) else list(keys),
        append_eod=bool(cfg.get("append_eod", True)),
        workers=cfg.get("workers", 1),
        apply_ftfy=bool(cfg.get("apply_ftfy", False)),
        split_special_tokens=bool(OmegaConf.select(cfg, "tokenizer.split_special_tokens", default=False)),
        on_bad_record=_text(cfg, "on_bad_record") or "stop",
        progress=True,
    )
    for prefix in prefixes:
        facts = read_facts(prefix)
        size = sum(Path(f"{prefix}{suffix}").stat().st_size for suffix in (".bin", ".idx"))
        print(f"{facts['documents']} documents, {facts['tokens']} tokens, {size} bytes -> {prefix}.bin/.idx")
    skipped = read_facts(prefixes[0]).get("skipped")
    if skipped:
        first = f", the first: {skipped['first']}" if skipped["records"] else ""
        print(f"{skipped['records']} bad records skipped (on_bad_record=skip){first}")
    return prefixes


def _text(cfg: DictConfig, key: str) -> str | None:
    """A value as text; None where it is absent, null, empty or still ``???``."""
    found = OmegaConf.select(cfg, key, throw_on_missing=False)
    return None if found is None or found == "" else str(found)
