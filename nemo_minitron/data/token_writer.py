"""The files of one key while they are written: tokens, which of them count, and the facts beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.data.encode import Tokens
from nemo_minitron.data.masks import mask_prefix
from nemo_minitron.data.tokenizer import TextTokenizer
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import Staging


class TokenWriter:
    """Writes the documents of one key, all of them text or all of them conversations.

    The files appear together at the end of :meth:`at`'s context, beside their destinations until then: first those of
    the mask, where there is one, then tokens and index, and last the facts that say what belongs together.
    """

    def __init__(self, prefix: Path, tokenizer: TextTokenizer, append_eod: bool, stack: ExitStack) -> None:
        from megatron.core.datasets.indexed_dataset import DType

        self._prefix, self._tokenizer, self._append_eod, self._stack = prefix, tokenizer, append_eod, stack
        self._facts = stack.enter_context(Staging(f"{prefix}.json"))
        self._dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self._tokens = _Indexed(prefix, self._dtype, stack)
        self._mask: _Indexed | None = None
        self._chat: bool | None = None
        self.documents = self.tokens = self.counted = 0

    @classmethod
    @contextmanager
    def at(cls, prefix: Path, tokenizer: TextTokenizer, append_eod: bool) -> Iterator[TokenWriter]:
        """The outputs of ``prefix``."""
        with ExitStack() as stack:
            writer = cls(prefix, tokenizer, append_eod, stack)
            yield writer
        if writer._mask is None:  # of an earlier run, which the facts no longer name
            for suffix in (".bin", ".idx"):
                Path(f"{mask_prefix(prefix)}{suffix}").unlink(missing_ok=True)

    def complaint(self, document: Tokens) -> str | None:
        """Why a document does not go with those before it; None where it does."""
        if not document.ids or self._chat in (None, document.chat):
            return None
        kinds = ("text", "messages") if document.chat else ("messages", "text")
        return "expected {} as in the records before, found {}".format(*kinds)

    def add(self, document: Tokens) -> None:
        """Write a document; one without tokens is none."""
        ids, counts = document.ids, document.counts
        if not ids:
            return
        if self._chat is None:
            self._chat = document.chat
            if counts is not None:
                self._mask = _Indexed(mask_prefix(self._prefix), np.uint8, self._stack)
        self._tokens.add(ids)
        if self._mask is not None and counts is not None:
            self._mask.add(counts)
            self.counted += sum(counts)
        self.documents += 1
        self.tokens += len(ids)

    def finish(self, facts: dict[str, Any]) -> None:
        """Complete the files.

        Args:
            facts: what else is said beside them: ``key``, ``source`` and the like.

        Raises:
            MinitronError: there is no document.
        """
        if not self.documents:
            skipped = facts.get("skipped", {"records": 0})
            said = (
                f" ({skipped['records']} records are bad, the first: {skipped['first']})" if skipped["records"] else ""
            )
            raise MinitronError(f"input: no document has text under key '{facts['key']}'; nothing to write{said}")
        self._tokens.finish()
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
        if self._chat:
            record["chat"] = {
                "loss_on": "all" if self._mask is None else "responses",
                "template": self._tokenizer.chat.fingerprint,
            }
        if self._mask is not None:
            self._mask.finish()
            record["mask"] = {"name": mask_prefix(self._prefix).name, "counted": self.counted}
        self._facts.path.write_text(json.dumps(record | facts, indent=2) + "\n", encoding="utf-8")


class _Indexed:
    """A ``.bin`` and its ``.idx``, a sequence per document; of both, the ``.bin`` appears first."""

    def __init__(self, prefix: Path, dtype: Any, stack: ExitStack) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._dtype = dtype
        self._index = stack.enter_context(Staging(f"{prefix}.idx")).path
        data = stack.enter_context(Staging(f"{prefix}.bin"))
        self._builder = IndexedDatasetBuilder(str(data.path), dtype=dtype)
        stack.enter_context(closing(self._builder.data_file))

    def add(self, values: list[int]) -> None:
        self._builder.add_document(np.asarray(values, dtype=self._dtype), [len(values)])

    def finish(self) -> None:
        self._builder.finalize(str(self._index))
