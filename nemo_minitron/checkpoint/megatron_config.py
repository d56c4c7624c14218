"""Megatron's configs to :class:`ModelShape`: those of NeMo 2 and Megatron-Bridge, and the arguments of Megatron-LM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nemo_minitron.checkpoint.biases import flag, in_words
from nemo_minitron.checkpoint.hf_rope import number, whole
from nemo_minitron.checkpoint.keys import Keys
from nemo_minitron.checkpoint.megatron_keys import ARGS, MODEL
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.processes import notice
from nemo_minitron.model.family import Biases, Family
from nemo_minitron.model.shape import LinearScaling, ModelShape, RopeScaling, Scaling
from nemo_minitron.registry import FAMILIES

# Classes whose layers are Megatron-Core's own GPT layers, and whose keys say all that they do with them
_CLASSES = re.compile(
    r"(Bridge)?(GPT|Llama|Llama2|Llama3|Llama31|Llama32|Llama33|CodeLlama|Qwen2|Qwen25|Qwen3|Mistral|MistralNeMo"
    r"|MistralSmall3)(Config|Provider|ModelProvider|ModelConfig)(\d+(P\d+)?[BM])?"
)
_ALWAYS_SCALED = re.compile(r"Llama3[123](Config|ModelProvider)(\d+B)?")
_LLAMA31 = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
_SCALING = RopeScaling()  # what Megatron-Core has for Llama 3.1, of which its configs name the factor alone
_USUAL_FACTOR = 8.0


def shape_from_model(section: Mapping[str, Any], table_rows: int, where: str) -> ModelShape:
    """The shape that a config of NeMo 2 or Megatron-Bridge describes.

    Args:
        section: ``config`` of ``context/model.yaml``, or ``model`` of ``run_config.yaml``.
        table_rows: rows of the stored embedding table: Vp.

    Raises:
        MinitronError: a class or a key that Megatron's Llama layers would compute differently, a size that is missing,
            none, or does not fit the table.
    """
    config = flatten(section, where)
    name = str(config.get("_target_")).rpartition(".")[2]
    if not _CLASSES.fullmatch(name):
        raise MinitronError(f"{where}: _target_ must name a model class of the Llama kind, found {name!r:.80}")
    biases = _biases(config, where)
    family = _family(config, biases, where)
    _keys(MODEL, family).check(config, where)
    heads, hidden = (whole(config, key, where) for key in ("num_attention_heads", "hidden_size"))
    return ModelShape(
        num_layers=whole(config, "num_layers", where),
        hidden_size=hidden,
        ffn_hidden_size=whole(config, "ffn_hidden_size", where),
        num_attention_heads=heads,
        num_query_groups=whole(config, "num_query_groups", where, heads),
        kv_channels=whole(config, "kv_channels", where, hidden // heads or 1),
        vocab_size=_vocab(whole(config, "vocab_size", where, table_rows), table_rows, where),
        padded_vocab_size=table_rows,
        share_embeddings_and_output_weights=flag(config, "share_embeddings_and_output_weights", where, True),
        rotary_base=number(config, "rotary_base", where, 10000.0),
        rope_scaling=_model_scaling(config, name, where),
        max_position_embeddings=whole(
            config, "max_position_embeddings", where, whole(config, "seq_length", where, 1024)
        ),
        layernorm_epsilon=_epsilon(config, ("layernorm_epsilon",), where),
        qkv_bias=biases[0],
        proj_bias=biases[1],
        mlp_bias=biases[2],
        family=family.layers,
    )


def shape_from_args(args: Mapping[str, Any], table_rows: int, where: str) -> ModelShape:
    """The shape that the arguments of a Megatron-LM checkpoint describe, as ``pretrain_gpt.py`` builds the model.

    Megatron-LM's GPT is built with a factor of 8 whatever ``rope_scaling_factor`` says, in every version up to 0.19; a
    file with another factor means another model than that, and is taken at its word, which is said.

    Args:
        args: the namespace as a mapping, of 0.13 to 0.19, whose names differ a little.
        table_rows: rows of the stored embedding table: Vp.

    Raises:
        MinitronError: as :func:`shape_from_model`.
    """
    biases = _biases(args, where)
    family = _family(args, biases, where)
    _keys(ARGS, family).check(args, where)
    heads, hidden = (whole(args, key, where) for key in ("num_attention_heads", "hidden_size"))
    grouped = flag(args, "group_query_attention", where, False)
    padded = args.get("padded_vocab_size")
    if padded not in (None, table_rows):
        raise MinitronError(
            f"{where}: padded_vocab_size must be the rows of the table, {table_rows}, found {padded!r:.80}"
        )
    return ModelShape(
        num_layers=whole(args, "num_layers", where),
        hidden_size=hidden,
        ffn_hidden_size=whole(args, "ffn_hidden_size", where),
        num_attention_heads=heads,
        num_query_groups=whole(args, "num_query_groups", where) if grouped else heads,
        kv_channels=whole(args, "kv_channels", where, hidden // heads or 1),
        vocab_size=_args_vocab(args, table_rows, where),
        padded_vocab_size=table_rows,
        share_embeddings_and_output_weights=not flag(args, "untie_embeddings_and_output_weights", where, False),
        rotary_base=number(args, "rotary_base", where, 10000.0),
        rope_scaling=_args_scaling(args, where),
        max_position_embeddings=whole(args, "max_position_embeddings", where, whole(args, "seq_length", where, 2048)),
        layernorm_epsilon=_epsilon(args, ("layernorm_epsilon", "norm_epsilon"), where),
        qkv_bias=biases[0],
        proj_bias=biases[1],
        mlp_bias=biases[2],
        family=family.layers,
    )


def flatten(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A section with the fields of a nested ``transformer`` config beside its own, and names where objects stood.

    What names a function or a class, ``{_target_: torch.nn.functional.silu, _call_: false}``, becomes that name, and a
    layer specification the last part of it. Nothing is imported.
    """
    inner = section.get("transformer")
    if inner is not None and not isinstance(inner, Mapping):
        raise MinitronError(f"{where}: transformer must be a mapping, found {inner!r:.80}")
    found: dict[str, Any] = {}
    for part in (inner or {}), {key: value for key, value in section.items() if key != "transformer"}:
        for key, value in part.items():
            if key in found and found[key] != value and not str(key).startswith("_"):
                raise MinitronError(f"{where}: {key:.80} must be one value, found another in transformer")
            found[str(key)] = value
    for key, value in found.items():
        if isinstance(value, Mapping) and isinstance(value.get("_target_"), str) and key != "generation_config":
            rest = {name for name in value if name not in ("_target_", "_call_", "_partial_", "_args_")}
            bare = not value.get("_call_") and not rest
            found[key] = value["_target_"] if bare else f"{value['_target_']}(…)"
    if isinstance(spec := found.get("transformer_layer_spec"), str):
        found["transformer_layer_spec"] = spec.rpartition(".")[2]
    return found


