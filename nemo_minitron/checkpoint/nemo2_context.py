"""NeMo 2's description of a checkpoint: ``context/io.json`` and ``context/model.yaml``, as plain data.

``io.json`` is Fiddle's: a graph of calls that NeMo builds the model with, of which the subgraph ``model`` is enough to
load, generate and export. The model's class is the one that has the shape's facts: Llama 3.1's takes all four numbers
of the RoPE scaling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_minitron.checkpoint.megatron_fields import bias_everywhere, interpolation, switches, values
from nemo_minitron.model.shape import ModelShape, RopeScaling

TOKENIZER = "nemo_tokenizer"
"""Folder of the tokenizer within ``context``, by which NeMo finds it from there."""
_MODELS = "nemo.collections.llm.gpt.model"
_AUTO_TOKENIZER = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"
_CONTEXT = "nemo.lightning.io.pl.TrainerContext"


@dataclass(frozen=True)
class Named:
    """Something that is imported by its name when NeMo reads it, never here."""

    path: str


@dataclass(frozen=True)
class Call:
    """A call of something that is imported by its name."""

    path: str
    arguments: Mapping[str, Any]


def model_call(shape: ModelShape, dtype: torch.dtype, divisor: int, tokenizer: bool, where: str) -> Call:
    """How NeMo 2 makes the model.

    ``vocab_size`` is the rows of the table, padding and all: NeMo 2 takes it as it is, at any TP.

    Raises:
        MinitronError: a shape that its classes cannot have.
    """
    module, family, scaling = _class_of(shape, where)
    config = {field.config: value for field, value in values(shape, where)}
    config |= {
        "vocab_size": shape.padded_vocab_size,
        "make_vocab_size_divisible_by": divisor,
        "normalization": "RMSNorm",
        "activation_func": Named("torch.nn.functional.silu"),
        "gated_linear_unit": True,
        "add_bias_linear": bias_everywhere(shape, where),
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **switches(shape, where),
        **scaling,
        "seq_len_interpolation_factor": interpolation(shape),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": Named(str(dtype)),
    }
    made = Call(_AUTO_TOKENIZER, {"pretrained_model_name": TOKENIZER}) if tokenizer else None
    return Call(
        f"{_MODELS}.{module}.{family}Model",
        {"config": Call(f"{_MODELS}.{module}.{family}{'31' if scaling else ''}Config", config), "tokenizer": made},
    )


def _class_of(shape: ModelShape, where: str) -> tuple[str, str, dict[str, Any]]:
    """Module and beginning of the names of a model's classes, and the keys of its RoPE scaling."""
    scaling = shape.rope_scaling
    if isinstance(scaling, RopeScaling):
        return (
            "llama",
            "Llama",
            {
                "scale_factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "old_context_len": scaling.original_max_position_embeddings,
            },
        )
    if switches(shape, where)["qk_layernorm"]:
        return "qwen3", "Qwen3", {}
    return ("qwen2", "Qwen2", {}) if shape.qkv_bias and not shape.mlp_bias else ("llama", "Llama", {})


def model_yaml(model: Call) -> bytes:
    """``context/model.yaml``, from which NeMo builds nothing."""
    import yaml

    return yaml.safe_dump(_plain(model), sort_keys=False).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Call):
        return {"_target_": value.path} | {key: _plain(inner) for key, inner in value.arguments.items()}
    return {"_target_": value.path, "_call_": False} if isinstance(value, Named) else value


def io_json(model: Call) -> bytes:
    """``context/io.json`` with the model and no trainer."""
    graph = _Graph()
    root = graph.add(Call(_CONTEXT, {"model": model, "trainer": None, "extra": {}}), "<root>")
    content = {"root": root, "objects": graph.objects, "refcounts": dict.fromkeys(graph.objects, 1)}
    return json.dumps(content | {"version": "0.0.1"}, indent=1).encode()


class _Graph:
    """Objects of Fiddle's JSON by key, each referred to once (fiddle 0.3, ``experimental/serialization.py``)."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}

    def add(self, value: Any, path: str) -> dict[str, Any]:
        """The item that stands for a value at a path from the root."""
        if isinstance(value, Named):
            return {**_pyref(value.path), "paths": [path]}
        if isinstance(value, Call):
            items = [
                [f"Attr(name='{key}')", self.add(inner, f"{path}.{key}")] for key, inner in value.arguments.items()
            ]
            made = {"type": _pyref("fiddle._src.config.Config"), "items": items, "metadata": self._metadata(value)}
            return self._ref(value.path.rpartition(".")[2], {**made, "paths": [path]})
        if value == {}:
            return self._ref("dict", {**_EMPTY, "paths": [path]})
        return {"type": "leaf", "value": value, "paths": [path]}

    def _metadata(self, call: Call) -> dict[str, Any]:
        names = [[f"Index(index={i})", name] for i, name in enumerate(call.arguments)]
        fields = {
            "fn_or_cls": _pyref(call.path),
            "argument_names": self._ref("tuple", {"type": _pyref("builtins.tuple"), "items": names, "metadata": None}),
            "argument_tags": self._ref("dict", _EMPTY),
            "argument_history": self._ref("dict", _EMPTY),
        }
        kind = _pyref("fiddle._src.config.BuildableTraverserMetadata")
        items = [[f"Attr(name='{name}')", value] for name, value in fields.items()]
        return self._ref("metadata", {"type": kind, "items": items, "metadata": kind})

    def _ref(self, hint: str, made: dict[str, Any]) -> dict[str, Any]:
        key = f"{hint}_{len(self.objects) + 1}"
        self.objects[key] = made
        return {"type": "ref", "key": key}


def _pyref(path: str) -> dict[str, Any]:
    module, _, name = path.rpartition(".")
    return {"type": "pyref", "module": module, "name": name}


_EMPTY = {
    "type": _pyref("builtins.dict"),
    "items": [],
    "metadata": {"type": _pyref("builtins.tuple"), "items": [], "metadata": None},
}
