"""``minitron synthesize``: a random Llama with a tokenizer, as an HF folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.config.schema import SynthesizeConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import Staging
from nemo_minitron.model.shape import LinearScaling, ModelShape, RopeScaling

_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What :func:`run` writes, and may replace."""


def run(cfg: SynthesizeConfig) -> None:
    """Write a random model of the shape in ``model`` to the folder ``output_path``, replacing one made before.

    Raises:
        MinitronError: an impossible shape, an unknown precision; a destination that cannot be written or holds
            anything else.
    """
    from nemo_minitron.checkpoint.nemo_config import dtype_from_precision
    from nemo_minitron.synthetic import make_llama

    shape, dtype = shape_of(cfg.model), dtype_from_precision(cfg.precision)
    folder = Path(cfg.output_path)
    try:
        with Staging(folder, folder=True, replaceable=_FILES) as staging:
            make_llama(staging.path, shape, seed=cfg.seed, dtype=dtype)
    except OSError as error:
        raise MinitronError(f"output_path {folder} cannot be written: {error.strerror}") from error
    print(f"{folder}: {shape.num_parameters():,} parameters")


def shape_of(model: Mapping[str, Any]) -> ModelShape:
    """:class:`ModelShape` from NeMo's keys, for instance those of ``conf/model/*.yaml``.

    Raises:
        MinitronError: a size is missing or does not fit the others.
    """
    needed = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
    if missing := [f"model.{name}" for name in needed if model.get(name) is None]:
        raise MinitronError(f"{', '.join(missing)}: needed for the shape; choose one with model=NAME")
    values = {item.name: model.get(item.name) for item in dataclasses.fields(ModelShape) if item.name != "rope_scaling"}
    values["num_query_groups"] = values["num_query_groups"] or values["num_attention_heads"]
    values["kv_channels"] = values["kv_channels"] or model["hidden_size"] // model["num_attention_heads"]
    values["padded_vocab_size"] = values["padded_vocab_size"] or values["vocab_size"]
    if model.get("scale_positional_embedding"):
        values["rope_scaling"] = RopeScaling(
            model.get("scale_factor", 8.0),
            model.get("low_freq_factor", 1.0),
            model.get("high_freq_factor", 4.0),
            model.get("old_context_len", 8192),
        )
    elif model.get("seq_len_interpolation_factor") not in (None, 1):
        values["rope_scaling"] = LinearScaling(float(model["seq_len_interpolation_factor"]))
    return ModelShape(**{name: value for name, value in values.items() if value is not None})
