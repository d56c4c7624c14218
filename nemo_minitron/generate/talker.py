"""Answers of transformers' own model, with its key-value cache, streamed to stdout as they are made."""

from __future__ import annotations

import dataclasses
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer
from transformers.utils import logging

from nemo_minitron import runtime
from nemo_minitron.checkpoint.formats import Reader
from nemo_minitron.checkpoint.hf_rope import older_reads
from nemo_minitron.checkpoint.tokenizer_open import foreign
from nemo_minitron.config.schema import GenerateConfig
from nemo_minitron.config.sections import Inference
from nemo_minitron.convert.temporary import exported
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.plain import plain
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

    Args:
        model: transformers', on its device.
        options: how tokens are chosen.
    """

    def __init__(self, words: Words, model: Any, options: Inference) -> None:
        self._words, self._model, self._options = words, model, options
        theirs = model.generation_config.eos_token_id
        ends = [*(theirs if isinstance(theirs, list) else [theirs]), words.tokenizer.eos_token_id]
        self._ends = sorted({end for end in ends if end is not None})

    def answer(self, ids: list[int]) -> Answer:
        """Go on after ``ids``, and write the text to stdout as it comes."""
        new = self.tokens(ids, _Stdout(self._words.tokenizer, skip_prompt=True, skip_special_tokens=True))
        text = self._words.tokenizer.decode(new, skip_special_tokens=True)
        return Answer(text, len(new), "stop" if new[-1] in self._ends else "length")

    @torch.no_grad()
    def tokens(self, ids: list[int], streamer: TextStreamer | None = None) -> list[int]:
        """Ids that follow ``ids``, at least one; the last may be one that ends a text."""
        prompt = torch.tensor([ids], device=self._model.device)
        self._model.generation_config = self._settings(min(self._words.room, self._words.positions - len(ids)))
        found = self._model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=streamer)
        return [int(token) for token in found[0, len(ids) :]]

    def _settings(self, room: int) -> GenerationConfig:
        """Ours alone: what a checkpoint's ``generation_config.json`` says of drawing is not followed."""
        options = self._options
        settings = GenerationConfig(
            max_new_tokens=room,
            repetition_penalty=options.repetition_penalty,
            eos_token_id=self._ends or None,
            pad_token_id=self._ends[0] if self._ends else 0,  # nothing is padded, but transformers asks for one
        )
        if not options.greedy and options.temperature > 0:
            drawing = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
            settings.update(do_sample=True, **drawing)
        return settings


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
