"""A model's tokenizer, and what the model can take of it."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoint.formats import Reader
from nemo_minitron.checkpoint.tokenizer_open import foreign, load_hf
from nemo_minitron.config.schema import GenerateConfig
from nemo_minitron.convert.tokenizer import loadable, tokenizer_for
from nemo_minitron.data.chat import ChatTemplate
from nemo_minitron.data.messages import BadMessages, Messages
from nemo_minitron.errors import MinitronError
from nemo_minitron.generate.request import Prompt


@dataclass(frozen=True)
class Words:
    """A model's tokenizer, and what the model can take of it.

    Attributes:
        source: the checkpoint, in messages.
        tokenizer: transformers'.
        positions, rows: of the model: most tokens of a sequence, and tokens that its table has.
        add_bos: whether a text begins with the BOS token; as the tokenizer does when None.
        room: most tokens of an answer.
    """

    source: Path
    tokenizer: Any
    positions: int
    rows: int
    add_bos: bool | None
    room: int

    @classmethod
    def of(cls, reader: Reader, cfg: GenerateConfig) -> Words:
        """The words of a checkpoint that is open.

        Raises:
            MinitronError: no tokenizer, or none that transformers loads.
        """
        source, shape, options = reader.path, reader.shape, cfg.inference
        with ExitStack() as stack:
            folder, _, reason = tokenizer_for(reader, dataclasses.asdict(cfg.tokenizer), stack)
            if (folder := loadable(folder)) is None:
                raise MinitronError(
                    f"model.restore_from_path: {reason}, and text needs one; tokenizer.type=... gives one"
                )
            tokenizer = load_hf(folder, f"{source}: tokenizer")
        if options.add_BOS and tokenizer.bos_token_id is None:
            raise MinitronError(f"inference.add_BOS: expected a BOS token in the tokenizer of {source}, found none")
        room = options.tokens_to_generate
        return cls(source, tokenizer, shape.max_position_embeddings, shape.vocab_size, options.add_BOS, room)

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, of which there is at least one and which leave a position for an answer.

        Raises:
            MinitronError: there is none, or there are more; no chat template, or one that refuses these messages.
        """
        ids = self.ids(prompt)
        if not ids:
            raise MinitronError(f"{prompt.where}: expected a text of at least one token, found {prompt.said!r:.80}")
        if max(ids) >= self.rows:
            raise MinitronError(
                f"{prompt.where}: expected tokens below {self.rows}, the rows of the table in {self.source}, found "
                f"{max(ids)}: its tokenizer is of another model"
            )
        if len(ids) >= self.positions:
            raise MinitronError(
                f"{prompt.where}: expected less than {self.positions} tokens, the positions of {self.source}, found "
                f"{len(ids)}"
            )
        return ids

    def ids(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, however many."""
        if not isinstance(prompt.said, str):
            return self._of_messages(prompt.said, prompt.where)
        with foreign(f"{prompt.where}: expected a text that the tokenizer of {self.source} can take"):
            if self.add_bos is None:
                return list(self.tokenizer(prompt.said, verbose=False)["input_ids"])
            ids = list(self.tokenizer(prompt.said, add_special_tokens=False, verbose=False)["input_ids"])
        return [self.tokenizer.bos_token_id, *ids] if self.add_bos else ids

    def _of_messages(self, messages: Messages, where: str) -> list[int]:
        if not self.tokenizer.chat_template:
            raise MinitronError(
                f"{where}: expected a chat template in the tokenizer of {self.source}, found none; prompt=... goes on "
                "with a text without one"
            )
        if self.add_bos is not None:
            raise MinitronError(
                f"{where}: inference.add_BOS is of texts; a conversation begins as its chat template says"
            )
        try:
            return ChatTemplate(self.tokenizer, str(self.source)).prompt_ids(messages)
        except BadMessages as error:
            raise MinitronError(f"{where}: {error}") from None
