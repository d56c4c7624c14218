"""Text to the ``.bin/.idx`` that Megatron's IndexedDataset and NeMo read, by any number of processes."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.config.schema import PreprocessConfig
from nemo_minitron.config.sections import LOSS_ON, ON_BAD_RECORD, Chat, Tokenizer
from nemo_minitron.data.encode import Encoded, Rules, encode_all
from nemo_minitron.data.sources import Source
from nemo_minitron.data.token_writer import TokenWriter
from nemo_minitron.data.tokenizer import TextTokenizer, TokenizerSpec
from nemo_minitron.errors import MinitronError, check_choice
from nemo_minitron.files.text import read_json
from nemo_minitron.jobs.line import OTHER, RATE, Part
from nemo_minitron.jobs.progress import progress_bar

_MOST_FACTS = 1 << 20


def preprocess(
    input: str | Path | Source,
    output_prefix: str | Path,
    *,
    tokenizer_library: str = Tokenizer.library,
    tokenizer_type: str | None = None,
    tokenizer_model: str | None = None,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = PreprocessConfig.append_eod,
    workers: int = PreprocessConfig.workers,
    apply_ftfy: bool = PreprocessConfig.apply_ftfy,
    split_special_tokens: bool = Tokenizer.split_special_tokens,
    on_bad_record: str = PreprocessConfig.on_bad_record,
    loss_on: str = Chat.loss_on,
    progress: bool = False,
) -> list[Path]:
    """Tokenize documents into ``<output_prefix>_<key>_document.bin`` and ``.idx``, with ``.json`` facts beside them.

    The format, the file names and the rules are those of NeMo's ``preprocess_data_for_megatron.py``: uint16 tokens
    for a vocabulary under 65500 and int32 otherwise, no BOS, the EOS id after each document with ``append_eod``, no
    document for blank text. Bytes do not depend on ``workers``. Existing outputs are replaced; on any failure they
    stay as they were. Messages under a key are rendered with the tokenizer's own chat template; with
    ``loss_on=responses`` a second pair of files, ``<output_prefix>_<key>_mask.bin`` and ``.idx``, says which tokens
    count (:mod:`nemo_minitron.data.masks`).

    Args:
        input: a path or name with :class:`Source`'s defaults, or a full :class:`Source`.
        tokenizer_library, tokenizer_type, tokenizer_model, split_special_tokens: see :class:`TokenizerSpec`.
        json_keys: fields of a record (or columns) to tokenize, each into files of its own.
        workers: tokenizing processes; 1 tokenizes in this one.
        apply_ftfy: repair broken unicode first.
        on_bad_record: ``stop`` at a record that cannot be read or tokenized, or ``skip`` it; the facts count them.
        loss_on: of conversations, what a loss counts: ``responses`` of the assistant, or ``all`` tokens as of text.
        progress: a bar with the remaining time on stderr.

    Returns:
        The prefixes written, one per key, as ``model.data.data_prefix`` takes them.

    Raises:
        MinitronError: anything wrong with the input, the tokenizer or the destination; messages without a template.
    """
    stop = _check(on_bad_record, loss_on, workers, output_prefix)
    source = input if isinstance(input, Source) else Source(str(input))
    keys = _check_keys(json_keys)
    spec = TokenizerSpec(tokenizer_library, tokenizer_type, tokenizer_model, split_special_tokens)
    tokenizer = _load(spec, append_eod)
    rules = Rules(append_eod, loss_on == "responses", apply_ftfy)
    prefixes = [Path(f"{output_prefix}_{key}_document") for key in keys]
    try:
        with closing(source.records(keys)) as documents, ExitStack() as stack:
            outputs = [stack.enter_context(TokenWriter.at(prefix, tokenizer, append_eod)) for prefix in prefixes]
            encoded = stack.enter_context(closing(encode_all(documents, tokenizer, spec, workers, rules, stop)))
            shown = stack.enter_context(closing(_with_progress(encoded, progress)))
            skipped = _add_all(outputs, shown, stop)
            for output, key in zip(outputs, keys, strict=True):
                output.finish({"source": source.facts(), "key": key} | skipped)
    except OSError as error:
        raise MinitronError(f"output_prefix: '{output_prefix}' cannot be written: {error}") from error
    return prefixes


def _check(on_bad_record: str, loss_on: str, workers: int, output_prefix: str | Path) -> bool:
    """Whether a bad record stops the work, where all of these can be."""
    check_choice("on_bad_record", on_bad_record, ON_BAD_RECORD)
    check_choice("chat.loss_on", loss_on, LOSS_ON)
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise MinitronError(f"workers must be a positive integer, found {workers!r}")
    if not Path(output_prefix).name or str(output_prefix).endswith(os.sep):
        raise MinitronError(f"output_prefix must end in a name, such as data/train, found '{output_prefix}'")
    return on_bad_record == "stop"


def _load(spec: TokenizerSpec, append_eod: bool) -> TextTokenizer:
    """The tokenizer, which must have an EOS token where one is to be appended."""
    tokenizer = spec.load()
    if append_eod and tokenizer.eod is None:
        raise MinitronError(
            f"append_eod: the tokenizer '{spec.type or spec.model}' has no EOS token; "
            "set append_eod=false or give it one"
        )
    return tokenizer


def read_facts(prefix: str | Path) -> dict[str, Any]:
    """What :func:`preprocess` recorded beside ``<prefix>.bin``.

    Keys: ``format``, ``tokenizer`` (``library``, ``fingerprint``, ``vocab_size``, ``eod``), ``append_eod``, ``dtype``,
    ``documents``, ``tokens``, ``key``, ``source``; of conversations ``chat`` (``loss_on``, ``template``) and, where not
    all tokens count, ``mask`` (``name``, ``counted``); with ``on_bad_record=skip`` also ``skipped`` (``records``, and
    what was wrong with the ``first``).

    Raises:
        MinitronError: no record (the data was made by another tool), or one that does not belong to the ``.bin``.
    """
    path, data = Path(f"{prefix}.json"), Path(f"{prefix}.bin")
    for file in (path, data):
        if not file.is_file():
            raise MinitronError(f"{file}: not found; `minitron preprocess` writes it with the tokens")
    facts = read_json(path, _MOST_FACTS)
    try:
        expected, found = facts["tokens"] * np.dtype(facts["dtype"]).itemsize, data.stat().st_size
        for name, kind in (("fingerprint", str), ("vocab_size", int)):
            if type(facts["tokenizer"][name]) is not kind:
                raise TypeError(f"tokenizer.{name} is no {kind.__name__}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MinitronError(f"{path}: expected the record of `minitron preprocess`: {error!r:.200}") from None
    if expected != found:
        raise MinitronError(f"{path}: records {expected} bytes of tokens, but {data.name} has {found}: not its record")
    return facts


def _add_all(outputs: Sequence[TokenWriter], encoded: Iterable[Encoded], stop: bool) -> dict[str, Any]:
    """Give each output its documents; how many records were left out and why the first, where they do not stop all.

    Raises:
        MinitronError: a record cannot be taken, and ``stop`` says that this ends the work.
    """
    skipped, first = 0, ""
    for item in encoded:
        pairs = list(zip(outputs, item.documents, strict=False))
        fault = item.fault or next((f"{item.where}: {said}" for o, d in pairs if (said := o.complaint(d))), None)
        if fault and stop:
            raise MinitronError(f"{fault}; on_bad_record=skip leaves such records out")
        if fault:
            skipped, first = skipped + 1, first or fault
            continue
        for output, document in pairs:
            output.add(document)
    return {} if stop else {"skipped": {"records": skipped, "first": first}}


def _check_keys(json_keys: Sequence[str]) -> tuple[str, ...]:
    keys = (json_keys,) if isinstance(json_keys, str) else tuple(str(key) for key in json_keys)
    if not keys or len(set(keys)) != len(keys):
        raise MinitronError(f"json_keys must be at least one name, none twice, found {list(keys)}")
    for key in keys:
        if "/" in key or not key:
            raise MinitronError(f"json_keys: '{key}' cannot be part of a file name")
    return keys


def _with_progress(encoded: Iterator[Encoded], show: bool) -> Generator[Encoded, None, None]:
    """Pass documents through a bar over the fraction of the input read, which gives its remaining time."""
    documents = tokens = 0
    with progress_bar(1.0, "preprocess", "", show=show) as bar:
        for item in encoded:
            yield item
            documents += 1
            tokens += sum(len(document.ids) for document in item.documents)
            bar.figures = [Part(f"{documents:,} documents", OTHER), Part(f"{tokens:,} tokens", RATE)]
            bar.update(item.done - bar.done)
        bar.update(1.0 - bar.done)
