"""The ``README.md`` of an exported HF folder: what it is, what it was made from and how, as far as that is known."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoint.run_records import Records
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import read_file
from nemo_minitron.model.shape import ModelShape

NAME = "README.md"
MARK = "<!-- Written by minitron convert, which replaces this file only as long as it has this line. -->"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_PLAIN = re.compile(r"[\w.+ -]{1,100}", re.ASCII)
_LIMIT = 1 << 20
_ROWS = {
    "layers": "num_layers",
    "hidden size": "hidden_size",
    "FFN size": "ffn_hidden_size",
    "attention heads": "num_attention_heads",
    "query groups": "num_query_groups",
    "head dimension": "kv_channels",
    "vocabulary": "vocab_size",
}


@dataclass(frozen=True)
class ModelCard:
    """What a card says beside the config.

    Attributes:
        source: file or folder that was converted.
        shape: of the model; ``before``: of the one that its ``config.json`` came from, where that is known.
        base_model: name on the hub of the latter.
        records: of its pruning and training.
    """

    source: Path
    shape: ModelShape
    before: ModelShape | None = None
    base_model: str | None = None
    records: Records = field(default_factory=Records)

    def text(self, name: str, config: Mapping[str, Any], notes: Sequence[str], tokenizer: bool) -> str:
        """The file.

        Args:
            name: of the folder. config: its ``config.json``. notes: sentences on the export.
            tokenizer: whether the folder has one.
        """
        parts = [self._front(), MARK, self._what(name, config), self._sizes(), *self._how()]
        parts += [_loading(name, tokenizer)]
        if notes:
            parts.append("## Notes\n\n" + "\n".join(f"- {note[:1].upper()}{note[1:]}." for note in notes))
        return "\n\n".join(part for part in parts if part) + "\n"

    def _front(self) -> str:
        tags = ["minitron", *(["pruned"] if self._pruned else []), *(["distilled"] if self.records.training else [])]
        lines = ["library_name: transformers", "pipeline_tag: text-generation"]
        if self.base_model is not None:
            lines.append(f"base_model: {self.base_model}")
        return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])

    @property
    def _pruned(self) -> bool:
        return self.before is not None and any(
            getattr(self.before, key) != getattr(self.shape, key) for key in _ROWS.values()
        )

    def _what(self, name: str, config: Mapping[str, Any]) -> str:
        architecture = (config.get("architectures") or ["model"])[0]
        made = f"A `{architecture}` of {self.shape.num_parameters():,} parameters in {config.get('torch_dtype')}"
        source = f", converted from `{self.source.name}`" if _PLAIN.fullmatch(self.source.name) else ""
        of = f", which was made from {self.base_model}" if self.base_model else ""
        return f"# {_title(name)}\n\n{made}{source}{of}."

    def _sizes(self) -> str:
        before, shape = self.before, self.shape
        if before is None or not self._pruned:
            return ""
        rows = [(label, getattr(before, key), getattr(shape, key)) for label, key in _ROWS.items()]
        rows.append(("parameters", before.num_parameters(), shape.num_parameters()))
        lines = ["| | before | after |", "|---|---|---|"]
        return "\n".join([*lines, *(f"| {label} | {old:,} | {new:,} |" for label, old, new in rows)])

    def _how(self) -> list[str]:
        found, said = self.records, []
        if (pruning := found.pruning) is not None:
            weights = "re-solved on calibration tokens" if pruning.resolved else "kept as they were"
            turned = ", the residual stream turned onto its directions of most energy" if pruning.turned else ""
            ranked = f", ranked by `{pruning.ranking}`" if pruning.ranking else ""
            ranked += f", query groups by `{pruning.groups_by}`" if pruning.groups_by else ""
            layers = ""
            if self.shape.num_layers < pruning.source_layers:
                by = f", chosen by `{pruning.layers_by}`" if pruning.layers_by else ""
                layers = f" Of the layers 0-{pruning.source_layers - 1}, {pruning.layers} stayed{by}."
            said.append(f"**Pruned** by minitron{ranked}; the weights that stayed were {weights}{turned}.{layers}")
        if (training := found.training) is not None:
            amount = f"{training.steps:,} steps of {training.tokens:,} tokens"
            said.append(f"**Distilled** from `{training.teacher}` with the loss `{training.loss}`, {amount}.")
        if (measured := found.measured) is not None:
            teacher = f", the teacher's {measured.teacher:.4f}" if measured.teacher is not None else ""
            said.append(f"**Held-out loss** on `{measured.data}`: {measured.loss:.4f} nats/token{teacher}.")
        return said


def base_model(config: Mapping[str, Any] | None) -> str | None:
    """The hub's name of the model that a ``config.json`` says it is of; None where it says none, or a path."""
    name = (config or {}).get("_name_or_path")
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def is_ours(file: Path) -> bool:
    """Whether a ``README.md`` is there and was written here."""
    try:
        return file.is_file() and MARK.encode() in read_file(file, _LIMIT).splitlines()
    except MinitronError:
        return False


def _title(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else "Model"


def _loading(name: str, tokenizer: bool) -> str:
    folder = name if _PLAIN.fullmatch(name) else "this-folder"
    what = "AutoModelForCausalLM, AutoTokenizer" if tokenizer else "AutoModelForCausalLM"
    lines = [f"from transformers import {what}", ""]
    lines.append(f'model = AutoModelForCausalLM.from_pretrained("{folder}", torch_dtype="auto")')
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'] if tokenizer else []
    return "\n".join(["```python", *lines, "```"])
