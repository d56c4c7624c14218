"""A family of models: all that the package asks about one, in one value.

``model/families/NAME.py`` holds one as ``FAMILY``, and so does a user's file that ``extensions=[./mine.py]`` names;
docs/extending.md writes one. What a family does not say is a Llama's: pre-norm layers of RMSNorm, grouped-query
attention with RoPE and SwiGLU, no biases but those that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from nemo_minitron.errors import MinitronError
from nemo_minitron.model.parameter import FFN, GATE_UP, HEAD, PROJ, QKV, Parameter
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.registry import FAMILIES

_AXES = (HEAD, PROJ, QKV, FFN, GATE_UP)
PLAIN = "llama"
"""The family whose layers have nothing of their own."""


class LayerWeights(Protocol):
    """Canonical tensors of one layer by their rows of the table (:class:`nemo_minitron.model.decoder.Layer`)."""

    @property
    def shape(self) -> ModelShape: ...
    def __getitem__(self, parameter: Parameter) -> Tensor: ...


Biases = tuple[bool, bool, bool]
"""``ModelShape``'s ``qkv_bias``, ``proj_bias`` and ``mlp_bias``."""

QueriesAndKeys = Callable[[LayerWeights, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps queries ``[b, A, s, d]`` and keys ``[b, G, s, d]`` before RoPE to others of the same sizes, by torch operations
with a gradient, each head and token by itself: a head that is cut must not change the ones that stay."""


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: of its file, and in scores, plans and ``.nemo`` files of models whose :attr:`layers` are its own.
        architecture, model_type: HF's ``architectures[0]`` and ``model_type``.
        hf_absent: what transformers assumes where ``config.json`` is silent, and for a Llama would not.
        hf_only: keys of ``config.json`` with the values under which the layers compute what is built here; any other
            value is refused. Added to the keys that :data:`nemo_minitron.checkpoint.known.HF` has for all families.
        hf_neutral: keys that mean nothing in this family, under the values that ``hf_only`` and the rest leave it.
        hf_fresh: keys of a ``config.json`` that is made where a model has none to begin with.
        qkv_bias: whether queries, keys and values always have a bias.
        hf_biases: those of the keys ``attention_bias`` and ``mlp_bias`` of ``config.json`` that its models heed: with
            the first, queries, keys, values and the attention's output have a bias, with the second gate, up and down.
            What is not named must be off.
        hf_window: whether ``sliding_window`` of ``config.json`` is the window of all its layers; else it must be null.
        parameters: further rows of one layer (:class:`nemo_minitron.model.parameter.Parameter`): names, HF names,
            fusing, the axes along which pruning cuts, the dimension that tensor parallelism splits. ``per_layer`` all.
        queries_and_keys: what is done to queries and keys before RoPE; None for nothing.
        nemo: keys of NeMo's ``model_config.yaml`` with the values that make NeMo's model class and Megatron's
            ``TransformerConfig`` build these layers (``qk_layernorm: true``), beside ``qkv_bias``. They are written,
            required and handed on, and by them the family of a NeMo model is recognised.
        gguf: ``general.architecture`` of its GGUF files; None where they are not read.
        gguf_names: further names of a layer's GGUF tensors, ``attn_q_norm: self_attn.q_norm``.
        gguf_permuted: whether llama.cpp stores the rows of queries and keys in pairs for an interleaved RoPE.

    Raises:
        MinitronError: from the constructor, for a row that cannot be cut, split or stacked.
    """

    name: str
    architecture: str
    model_type: str
    hf_absent: Mapping[str, Any] = field(default_factory=dict)
    hf_only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    hf_neutral: tuple[str, ...] = ()
    hf_fresh: Mapping[str, Any] = field(default_factory=dict)
    hf_window: bool = False
    qkv_bias: bool = False
    hf_biases: tuple[str, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    queries_and_keys: QueriesAndKeys | None = None
    nemo: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    gguf: str | None = None
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    gguf_permuted: bool = False

    def __post_init__(self) -> None:
        for parameter in self.parameters:
            odd = [axis for axis in parameter.axes if axis not in _AXES]
            if odd:  # hidden channels are turned and solved together with what reads and writes them
                raise MinitronError(f"{parameter.key}: axes must be some of {', '.join(_AXES)}, found '{odd[0]}'")
            if not parameter.per_layer or not parameter.key.startswith("decoder.layers."):
                raise MinitronError(f"{parameter.key}: expected a parameter of each layer, 'decoder.layers.…'")

    def has_biases(self, biases: Biases, zeros: bool = False) -> bool:
        """Whether there are models of this family with biases on QKV, on the attention's output, and in the MLP.

        Args:
            zeros: count those whose bias of the attention's output is there and zero, which is as good as none.
        """
        qkv, proj, mlp = biases
        optional = "attention_bias" in self.hf_biases
        attention = proj == qkv or (zeros and qkv) if optional else (qkv, proj) == (self.qkv_bias, False)
        return attention and (not mlp or "mlp_bias" in self.hf_biases)

    @property
    def layers(self) -> str:
        """``ModelShape.family`` of its models: its name where its layers are its own, ``llama`` where a bias at most
        tells them from a Llama's."""
        return self.name if self.parameters or self.queries_and_keys or self.nemo else PLAIN


def family_of(shape: ModelShape) -> Family:
    """The family whose layers a model of this shape has."""
    family: Family = FAMILIES.get(shape.family)
    return family
