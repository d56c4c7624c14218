"""What serving engines want of a shape: which shapes they refuse, and which they run badly.

Read in their sources: vLLM, SGLang and TensorRT-LLM split heads and FFN neurons evenly over the GPUs, and groups evenly
or whole, a group on several GPUs; Marlin's FP8 kernels take tiles of 64 outputs by 16 inputs of what one GPU holds;
llama.cpp's K-quants take blocks of 256 along a row, and store other rows in larger types; transformers 5 refuses a
Llama whose hidden size is no multiple of its heads; vLLM's Qwen2 takes hidden size over heads for head_dim.

The rules are plain arithmetic, so that they hold for one shape and, as arrays, for many (``search.space.Shapes``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nemo_minitron.config.sections import Serving
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import ModelShape

ROW_MULTIPLE = 256
"""Values in a block of llama.cpp's K-quants."""
_OUTPUTS, _INPUTS = 64, 16  # Marlin's tile


@dataclass(frozen=True)
class Reason:
    """Why a shape is not served well: ``refused`` by an engine, or loaded and run badly; ``text`` for people."""

    name: str
    refused: bool
    text: str


@dataclass(frozen=True)
class Rule:
    """One thing that an engine wants.

    Attributes:
        breaks: whether a shape breaks it: a bool, or ``[n]`` bools of n shapes.
        text: of one shape that does.
    """

    name: str
    refused: bool
    breaks: Callable[[ModelShape], Any]
    text: Callable[[ModelShape], str]


def check(serving: Serving, key: str) -> None:
    """Refuse sizes that are not positive.

    Args:
        key: the section's name in the message.

    Raises:
        MinitronError: naming the key.
    """
    for name in ("tensor_parallel", "row_multiple"):
        size = getattr(serving, name)
        if size is not None and size < 1:
            raise MinitronError(f"{key}.{name}: expected at least 1, found {size}")


def reasons(shape: ModelShape, serving: Serving) -> list[Reason]:
    """Why an engine would refuse ``shape`` or run it badly; empty where all is well."""
    return [
        Reason(rule.name, rule.refused, rule.text(shape)) for rule in rules(serving, shape) if bool(rule.breaks(shape))
    ]


def refusals(shapes: ModelShape, serving: Serving) -> dict[str, Any]:
    """The shapes that break each rule whose breach means refusal, as bools by the rule's name."""
    return {rule.name: rule.breaks(shapes) for rule in rules(serving, shapes) if rule.refused}


def rules(serving: Serving, model: ModelShape) -> Iterator[Rule]:
    """The rules that hold where ``serving`` says so, and the two that always do.

    Args:
        model: of its family and biases alone; its sizes may be arrays.
    """
    if serving.tensor_parallel is not None:
        yield from _split(serving.tensor_parallel)
    if serving.fp8:
        yield Rule("fp8", True, lambda s: _odd_tiles(s, serving)[0], lambda s: _odd_tiles(s, serving)[1])
    if serving.row_multiple is not None:
        yield _rows(serving.row_multiple)
    if model.family != "llama":
        return
    biases = (model.qkv_bias, model.proj_bias, model.mlp_bias)
    if biases != (True, False, False):
        way = "and its biases leave it no other class" if any(biases) else "the export is a MistralForCausalLM"
        yield Rule(
            "hidden_per_head",
            False,
            lambda s: s.hidden_size % s.num_attention_heads != 0,
            lambda s: (
                f"hidden_size {s.hidden_size} is no multiple of {s.num_attention_heads} heads: transformers 5 refuses "
                f"that of a LlamaForCausalLM, {way}"
            ),
        )
    else:  # a Qwen2
        yield Rule(
            "head_dim",
            serving.tensor_parallel is not None,
            lambda s: s.hidden_size != s.num_attention_heads * s.kv_channels,
            lambda s: (
                f"hidden_size {s.hidden_size} is not {s.num_attention_heads} heads of {s.kv_channels}, which vLLM "
                "assumes of a Qwen2ForCausalLM"
            ),
        )


