"""Transformer layer specs: Transformer Engine when it is there, otherwise plain torch modules that run anywhere."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Collection
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported (its presence is asked, it is not loaded)."""
    return importlib.util.find_spec("transformer_engine") is not None


class SDPACoreAttention(MegatronModule):
    """Core attention by ``torch.nn.functional.scaled_dot_product_attention``; no ``[s, s]`` tensor is kept.

    Stands where Megatron-Core's ``DotProductAttention`` would: heads are sharded over the tensor-parallel group,
    ``query [s, b, A/tp, d]``, ``key`` and ``value [s, b, G/tp, d]`` → ``[s, b, A*d/tp]``, in the inputs' dtype.
    Causal, or by an explicit boolean mask ``[b, 1, s, s]`` in which True means masked (Megatron's convention).
    Context parallelism, packed sequences and sliding windows need Transformer Engine and are refused.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        model_comm_pgs: object | None = None,  # Megatron-Core to 0.14: ModelCommProcessGroups
        pg_collection: object | None = None,  # from 0.15: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size != 1 or config.window_size is not None:
            raise ValueError("context_parallel_size > 1 and sliding windows need Transformer Engine's attention")
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError("packed sequences and attention bias need Transformer Engine's attention")
        s, b, heads, d = query.shape
        if value.shape[2] != heads:
            repeat = heads // value.shape[2]
            key, value = key.repeat_interleave(repeat, dim=2), value.repeat_interleave(repeat, dim=2)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None and s > 1,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm ``[s, b, h] → [s, b, h]`` that marks its weight for Megatron's sequence-parallel gradient reduction.

    Under sequence parallelism each rank normalises its own slice of the sequence, so the weight gradients must be
    summed over the tensor-parallel group; Megatron does that for parameters with ``sequence_parallel = True``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class HeadNorm(RMSNorm):
    """RMSNorm of every query or key, ``[s, b, heads/tp, d]``, with one weight ``[d]`` for the heads of all ranks.

    A rank's gradient is that of its own heads, which have to be added over the tensor-parallel group. Megatron's
    ``finalize_model_grads`` does so for the names that these norms have; without it, it is done here.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(config, hidden_size, eps=eps)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]  # every rank has the whole sequence here
        self._config = config

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self._config.finalize_model_grads_func is None:
            weight = copy_to_tensor_model_parallel_region(weight)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def layer_spec(
    transformer_engine: bool, qk_layernorm: bool = False, biases: Collection[str] | None = None
) -> ModuleSpec:
    """Spec of one decoder layer.

    Args:
        transformer_engine: whether to take TE's fused modules.
        qk_layernorm: Megatron's ``TransformerConfig.qk_layernorm``: whether queries and keys pass a norm before RoPE.
        biases: which of ``linear_qkv``, ``linear_proj``, ``linear_fc1`` and ``linear_fc2`` have a bias, where
            Megatron's ``add_bias_linear`` gives all of them one; None: what it says.
    """
    if transformer_engine:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.self_attention.submodules.core_attention = SDPACoreAttention
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
    if qk_layernorm:
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = HeadNorm
    if biases is not None:
        for part in (spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules):
            for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
                if hasattr(part, name) and name not in biases:
                    setattr(part, name, _without_bias(getattr(part, name)))
    return spec


def _without_bias(linear: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """A linear layer of Megatron's that never has a bias, whatever the config of the whole model says."""

    class WithoutBias(linear):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, bias: bool, **options: Any) -> None:
            super().__init__(*args, bias=False, **options)

    WithoutBias.__name__ = WithoutBias.__qualname__ = linear.__name__
    return WithoutBias