def _biases(config: Mapping[str, Any], where: str) -> Biases:
    """Megatron-Core's two switches: a bias on every linear layer, which is its default, and one on QKV."""
    every, qkv = flag(config, "add_bias_linear", where, True), flag(config, "add_qkv_bias", where, False)
    return every or qkv, every, every


def _family(config: Mapping[str, Any], biases: Biases, where: str) -> Family:
    """The family most of whose keys the config has."""
    fitting = [
        family
        for family in FAMILIES.every()
        if family.has_biases(biases) and all(config.get(key) == value for key, value in family.nemo.items())
    ]
    if not fitting:
        raise MinitronError(f"{where}: expected a model of a family that is known, found one {in_words(biases)}")
    return max(fitting, key=lambda family: len(family.nemo))  # the first of equals


def _keys(keys: Keys, family: Family) -> Keys:
    return keys.having({key: (value,) for key, value in family.nemo.items()}, required=True)


def _epsilon(config: Mapping[str, Any], keys: tuple[str, ...], where: str) -> float:
    given = {key: number(config, key, where) for key in keys if config.get(key) is not None}
    if len(set(given.values())) > 1:
        raise MinitronError(f"{where}: {' and '.join(given)} must agree, found {list(given.values())}")
    return next(iter(given.values()), 1e-5)


