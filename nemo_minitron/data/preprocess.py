"""Text to the ``.bin/.idx`` that Megatron's IndexedDataset and NeMo read, by any number of processes."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nemo_minitron.config.schema import PreprocessConfig
from nemo_minitron.config.sections import ON_BAD_RECORD, Tokenizer
from nemo_minitron.data.readers import Row, not_unicode
from nemo_minitron.data.sources import Source
from nemo_minitron.data.tokenizer import TextTokenizer, TokenizerSpec
from nemo_minitron.errors import MinitronError, check_choice
from nemo_minitron.files.text import one_line, read_json
from nemo_minitron.jobs import lifeline
from nemo_minitron.jobs.line import OTHER, RATE, Part
from nemo_minitron.jobs.progress import progress_bar

_BATCH_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 256
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
    progress: bool = False,
) -> list[Path]:
    """Tokenize documents into ``<output_prefix>_<key>_document.bin`` and ``.idx``, with ``.json`` facts beside them.

    The format, the file names and the rules are those of NeMo's ``preprocess_data_for_megatron.py``: uint16 tokens
    for a vocabulary under 65500 and int32 otherwise, no BOS, the EOS id after each document with ``append_eod``, no
    document for blank text. Bytes do not depend on ``workers``. Existing outputs are replaced; on any failure they
    stay as they were.

    Args:
        input: a path or name with :class:`Source`'s defaults, or a full :class:`Source`.
        tokenizer_library, tokenizer_type, tokenizer_model: see :class:`TokenizerSpec`.
        json_keys: fields of a record (or columns) to tokenize, each into files of its own.
        workers: tokenizing processes; 1 tokenizes in this one.
        apply_ftfy: repair broken unicode first.
        split_special_tokens: see :class:`TokenizerSpec`.
        on_bad_record: ``stop`` at a record that cannot be read or tokenized, or ``skip`` it; the facts count them.
        progress: a bar with the remaining time on stderr.

    Returns:
        The prefixes written, one per key, as ``model.data.data_prefix`` takes them.

    Raises:
        MinitronError: anything wrong with the input, the tokenizer or the destination.
    """
    check_choice("on_bad_record", on_bad_record, ON_BAD_RECORD)
    stop = on_bad_record == "stop"
    source = input if isinstance(input, Source) else Source(str(input))
    keys = _check_keys(json_keys)
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise MinitronError(f"workers must be a positive integer, found {workers!r}")
    if not Path(output_prefix).name or str(output_prefix).endswith(os.sep):
        raise MinitronError(f"output_prefix must end in a name, such as data/train, found '{output_prefix}'")
    spec = TokenizerSpec(tokenizer_library, tokenizer_type, tokenizer_model, split_special_tokens)
    tokenizer = _load(spec, append_eod)
    prefixes = [Path(f"{output_prefix}_{key}_document") for key in keys]
    try:
        with closing(source.records(keys)) as documents, ExitStack() as stack:
            outputs = [stack.enter_context(_Output.at(prefix, tokenizer, append_eod)) for prefix in prefixes]
            encoded = stack.enter_context(closing(_encode_all(documents, tokenizer, spec, workers, apply_ftfy, stop)))
            shown = stack.enter_context(closing(_with_progress(encoded, progress)))
            skipped = _add_all(outputs, shown, stop)
            for output, key in zip(outputs, keys, strict=True):
                output.finish({"source": source.facts(), "key": key} | skipped)
    except OSError as error:
        raise MinitronError(f"output_prefix: '{output_prefix}' cannot be written: {error}") from error
    return prefixes


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
    ``documents``, ``tokens``, ``key``, ``source``; with ``on_bad_record=skip`` also ``skipped`` (``records``, and what
    was wrong with the ``first``).

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


def _add_all(outputs: Sequence[_Output], encoded: Iterable[_Encoded], stop: bool) -> dict[str, Any]:
    """Give each output its documents; how many records were left out and why the first, where they do not stop all.

    Raises:
        MinitronError: a record cannot be taken, and ``stop`` says that this ends the work.
    """
    skipped, first = 0, ""
    for item in encoded:
        if item.fault and stop:
            raise MinitronError(f"{item.fault}; on_bad_record=skip leaves such records out")
        if item.fault:
            skipped, first = skipped + 1, first or item.fault
            continue
        for output, ids in zip(outputs, item.ids, strict=True):
            output.add(ids)
    return {} if stop else {"skipped": {"records": skipped, "first": first}}


class _Encoded(NamedTuple):
    ids: list[list[int]]
    """Token ids of one document, one list per key."""
    done: float
    fault: str | None = None
    """Which record cannot be taken and why, or None."""


class _Output:
    """The three files of one key, until the end of their context beside their destinations."""

    def __init__(self, tokenizer: TextTokenizer, append_eod: bool, tokens: Path, index: Path, facts: Path) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self._tokenizer, self._append_eod, self._index, self._facts = tokenizer, append_eod, index, facts
        self._dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self._builder = IndexedDatasetBuilder(str(tokens), dtype=self._dtype)
        self.documents = self.tokens = 0

    @classmethod
    @contextmanager
    def at(cls, prefix: Path, tokenizer: TextTokenizer, append_eod: bool) -> Iterator[_Output]:
        """The outputs of ``prefix``, committed in the order of tokens, index and facts."""
        from nemo_minitron.files.staging import Staging

        with (
            Staging(f"{prefix}.json") as facts,
            Staging(f"{prefix}.idx") as index,
            Staging(f"{prefix}.bin") as tokens,
        ):
            output = cls(tokenizer, append_eod, tokens.path, index.path, facts.path)
            with closing(output._builder.data_file):
                yield output

    def add(self, ids: list[int]) -> None:
        if not ids:
            return
        if self._append_eod:
            ids = [*ids, self._tokenizer.eod]  # type: ignore[list-item]
        self._builder.add_document(np.asarray(ids, dtype=self._dtype), [len(ids)])
        self.documents += 1
        self.tokens += len(ids)

    def finish(self, facts: dict[str, Any]) -> None:
        if not self.documents:
            skipped = facts.get("skipped", {"records": 0})
            said = (
                f" ({skipped['records']} records are bad, the first: {skipped['first']})" if skipped["records"] else ""
            )
            raise MinitronError(f"input: no document has text under key '{facts['key']}'; nothing to write{said}")
        self._builder.finalize(str(self._index))
        record: dict[str, Any] = {
            "format": 1,
            "tokenizer": {
                "library": self._tokenizer.library,
                "fingerprint": self._tokenizer.fingerprint,
                "vocab_size": self._tokenizer.vocab_size,
                "eod": self._tokenizer.eod,
            },
            "append_eod": self._append_eod,
            "dtype": np.dtype(self._dtype).name,
            "documents": self.documents,
            "tokens": self.tokens,
        }
        if self._tokenizer.splits_special_tokens:
            record["tokenizer"]["split_special_tokens"] = True
        self._facts.write_text(json.dumps(record | facts, indent=2) + "\n", encoding="utf-8")


def _check_keys(json_keys: Sequence[str]) -> tuple[str, ...]:
    keys = (json_keys,) if isinstance(json_keys, str) else tuple(str(key) for key in json_keys)
    if not keys or len(set(keys)) != len(keys):
        raise MinitronError(f"json_keys must be at least one name, none twice, found {list(keys)}")
    for key in keys:
        if "/" in key or not key:
            raise MinitronError(f"json_keys: '{key}' cannot be part of a file name")
    return keys


def _batches(documents: Iterable[Row], stop: bool) -> Iterator[list[Row]]:
    """Groups large enough that handing them to a process costs little, the same ones for any number of workers.

    Where a record that cannot be taken stops all, it is the last one that is read. What stops the reader is raised
    after the records before it, so that the first fault is the one that is told.
    """
    batch: list[Row] = []
    characters = 0
    stopped: MinitronError | None = None
    rows = iter(documents)
    while True:
        try:
            row = next(rows, None)
        except MinitronError as error:
            row, stopped = None, error
        if row is None:
            break
        batch.append(row)
        if row.fault and stop:
            break
        characters += sum(map(len, row.texts))
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
    if stopped:
        raise stopped


def _encode_all(
    documents: Iterable[Row], tokenizer: TextTokenizer, spec: TokenizerSpec, workers: int, apply_ftfy: bool, stop: bool
) -> Generator[_Encoded, None, None]:
    """Token ids of every document in order; at most a few batches per worker are in flight."""
    batches = _batches(documents, stop)
    if workers == 1:
        for group in batches:
            yield from _encode(group, tokenizer, apply_ftfy)
        return
    # Not forked from this process: it may hold threads (tokenizers, torch) that a fork would deadlock. The fork server
    # has none, and pays the slow import once for all workers.
    context = lifeline.fork_server([__name__, "transformers.models.auto.tokenization_auto"])
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(spec, apply_ftfy))
    waiting: deque[Future[list[_Encoded]]] = deque()
    try:
        stopped: MinitronError | None = None
        while True:
            batch: list[Row] | None
            try:
                batch = next(batches, None)
            except MinitronError as error:  # told after what the batches before it hold, as with one process
                batch, stopped = None, error
            if batch is None:
                break
            waiting.append(pool.submit(_encode_in_worker, batch))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
        if stopped:
            raise stopped
    except BrokenProcessPool:
        raise MinitronError(
            f"workers={workers}: a tokenizing process ended abruptly (out of memory, or a script that calls this "
            'without `if __name__ == "__main__":`); try workers=1'
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode(batch: list[Row], tokenizer: TextTokenizer, apply_ftfy: bool) -> list[_Encoded]:
    """Token ids of every record, one by one where something is wrong with one of them."""
    try:
        return _encode_together(batch, tokenizer, apply_ftfy)
    except MemoryError:
        raise
    except Exception as error:  # whatever a tokenizer makes of odd text is a fault of that record alone
        if len(batch) > 1:
            return [item for row in batch for item in _encode([row], tokenizer, apply_ftfy)]
        said = error if isinstance(error, _Bad) else f"cannot be tokenized: {one_line(error)}"
        return [_Encoded([], batch[0].done, f"{batch[0].where}: {said}")]


class _Bad(Exception):
    """What is wrong with the text of one record."""


def _encode_together(batch: list[Row], tokenizer: TextTokenizer, apply_ftfy: bool) -> list[_Encoded]:
    flat = [text for row in batch for text in row.texts]
    if apply_ftfy:
        import ftfy

        flat = [ftfy.fix_text(text) for text in flat]
    for text in flat:
        if said := not_unicode(text):
            raise _Bad(said)
    # Blank text is no document of its key, whatever a tokenizer would make of its spaces.
    ids = iter(tokenizer.encode([text for text in flat if text.strip()]))
    every = iter([next(ids) if text.strip() else [] for text in flat])
    return [
        _Encoded([], row.done, f"{row.where}: {row.fault}")
        if row.fault
        else _Encoded([next(every) for _ in row.texts], row.done)
        for row in batch
    ]


_worker: tuple[TextTokenizer, bool] | None = None


def _start_worker(spec: TokenizerSpec, apply_ftfy: bool) -> None:
    global _worker
    lifeline.hold()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = (spec.load(), apply_ftfy)


def _encode_in_worker(batch: list[Row]) -> list[_Encoded]:
    if _worker is None:
        raise RuntimeError("the worker's initializer did not run")
    return _encode(batch, *_worker)


def _with_progress(encoded: Iterator[_Encoded], show: bool) -> Generator[_Encoded, None, None]:
    """Pass documents through a bar over the fraction of the input read, which gives its remaining time."""
    documents = tokens = 0
    with progress_bar(1.0, "preprocess", "", show=show) as bar:
        for item in encoded:
            yield item
            documents += 1
            tokens += sum(map(len, item.ids))
            bar.figures = [Part(f"{documents:,} documents", OTHER), Part(f"{tokens:,} tokens", RATE)]
            bar.update(item.done - bar.done)
        bar.update(1.0 - bar.done)