def _split(gpus: int) -> Iterator[Rule]:
    for name, field in (("heads", "num_attention_heads"), ("ffn", "ffn_hidden_size")):
        yield Rule(
            name,
            True,
            lambda s, field=field: getattr(s, field) % gpus != 0,  # type: ignore[misc]
            lambda s, field=field: f"{field} {getattr(s, field)} does not divide over {gpus} GPUs",  # type: ignore[misc]
        )
    yield Rule(
        "groups",
        True,
        lambda s: (s.num_query_groups % gpus != 0) & (gpus % s.num_query_groups != 0),
        lambda s: f"num_query_groups {s.num_query_groups} neither divides over {gpus} GPUs nor they over it",
    )


def _odd_tiles(shape: ModelShape, serving: Serving) -> tuple[Any, str]:
    """Whether what one GPU holds of some matrix does not consist of Marlin's tiles, and which for one shape."""
    gpus = serving.tensor_parallel or 1
    heads, groups = shape.num_attention_heads // gpus, shape.num_query_groups // gpus
    groups = groups + (groups == 0)  # fewer groups than GPUs: each GPU has one whole
    ffn = shape.ffn_hidden_size // gpus
    sizes = {  # outputs and inputs of each matrix on one GPU
        "linear_qkv": ((heads + 2 * groups) * shape.kv_channels, shape.hidden_size),
        "linear_proj": (shape.hidden_size, heads * shape.kv_channels),
        "linear_fc1": (2 * ffn, shape.hidden_size),
        "linear_fc2": (shape.hidden_size, ffn),
    }
    odd = {name: (out % _OUTPUTS != 0) | (inner % _INPUTS != 0) for name, (out, inner) in sizes.items()}
    any_odd = odd["linear_qkv"] | odd["linear_proj"] | odd["linear_fc1"] | odd["linear_fc2"]
    if not isinstance(any_odd, bool):
        return any_odd, ""
    found = ", ".join(f"{name} {out} x {inner}" for name, (out, inner) in sizes.items() if odd[name])
    return any_odd, f"FP8 by Marlin wants multiples of {_OUTPUTS} x {_INPUTS} on each GPU, found {found}"


def _rows(multiple: int) -> Rule:
    def lengths(shape: ModelShape) -> dict[str, Any]:
        heads = shape.num_attention_heads * shape.kv_channels
        return {"hidden_size": shape.hidden_size, "ffn_hidden_size": shape.ffn_hidden_size, "heads x head_dim": heads}

    def text(shape: ModelShape) -> str:
        odd = [f"{name} {length}" for name, length in lengths(shape).items() if length % multiple]
        plural = "is no multiple" if len(odd) == 1 else "are no multiples"
        share = odd_share(shape, multiple)
        return f"{', '.join(odd)} {plural} of {multiple}: llama.cpp's K-quants store {share:.1%} of the weights larger"

    def breaks(shape: ModelShape) -> Any:
        hidden, ffn, heads = lengths(shape).values()
        return (hidden % multiple != 0) | (ffn % multiple != 0) | (heads % multiple != 0)

    return Rule("rows", False, breaks, text)


def odd_share(shape: ModelShape, multiple: int) -> float:
    """Share of the weights of all matrices that lie in rows whose length is no multiple."""
    hidden, heads, ffn = shape.hidden_size, shape.proj_columns, shape.ffn_hidden_size
    tables = 1 if shape.share_embeddings_and_output_weights else 2
    rows = {  # length of a row: values in matrices of such rows
        "hidden": (hidden, hidden * (tables * shape.vocab_size + shape.num_layers * (shape.qkv_rows + 2 * ffn))),
        "heads": (heads, shape.num_layers * hidden * heads),
        "ffn": (ffn, shape.num_layers * hidden * ffn),
    }
    return sum(n for length, n in rows.values() if length % multiple) / sum(n for _, n in rows.values())
