"""Documents to tokens, by any number of processes, in the order in which they come."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import NamedTuple

from nemo_minitron.data.chat import NoTemplate
from nemo_minitron.data.messages import BadMessages, Conversation
from nemo_minitron.data.readers import Row, Text, not_unicode
from nemo_minitron.data.tokenizer import TextTokenizer, TokenizerSpec
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import one_line
from nemo_minitron.jobs import lifeline

BATCH_CHARACTERS = 1 << 18
BATCH_DOCUMENTS = 256


class Tokens(NamedTuple):
    """One document in tokens.

    Attributes:
        ids: with the end-of-text token, where one is to be appended; none for blank text.
        counts: of a conversation, per token 1 where a loss counts it, else 0; None of text, all of which counts.
        chat: whether it was a conversation.
    """

    ids: list[int]
    counts: list[int] | None = None
    chat: bool = False


class Encoded(NamedTuple):
    """One record.

    Attributes:
        documents: one per key, in their order; none where there is a fault.
        done: as :class:`Row` has it.
        where: names the record.
        fault: which record cannot be taken and why, or None.
    """

    documents: list[Tokens]
    done: float
    where: str
    fault: str | None = None


@dataclass(frozen=True)
class Rules:
    """How documents become tokens; small and picklable.

    Attributes:
        append_eod: whether each ends with the end-of-text token.
        responses: whether of a conversation only what the assistant says counts.
        apply_ftfy: whether broken unicode is repaired first.
    """

    append_eod: bool
    responses: bool
    apply_ftfy: bool


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
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
    if stopped:
        raise stopped


def encode_all(
    documents: Iterable[Row], tokenizer: TextTokenizer, spec: TokenizerSpec, workers: int, rules: Rules, stop: bool
) -> Generator[Encoded, None, None]:
    """Tokens of every record in order; at most a few batches per worker are in flight.

    Args:
        tokenizer: what ``spec`` loads. stop: whether a record that cannot be taken is the last one to be read.

    Raises:
        MinitronError: what the reader raises; a worker that died; conversations without a chat template.
    """
    batches = _batches(documents, stop)
    if workers == 1:
        for group in batches:
            yield from _encode(group, tokenizer, rules)
        return
    # Not forked from this process: it may hold threads (tokenizers, torch) that a fork would deadlock. The fork server
    # has none, and pays the slow import once for all workers.
    context = lifeline.fork_server([__name__, "transformers.models.auto.tokenization_auto"])
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(spec, rules))
    waiting: deque[Future[list[Encoded]]] = deque()
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


def _encode(batch: list[Row], tokenizer: TextTokenizer, rules: Rules) -> list[Encoded]:
    """Tokens of every record, one by one where something is wrong with one of them."""
    try:
        return _encode_together(batch, tokenizer, rules)
    except (MemoryError, NoTemplate):
        raise
    except Exception as error:  # whatever a tokenizer makes of odd text is a fault of that record alone
        if len(batch) > 1:
            return [item for row in batch for item in _encode([row], tokenizer, rules)]
        said = error if isinstance(error, _Bad | BadMessages) else f"cannot be tokenized: {one_line(error)}"
        return [Encoded([], batch[0].done, batch[0].where, f"{batch[0].where}: {said}")]


class _Bad(Exception):
    """What is wrong with the text of one record."""


def _encode_together(batch: list[Row], tokenizer: TextTokenizer, rules: Rules) -> list[Encoded]:
    flat = [_repaired(text, rules.apply_ftfy) for row in batch for text in row.texts]
    # Blank text is no document of its key, whatever a tokenizer would make of its spaces.
    texts = [text for text in flat if isinstance(text, str) and text.strip()]
    ids = iter(tokenizer.encode(texts))
    eod = tokenizer.eod if rules.append_eod else None
    end = [] if eod is None else [eod]

    def tokens(text: Text) -> Tokens:
        if isinstance(text, Conversation):
            said = tokenizer.chat.encode(text.messages, eod, rules.responses)
            return Tokens(said.ids, said.counts if rules.responses else None, chat=True)
        return Tokens(next(ids) + end) if text.strip() else Tokens([])

    every = iter([tokens(text) for text in flat])
    return [
        Encoded([], row.done, row.where, f"{row.where}: {row.fault}")
        if row.fault
        else Encoded([next(every) for _ in row.texts], row.done, row.where)
        for row in batch
    ]


def _repaired(text: Text, apply_ftfy: bool) -> Text:
    """A text that is Unicode, of a conversation each of its messages' contents."""
    if isinstance(text, Conversation):
        whole = [{**one, "content": str(_repaired(one["content"], apply_ftfy))} for one in text.messages]
        return Conversation(whole)
    if apply_ftfy:
        import ftfy

        text = ftfy.fix_text(text)
    if said := not_unicode(text):
        raise _Bad(said)
    return text


_worker: tuple[TextTokenizer, Rules] | None = None


def _start_worker(spec: TokenizerSpec, rules: Rules) -> None:
    global _worker
    lifeline.hold()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = (spec.load(), rules)


def _encode_in_worker(batch: list[Row]) -> list[Encoded]:
    if _worker is None:
        raise RuntimeError("the worker's initializer did not run")
    return _encode(batch, *_worker)
