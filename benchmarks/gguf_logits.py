"""Logits of a GGUF through transformers, and of the `.nemo` that `minitron convert` makes of it, on one prompt.

    python benchmarks/gguf_logits.py model.gguf --nemo model.nemo --json benchmarks/results/NAME_gguf.json

transformers loads the GGUF by itself (`from_pretrained(gguf_file=...)`); the `.nemo` is walked layer by layer in plain
torch. Both in float32 on the CPU. Without `--nemo` one is made in a folder that is deleted afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from torch import Tensor

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.convert import convert
from nemo_minitron.model.decoder import Rotary, read_head, read_layer, rms_norm
from nemo_minitron.model.layout import EMBEDDING

PROMPT = "def fibonacci(n):\n    '''The first n numbers, 1234567890.'''\n    return [1, 1] if n == 2 else"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--nemo", type=Path, help="made before by minitron convert")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--json", type=Path, help="write the table here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        nemo = given.nemo or convert(given.gguf, Path(folder) / "model.nemo")
        ids, ours = walk(nemo, given.prompt)
        theirs = of_transformers(given.gguf, ids)
    table: dict[str, Any] = {
        "model": given.gguf.name,
        "sha256": digest(given.gguf),
        "tokens": ids.shape[1],
        "vocab_size": ours.shape[1],
        "largest_difference": float((ours - theirs).abs().max()),
        "mean_difference": float((ours - theirs).abs().mean()),
        "largest_logit": float(theirs.abs().max()),
        "same_top_token": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
        **provenance(),
    }
    print(json.dumps(table, indent=2))
    if given.json:
        given.json.write_text(json.dumps(table, indent=2) + "\n")


def walk(nemo: Path, prompt: str) -> tuple[Tensor, Tensor]:
    """Token ids ``[1, s]`` of the prompt by the tokenizer that the file carries, and float32 logits ``[s, V]``."""
    from transformers import AutoTokenizer

    with NemoReader(nemo) as reader:
        ids = torch.tensor([AutoTokenizer.from_pretrained(reader.tokenizer_folder())(prompt).input_ids])
        x = reader.tensor(EMBEDDING)[ids].float()  # [1, s, H]
        rotary = Rotary.of(reader.shape, ids.shape[1])
        for layer in range(reader.shape.num_layers):
            x = read_layer(reader, layer).forward(x, rotary)
        norm, head = read_head(reader)
        return ids, (rms_norm(x, norm, reader.shape.layernorm_epsilon) @ head.T)[0]


def of_transformers(gguf: Path, ids: Tensor) -> Tensor:
    """Float32 logits ``[s, V]``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, torch_dtype=torch.float32)
    return model.eval()(ids).logits[0]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
