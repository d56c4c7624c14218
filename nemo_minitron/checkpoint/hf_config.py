"""HF ``config.json`` to and from :class:`ModelShape`: which architectures are supported, and which fields mean what."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nemo_minitron.checkpoint import known
from nemo_minitron.checkpoint.biases import biases_of, has_zero_biases, in_words
from nemo_minitron.checkpoint.hf_dress import Dress, dress_of
from nemo_minitron.checkpoint.hf_layers import cut_lists
from nemo_minitron.checkpoint.hf_rope import number, read_rope, whole, write_rope
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.family import Family
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.registry import FAMILIES

_FULL = "full_attention"


def dtype_name(dtype: torch.dtype) -> str:
    """HF's spelling of a storage dtype."""
    return str(dtype).removeprefix("torch.")


def shape_from_hf(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """Read the shape of a supported decoder; V = Vp = the rows of HF's table.

    Raises:
        MinitronError: an architecture or feature that Megatron's Llama layers would compute differently, or a size
            that is missing or none.
    """
    family = family_from_hf(config, where)
    config = {**family.hf_absent, **config}
    biases = dict.fromkeys(family.hf_biases, (False, True, None))
    window = ("sliding_window",) if family.hf_window else ()
    known.HF.having({**biases, **family.hf_only}, (*family.hf_neutral, *window)).check(config, where)
    attention, mlp = (key in family.hf_biases and bool(config.get(key)) for key in ("attention_bias", "mlp_bias"))
    hidden, heads = (whole(config, key, where) for key in ("hidden_size", "num_attention_heads"))
    vocab, layers = (whole(config, key, where) for key in ("vocab_size", "num_hidden_layers"))
    _check_layer_types(config.get("layer_types"), layers, where)
    tied = config.get("tie_word_embeddings")
    if tied not in (True, False, None):
        raise MinitronError(f"{where}: tie_word_embeddings must be true or false, found {tied!r:.80}")
    base, scaling = read_rope(config, where)
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=whole(config, "intermediate_size", where),
        num_attention_heads=heads,
        num_query_groups=whole(config, "num_key_value_heads", where, heads),
        kv_channels=whole(config, "head_dim", where, hidden // heads),
        vocab_size=vocab,
        padded_vocab_size=vocab,
        share_embeddings_and_output_weights=bool(tied),
        rotary_base=base,
        rope_scaling=scaling,
        max_position_embeddings=whole(config, "max_position_embeddings", where, 2048),
        layernorm_epsilon=0.0 if config.get("rms_norm_eps") == 0 else number(config, "rms_norm_eps", where, 1e-6),
        qkv_bias=family.qkv_bias or attention,
        proj_bias=attention,
        mlp_bias=mlp,
        family=family.layers,
        sliding_window=whole(config, *window, where) if window and config["sliding_window"] is not None else None,
    )


def _check_layer_types(kinds: Any, layers: int, where: str) -> None:
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != layers:
        found = len(kinds) if isinstance(kinds, list) else f"{kinds!r:.80}"
        raise MinitronError(f"{where}: layer_types must be a list of num_hidden_layers ({layers}) names, found {found}")
    other = next((kind for kind in kinds if kind != _FULL), _FULL)
    if other != _FULL:
        raise MinitronError(f"{where}: layer_types must be '{_FULL}' for every layer, found {other!r:.80}")


def hf_config_from_shape(shape: ModelShape, dtype: torch.dtype, source: Mapping[str, Any] | None = None) -> dict:
    """The ``config.json`` of :func:`dressed_config`, without a word about it."""
    return dressed_config(shape, dtype, source)[0]


def dressed_config(
    shape: ModelShape,
    dtype: torch.dtype,
    source: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
) -> tuple[dict[str, Any], Dress]:
    """A ``config.json`` for ``shape``: ``source`` with only the fields changed whose meaning differs; and its dress.

    With ``source`` of the same shape and dtype the result equals ``source`` key by key, so that a round trip is
    bit-identical; without it, the config of the first family that has such layers is made. A model of another shape
    than its source's is dressed (:func:`nemo_minitron.checkpoint.hf_dress.dress_of`), and so is one without a source.

    Args:
        layers: index of each layer among the source's, where that is known.

    Raises:
        MinitronError: ``source`` is of another family, or has lists per layer that cannot be cut.
    """
    config = copy.deepcopy(dict(source)) if source else _fresh_config(shape)
    before = shape_from_hf(config) if source else None
    if before is not None and biases_of(before) != biases_of(shape) and not has_zero_biases(before, shape):
        raise MinitronError(
            f"config.json: architectures {config.get('architectures')} must be of a model "
            f"{in_words(biases_of(shape))}, as its weights are"
        )
    if before is not None and before.family != shape.family:
        raise MinitronError(
            f"config.json: architectures {config.get('architectures')} must be of the family '{shape.family}', as its "
            "weights are"
        )
    for key, field in _FIELDS.items():
        value = getattr(shape, field)
        if before is None or getattr(before, field) != value:
            config[key] = value
    if before is None or before.kv_channels != shape.kv_channels or _implied_head_dim(config) != shape.kv_channels:
        config["head_dim"] = shape.kv_channels
    if shape.sliding_window != (None if before is None else before.sliding_window):
        _set_window(config, shape)
    if before is not None:
        cut_lists(config, before.num_layers, shape.num_layers, layers)
    same = {"padded_vocab_size": shape.padded_vocab_size, "proj_bias": shape.proj_bias}
    pruned = before is None or before.replace(**same) != shape
    dress = dress_of(shape, family_from_hf(config, "config.json"), may_change=pruned)
    if dress.family is not None:  # what was said by silence is another thing in another architecture
        silent = {key: getattr(shape, field) for key, field in _FIELDS.items()}
        silent |= {"head_dim": shape.kv_channels} | ({"bos_token_id": None, "eos_token_id": None} if source else {})
        config |= {key: value for key, value in silent.items() if config.get(key) is None}
    dress.put_on(config)
    write_rope(config, (shape.rotary_base, shape.rope_scaling), fresh=before is None)
    name = dtype_name(dtype)
    if config.get("torch_dtype") != name or config.get("dtype", name) != name:
        config |= {"torch_dtype": name, "dtype": name}  # transformers up to 4.55 reads the first, later ones the second
    return config, dress


def _set_window(config: dict[str, Any], shape: ModelShape) -> None:
    if not family_from_hf(config, "config.json").hf_window:
        raise MinitronError(
            f"config.json: architectures {config.get('architectures')} must be of a family with a window over the "
            f"tokens, as its weights are (sliding_window {shape.sliding_window})"
        )
    config["sliding_window"] = shape.sliding_window


_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
}


