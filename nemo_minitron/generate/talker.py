"""Answers of transformers' own model, with its key-value cache; a single one is streamed to stdout as it is made."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.utils import logging

from nemo_minitron import runtime
from nemo_minitron.checkpoint.formats import Reader
from nemo_minitron.checkpoint.hf_rope import older_reads
from nemo_minitron.checkpoint.tokenizer_open import foreign
from nemo_minitron.config.schema import GenerateConfig
from nemo_minitron.convert.temporary import exported
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.plain import plain
from nemo_minitron.generate.batch import Draw, Room, padded
from nemo_minitron.generate.words import Words


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        answer: the text, without special tokens.
        tokens: how many were made, the one that ended it included.
        finish_reason: ``stop`` where the model ended it, ``length`` where there was no room for more.
    """

    answer: str
    tokens: int
    finish_reason: str


class Talker:
    """A model that answers.

    Prompts are numbered as they come. What is drawn for one follows from the seed and its number.

    Args:
        model: transformers', on its device.
        cfg: how tokens are chosen.
    """

    def __init__(self, words: Words, model: Any, cfg: GenerateConfig) -> None:
        self._words, self._model, self._options, self._seed = words, model, cfg.inference, cfg.seed
        self._numbers = itertools.count()
        theirs = model.generation_config.eos_token_id
        ends = [*(theirs if isinstance(theirs, list) else [theirs]), words.tokenizer.eos_token_id]
        self._ends = sorted({end for end in ends if end is not None})

    def answer(self, ids: list[int]) -> Answer:
        """Go on after ``ids``, and write the text to stdout as it comes."""
        streamer = _Stdout(self._words.tokenizer, skip_prompt=True, skip_special_tokens=True)
        (new,) = self.tokens([ids], streamer)
        return self._answer(new)

    def answers(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """Go on after several prompts at once; nothing is written."""
        return [self._answer(new) for new in self.tokens(prompts)]

    def _answer(self, new: list[int]) -> Answer:
        text = self._words.tokenizer.decode(new, skip_special_tokens=True)
        return Answer(text, len(new), "stop" if new[-1] in self._ends else "length")

    @torch.no_grad()
    def tokens(self, prompts: Sequence[list[int]], streamer: TextStreamer | None = None) -> list[list[int]]:
        """Ids that follow each of the prompts, at least one; the last may be one that ends a text.

        Args:
            streamer: gets them as they are made, of a single prompt.
        """
        rooms = [min(self._words.room, self._words.positions - len(ids)) for ids in prompts]
        numbers = list(itertools.islice(self._numbers, len(prompts)))
        ids, mask = (values.to(self._model.device) for values in padded(prompts))
        width = ids.shape[1]
        draws = not self._options.greedy and self._options.temperature > 0
        self._model.generation_config = self._settings(max(rooms))
        found = self._model.generate(
            ids,
            attention_mask=mask,
            streamer=streamer,
            logits_processor=LogitsProcessorList([Draw(self._options, self._seed, numbers)] if draws else []),
            stopping_criteria=StoppingCriteriaList([Room(width, rooms)]),
        )
        rows = [row[width:][:room] for row, room in zip(found.tolist(), rooms, strict=True)]
        ends = (next((place for place, token in enumerate(row, 1) if token in self._ends), None) for row in rows)
        return [row[:end] for row, end in zip(rows, ends, strict=True)]

    def _settings(self, room: int) -> GenerationConfig:
        """Ours alone: what a checkpoint's ``generation_config.json`` says of drawing is not followed."""
        return GenerationConfig(
            max_new_tokens=room,
            repetition_penalty=self._options.repetition_penalty,
            eos_token_id=self._ends or None,
            pad_token_id=self._ends[0] if self._ends else 0,  # of what has ended; transformers asks for one
        )


class _Stdout(TextStreamer):
    """Writes whole words as they come, without characters that would do something to a terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of the answer."""
        print(plain(text), end="\n" if stream_end else "", flush=True)


def device_of(accelerator: str) -> torch.device:
    """Where a model is to be: on the GPU where there is one, unless the CPU is asked for.

    Raises:
        MinitronError: a GPU is asked for, and there is none.
    """
    if accelerator == "gpu" and not runtime.has_cuda():
        raise MinitronError("accelerator=gpu: expected a CUDA device, found none; accelerator=auto takes the CPU")
    return torch.device("cpu") if accelerator == "cpu" else runtime.device()


def load(reader: Reader, cfg: GenerateConfig) -> Any:
    """transformers' model of a checkpoint, whole, on the device and in the precision that ``cfg`` asks for.

    No code of the checkpoint's is run, and nothing of it is unpickled.

    Raises:
        MinitronError: it cannot be exported, or transformers does not load it; no GPU where one is asked for.
    """
    logging.set_verbosity_error()  # its versions disagree on the name of torch_dtype, and say so
    device = device_of(cfg.accelerator)
    precision = cfg.precision or ("32" if device.type == "cpu" else "bf16")
    with ExitStack() as stack:
        folder = reader.path
        if not _loads_as_it_is(reader):
            beside = Path(tempfile.gettempdir()) / reader.path.name
            folder = stack.enter_context(exported(reader.path, beside, dataclasses.asdict(cfg.tokenizer)))
        with foreign(f"{reader.path}: expected a model that transformers loads"):
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                torch_dtype={"32": torch.float32, "bf16": torch.bfloat16}[precision],
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    return model.to(device).eval()


def _loads_as_it_is(reader: Reader) -> bool:
    """Whether transformers may read this itself: an HF folder of safetensors, with a RoPE that its version 4 finds."""
    if not (reader.path / "config.json").is_file() or not any(reader.path.glob("*.safetensors")):
        return False
    rope = reader.shape.rotary_base, reader.shape.rope_scaling
    return reader.hf_config is not None and older_reads(reader.hf_config, rope)
