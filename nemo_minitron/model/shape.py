"""The shape of a Llama-type decoder: what every other module asks for a size.

Legend used throughout the package: ``L`` layers, ``H`` hidden_size, ``F`` ffn_hidden_size, ``A`` attention heads,
``G`` query groups (KV heads), ``d`` kv_channels (head_dim), ``V`` true vocabulary, ``Vp`` padded vocabulary,
``s`` sequence, ``b`` micro-batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_minitron.config.sections import Budget
from nemo_minitron.errors import MinitronError
from nemo_minitron.registry import FAMILIES

_ALWAYS = object()
_NEWER = {"proj_bias": False, "mlp_bias": False, "family": "llama", "sliding_window": None}
"""Fields that came after files were written, with what was meant before."""
_SPLIT = ("num_query_groups", "num_attention_heads", "ffn_hidden_size")
"""Sizes that tensor parallelism divides, beside the padded vocabulary."""
_LINEAR = "linear"


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1 RoPE scaling: the four numbers of HF's ``rope_scaling: {rope_type: llama3}``.

    For an inverse frequency f of wavelength w = 2*pi/f and c = ``original_max_position_embeddings``:
    f is kept if w < c/high, divided by ``factor`` if w > c/low, and interpolated in between
    (upstream: transformers ``_compute_llama3_parameters``, NeMo ``apply_rope_scaling``).
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LinearScaling:
    """Linear RoPE scaling: every position counts ``factor`` times less, which divides all frequencies by it.

    Upstream: HF's ``rope_scaling: {rope_type: linear}``, Megatron-Core's ``seq_len_interpolation_factor``.
    """

    factor: float


Scaling = RopeScaling | LinearScaling
"""How the frequencies of RoPE are made to reach further than its base alone."""


@dataclass(frozen=True)
class ModelShape:
    """Architecture of one model, independent of precision and of any parallel grid.

    ``kv_channels`` (head_dim) is explicit: a width-pruned model has ``kv_channels != hidden_size / heads``.
    ``vocab_size`` is the tokenizer's true vocabulary V, ``padded_vocab_size`` the rows of the embedding table Vp;
    counts of parameters use V, counts of memory use Vp. ``family`` names the family whose layers these are where a
    Llama's, with or without biases, are not what it has (:attr:`nemo_minitron.model.family.Family.layers`).
    ``qkv_bias``, ``proj_bias`` and ``mlp_bias`` say which linear layers have a bias: queries, keys and values; the
    attention's output; gate, up and down.
    ``sliding_window`` is how many tokens, itself included, a token attends to; None for all before it. It is kept, not
    computed: sequences may be no longer (:meth:`check_window`), and within it every layer computes the same without.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    padded_vocab_size: int
    share_embeddings_and_output_weights: bool = False
    rotary_base: float = 10000.0
    rope_scaling: Scaling | None = None
    max_position_embeddings: int = 2048
    layernorm_epsilon: float = 1e-5
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    family: str = "llama"
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise MinitronError(f"{name} must be a positive integer, found {value!r}")
        if self.num_attention_heads % self.num_query_groups:
            raise MinitronError(
                f"num_query_groups ({self.num_query_groups}) must divide "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.padded_vocab_size < self.vocab_size:
            raise MinitronError(
                f"padded_vocab_size ({self.padded_vocab_size}) must be at least vocab_size ({self.vocab_size})"
            )
        window = self.sliding_window
        if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
            raise MinitronError(f"sliding_window must be a positive integer or null, found {window!r}")
        if self.kv_channels % 2:
            raise MinitronError(f"kv_channels ({self.kv_channels}) must be even for rotary embeddings")
        if self.family != "llama":
            FAMILIES.get(self.family)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head: r = A/G."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused ``linear_qkv``: (A + 2G) * d."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def proj_columns(self) -> int:
        """Columns of ``linear_proj``: A * d."""
        return self.num_attention_heads * self.kv_channels

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence whose positions there are and that the window holds whole."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    def check_window(self, length: int, what: str) -> None:
        """Refuse a sequence that is longer than the window.

        Args:
            what: begins the message: the key that asks for ``length`` tokens.

        Raises:
            MinitronError: naming both numbers.
        """
        if self.sliding_window is not None and length > self.sliding_window:
            raise MinitronError(
                f"{what} ({length}) is longer than the checkpoint's sliding_window ({self.sliding_window}); attention "
                "over a part of the sequence is not supported"
            )

    def check_same(self, other: ModelShape, what: str) -> None:
        """Refuse another architecture.

        Args:
            what: begins the message: what this shape is of.

        Raises:
            MinitronError: naming the first size that differs.
        """
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                raise MinitronError(
                    f"{what} a model with {field.name} {mine!s:.80}, but this checkpoint has {theirs!s:.80}"
                )

    def replace(self, **changes: object) -> ModelShape:
        """Return a checked copy with ``changes`` applied."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file; without the newer of its fields where they say nothing, as older files had it."""
        values = dataclasses.asdict(self)
        if isinstance(self.rope_scaling, LinearScaling):
            values["rope_scaling"] = {"rope_type": _LINEAR, **values["rope_scaling"]}
        return {name: value for name, value in values.items() if _NEWER.get(name, _ALWAYS) != value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelShape:
        """Inverse of :meth:`to_dict`; an unknown or missing name is a ``TypeError``."""
        values = dict(values)
        scaling = dict(values.pop("rope_scaling", None) or {})
        kind = LinearScaling if scaling.pop("rope_type", None) == _LINEAR else RopeScaling
        return cls(**values, rope_scaling=kind(**scaling) if scaling else None)

    def check_parallel(self, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> None:
        """Refuse a grid that cannot hold this shape, naming both numbers.

        TP must divide groups (QKV is split by group), heads, ffn and the padded vocabulary; every pipeline stage
        needs a layer.
        """
        for name in (*_SPLIT, "padded_vocab_size"):
            if getattr(self, name) % tensor_parallel:
                raise MinitronError(
                    f"model.tensor_model_parallel_size ({tensor_parallel}) must divide {name} ({getattr(self, name)})"
                )
        if self.num_layers < pipeline_parallel:
            raise MinitronError(
                f"model.pipeline_model_parallel_size ({pipeline_parallel}) must be at most num_layers "
                f"({self.num_layers})"
            )

    def splits_over(self, tensor_parallel: int) -> bool:
        """Whether TP divides every size but the padded vocabulary, which is padded anew for each grid."""
        return all(getattr(self, name) % tensor_parallel == 0 for name in _SPLIT)

    def first_stage_layers(self, pipeline_parallel: int) -> int | None:
        """Layers of the first pipeline stage where the stages cannot be equal; None where they can.

        NeMo wants ``num_layers % PP == 0`` unless ``num_layers_in_first_pipeline_stage`` says otherwise; the other
        stages then share the rest equally. The first stage, which also has the embedding, is the smaller one where
        that leaves it a layer.
        """
        if self.num_layers % pipeline_parallel == 0:
            return None
        others = -(-self.num_layers // pipeline_parallel)
        if self.num_layers - others * (pipeline_parallel - 1) < 1:
            others -= 1
        return self.num_layers - others * (pipeline_parallel - 1)

    def num_parameters(self, padded: bool = False) -> int:
        """Parameters, each shared tensor counted once; the vocabulary is the true one unless ``padded``."""
        vocab = self.padded_vocab_size if padded else self.vocab_size
        tables = 1 if self.share_embeddings_and_output_weights else 2
        return tables * vocab * self.hidden_size + self.hidden_size + self.num_layers * self.parameters_per_layer()

    def parameters_per_layer(self) -> int:
        """Parameters of one decoder layer: QKV, projection, gate/up/down, their biases, two norms, a family's own."""
        attention = self.hidden_size * (self.qkv_rows + self.proj_columns) + (self.qkv_rows if self.qkv_bias else 0)
        biases = self.whole_biases() + (2 * self.ffn_hidden_size if self.mlp_bias else 0)
        own = (
            0 if self.family == "llama" else sum(math.prod(p.size(self)) for p in FAMILIES.get(self.family).parameters)
        )
        return attention + biases + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size + own

    def layers_of_head(self) -> int:
        """Number of layers that take as long as the output layer: 8 of SmolLM2-135M's, 2 of Llama-3.1-8B's."""
        return round(self.vocab_size * self.hidden_size / self.parameters_per_layer())

    def whole_biases(self) -> int:
        """Values in the biases of one layer that every tensor-parallel rank holds whole: those of the two linear
        layers that write to the residual stream."""
        return (self.proj_bias + self.mlp_bias) * self.hidden_size

    def forward_flops_per_token(self, seq_length: int) -> float:
        """Multiply-adds counted as 2, dense causal attention averaged over positions, head included."""
        matmul = self.hidden_size * (self.qkv_rows + self.proj_columns + 3 * self.ffn_hidden_size)
        attention = seq_length * self.proj_columns  # QK^T and AV, each s/2 keys on average
        return 2.0 * (self.num_layers * (matmul + attention) + self.hidden_size * self.padded_vocab_size)

    def kv_cache_bytes_per_token(self, bytes_per_value: int = Budget.bytes_per_value) -> int:
        """Keys and values of every layer for one token."""
        return 2 * self.num_layers * self.num_query_groups * self.kv_channels * bytes_per_value


_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "padded_vocab_size",
    "max_position_embeddings",
)


def shape_of(model: Mapping[str, Any], rope_scaling: Scaling | None = None) -> ModelShape:
    """:class:`ModelShape` from NeMo's keys, for instance those of ``conf/model/*.yaml``.

    Args:
        rope_scaling: where ``model`` does not say any.

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
    if model.get("bias"):  # NeMo's: of every linear layer
        values |= dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias"), True)
    if model.get("scale_positional_embedding"):
        values["rope_scaling"] = RopeScaling(
            model.get("scale_factor", 8.0),
            model.get("low_freq_factor", 1.0),
            model.get("high_freq_factor", 4.0),
            model.get("old_context_len", 8192),
        )
    elif model.get("seq_len_interpolation_factor") not in (None, 1):
        values["rope_scaling"] = LinearScaling(float(model["seq_len_interpolation_factor"]))
    elif model.get("scale_positional_embedding") is None:
        values["rope_scaling"] = rope_scaling
    return ModelShape(**{name: value for name, value in values.items() if value is not None})