def _fresh_config(shape: ModelShape) -> dict[str, Any]:
    biases = biases_of(shape)
    alike = [family for family in FAMILIES.every() if family.layers == shape.family]
    fitting = [family for zeros in (False, True) for family in alike if family.has_biases(biases, zeros)]
    if not fitting:
        raise MinitronError(f"there are no models {in_words(biases)} in the family '{shape.family}'")
    family = next((one for one in fitting if one.hf_window or shape.sliding_window is None), None)
    if family is None:
        raise MinitronError(f"sliding_window must be null in a model {in_words(biases)}, found {shape.sliding_window}")
    keys = {"attention_bias": shape.qkv_bias, "mlp_bias": shape.mlp_bias}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **family.hf_fresh,
        **{key: keys[key] for key in family.hf_biases},
    }


def _implied_head_dim(config: Mapping[str, Any]) -> int:
    config = {**family_from_hf(config, "config.json").hf_absent, **config}
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def family_from_hf(config: Mapping[str, Any], where: str) -> Family:
    """The family that ``architectures`` names, or ``model_type`` where that is silent; they must agree.

    Raises:
        MinitronError: an architecture that no family has, or two that are named.
    """
    names, kind = config.get("architectures") or [], config.get("model_type")
    if not isinstance(names, list) or len(names) > 1:
        raise MinitronError(f"{where}: architectures must be a list of one name, found {names!r:.80}")
    name = str(names[0]) if names else str(kind)
    for family in FAMILIES.every():
        if name == family.architecture or (not names and name == family.model_type):
            break
    else:
        architectures = ", ".join(family.architecture for family in FAMILIES.every())
        raise MinitronError(f"{where}: architecture must be one of {architectures}, found '{name:.80}'")
    if kind is not None and str(kind) not in (family.model_type, family.architecture):
        # transformers goes by the one here and by the other there
        raise MinitronError(f"{where}: model_type must be that of {name}, found {kind!r:.80}")
    found: Family = family
    return found
