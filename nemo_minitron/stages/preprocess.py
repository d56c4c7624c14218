"""``minitron preprocess``: text to token files."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.config.schema import PreprocessConfig
from nemo_minitron.errors import required


def run(cfg: PreprocessConfig) -> list[Path]:
    """Tokenize ``input`` into ``<output_prefix>_<key>_document.bin/.idx`` and say in one line what was written."""
    from nemo_minitron.data.preprocess import preprocess, read_facts
    from nemo_minitron.data.sources import Source

    source = Source(
        cfg.input or None,
        name=cfg.dataset.name or None,
        config=cfg.dataset.config or None,
        split=cfg.dataset.split or "train",
        document=cfg.document,
        heldout_every=cfg.heldout_every,
        heldout_part=cfg.heldout_part,
    )
    prefixes = preprocess(
        source,
        required(cfg, "output_prefix"),
        tokenizer_library=cfg.tokenizer.library,
        tokenizer_type=cfg.tokenizer.type or None,
        tokenizer_model=cfg.tokenizer.model or None,
        json_keys=cfg.json_keys,
        append_eod=cfg.append_eod,
        workers=cfg.workers,
        apply_ftfy=cfg.apply_ftfy,
        split_special_tokens=cfg.tokenizer.split_special_tokens,
        on_bad_record=cfg.on_bad_record,
        loss_on=cfg.chat.loss_on,
        progress=True,
    )
    for prefix in prefixes:
        facts = read_facts(prefix)
        size = sum(Path(f"{prefix}{suffix}").stat().st_size for suffix in (".bin", ".idx"))
        print(f"{facts['documents']} documents, {facts['tokens']} tokens, {size} bytes -> {prefix}.bin/.idx")
        if "mask" in facts:
            mask, counted = prefix.with_name(facts["mask"]["name"]), facts["mask"]["counted"]
            share = counted / facts["tokens"]
            print(f"{counted} tokens ({share:.1%}) are the assistant's and count in a loss -> {mask}.bin/.idx")
    skipped = read_facts(prefixes[0]).get("skipped")
    if skipped:
        first = f", the first: {skipped['first']}" if skipped["records"] else ""
        print(f"{skipped['records']} bad records skipped (on_bad_record=skip){first}")
    return prefixes
