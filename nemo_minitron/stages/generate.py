"""``minitron generate``: a model that one can talk to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from nemo_minitron.config.schema import GenerateConfig
from nemo_minitron.errors import required
from nemo_minitron.files.plain import plain, short
from nemo_minitron.files.staging import write_file
from nemo_minitron.generate.request import requested
from nemo_minitron.jobs.processes import quiet


def run(cfg: GenerateConfig) -> None:
    """Answer ``prompt`` or ``prompts`` with ``model.restore_from_path``, or ``chat``.

    ``batch_size`` prompts are answered at once. Answers go to stdout, one that is alone in its batch as it is made, and
    at the end to ``output_path``, a line of JSON each. What is wrong with a prompt is said before any weight is read.

    Raises:
        MinitronError: what is asked for cannot be, see :func:`requested`; no model or tokenizer that can be read, no
            chat template where one is needed, a prompt with more tokens than the model has positions, no GPU.
    """
    prompts = requested(cfg)  # before what takes seconds to import
    quiet()
    from nemo_minitron.checkpoint.formats import open_checkpoint
    from nemo_minitron.generate.chat import Chat, typed_lines
    from nemo_minitron.generate.talker import Talker, load
    from nemo_minitron.generate.words import Words

    with open_checkpoint(required(cfg, "model.restore_from_path")) as reader:
        words = Words.of(reader, cfg)
        tokens = [words.encode(prompt) for prompt in prompts]
        chat = Chat(words, cfg.system) if cfg.chat else None
        talker = Talker(words, load(reader, cfg), cfg)
    if chat is not None:
        chat.talk(typed_lines(), talker.answer)
    lines: list[str] = []
    for first in range(0, len(prompts), cfg.batch_size):
        batch = tokens[first : first + cfg.batch_size]
        found = talker.answers(batch) if len(batch) > 1 else None
        for row, (prompt, ids) in enumerate(zip(prompts[first:], batch, strict=False)):
            if len(prompts) > 1:
                print(f"{chr(10) if lines else ''}{len(lines) + 1}. {short(prompt.text, 100) or ''}", flush=True)
            answer = talker.answer(ids) if found is None else found[row]
            if found is not None:
                print(plain(answer.answer), flush=True)
            record = {**prompt.record(), **dataclasses.asdict(answer)}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    if cfg.output_path:
        write_file(Path(cfg.output_path), "".join(lines))
