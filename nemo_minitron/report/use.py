"""How the student of a run is used: the lines that load it, with the paths of the files that are there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from nemo_minitron.config.words import word
from nemo_minitron.report.run_folder import Run

STUDENTS = {"distilled.nemo": "distilled", "pruned.nemo": "pruned and not distilled"}
"""Files of a student as recipes name them, the better one first, and what each is."""
HF_FOLDER = "hf"


def use(run: Run) -> tuple[str, list[tuple[str, str, str]]]:
    """Where the student is, in a sentence, and (what for, language, code) of each way to load it; empty without one."""
    path = next((run.folder / name for name in STUDENTS if run.folder / name in run.files.files), None)
    folder = run.folder / HF_FOLDER
    exported = folder / "config.json" in run.files.files
    if path is None:
        return "", []
    where = f"The student ({STUDENTS[path.name]}) is {path}"
    where += f", and as a Hugging Face folder {folder}." if exported else "."
    ways = [("Talk to it", "console", _minitron("generate", {"model.restore_from_path": path, "chat": "true"}))]
    if not exported:
        make = {"input_name_or_path": path, "output_path": folder}
        ways.append(("As a Hugging Face folder", "console", _minitron("convert", make)))
    ways += [
        ("transformers", "python", _TRANSFORMERS.format(folder=str(folder))),
        ("vLLM", "console", shlex.join(["vllm", "serve", str(folder)])),
    ]
    gguf = run.folder / "student.gguf"
    make = {"input_name_or_path": path, "output_path": gguf}
    ways.append(("llama.cpp", "console", f"{_minitron('convert', make)}\n{shlex.join(['llama-cli', '-m', str(gguf)])}"))
    return where, ways


_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})"""


def _minitron(command: str, values: Mapping[str, Path | str]) -> str:
    """A command line, quoted for Hydra where a value needs it and for the shell."""
    words = [
        f"{key}={value}" if re.fullmatch(r"[A-Za-z0-9_./-]+", str(value)) else word(key, value)
        for key, value in values.items()
    ]
    return shlex.join(["minitron", command, *words])