def _vocab(vocab: int, rows: int, where: str) -> int:
    if vocab > rows:
        raise MinitronError(f"{where}: vocab_size must be at most the rows of the table, {rows}, found {vocab}")
    return vocab


def _args_vocab(args: Mapping[str, Any], rows: int, where: str) -> int:
    """V where ``vocab_size`` explains the padding of the table; else all of its rows.

    Megatron-LM takes the size of its tokenizer, which it does not store, and ``vocab_size`` from those alone that have
    no size of their own; that of the ``NullTokenizer`` was without the end of a document up to 0.17.
    """
    given = args.get("vocab_size")
    if given is None:
        return rows
    vocab = whole(args, "vocab_size", where)
    step = whole(args, "make_vocab_size_divisible_by", where, 128)
    step *= whole(args, "tensor_model_parallel_size", where, 1)
    null = str(args.get("tokenizer_type")).startswith("Null")
    for candidate in (vocab + 1, vocab) if null else (vocab,):
        if candidate == rows or -(-candidate // step) * step == rows:
            return candidate
    return rows


def _model_scaling(config: Mapping[str, Any], name: str, where: str) -> Scaling | None:
    """Linear scaling, or Llama 3.1's in its generations: classes that always scale, and ``rope_scaling``."""
    llama = _llama_scaling(config, name, where)
    factor = number(config, "seq_len_interpolation_factor", where, 1.0)
    if factor == 1:
        return llama
    if llama is not None or factor < 1:
        raise MinitronError(
            f"{where}: seq_len_interpolation_factor must be at least 1, and 1 beside another scaling, found {factor:g}"
        )
    return LinearScaling(factor)


def _llama_scaling(config: Mapping[str, Any], name: str, where: str) -> RopeScaling | None:
    given = [key for key in _LLAMA31 if config.get(key) is not None]
    newer = flag(config, "rope_scaling", where, False)
    if _ALWAYS_SCALED.fullmatch(name) or given:
        if newer:
            raise MinitronError(f"{where}: rope_scaling must be false beside scale_factor, found true")
        scaling = RopeScaling(
            number(config, "scale_factor", where, _SCALING.factor),
            number(config, "low_freq_factor", where, _SCALING.low_freq_factor),
            number(config, "high_freq_factor", where, _SCALING.high_freq_factor),
            whole(config, "old_context_len", where, _SCALING.original_max_position_embeddings),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise MinitronError(
                f"{where}: high_freq_factor must be larger than low_freq_factor, found {scaling.high_freq_factor} and "
                f"{scaling.low_freq_factor}"
            )
        return scaling
    if not newer:
        return None
    usual = 1.0 if name.startswith("GPTModelProvider") else _USUAL_FACTOR  # the defaults of Bridge and Megatron-LM
    return RopeScaling(number(config, "rope_scaling_factor", where, usual))


def _args_scaling(args: Mapping[str, Any], where: str) -> RopeScaling | None:
    if not flag(args, "use_rope_scaling", where, False):
        return None
    factor = number(args, "rope_scaling_factor", where, _USUAL_FACTOR)
    if factor != _USUAL_FACTOR:
        notice(
            f"{where}: rope_scaling_factor is {factor:g}, which is used; Megatron-LM itself (0.13 to 0.19) builds a "
            f"GPT with {_USUAL_FACTOR:g} whatever it says"
        )
    return RopeScaling(factor)
