"""Models as canonical tensors, and the same models in transformers in float64: the independent reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_minitron.model import layout
from nemo_minitron.model.layout import Parameter
from nemo_minitron.model.shape import ModelShape

FINGERPRINT = "f" * 64
Slot = tuple[str, int | None]


class Memory:
    """A checkpoint in memory, with the reader's and the writer's interface."""

    def __init__(self, shape: ModelShape, tensors: dict[Slot, Tensor] | None = None) -> None:
        self.shape, self.tensors = shape, {} if tensors is None else tensors

    def tensor(self, parameter: Parameter, layer: int | None = None) -> Tensor:
        return self.tensors[parameter.key, layer]

    def write(self, parameter: Parameter, tensor: Tensor, layer: int | None = None) -> None:
        assert tuple(tensor.shape) == parameter.size(self.shape)
        self.tensors[parameter.key, layer] = tensor

    def fingerprint(self) -> str:
        return FINGERPRINT


def slots(shape: ModelShape) -> list[tuple[Parameter, int | None]]:
    """Every tensor of a model, in forward order."""
    return [
        (parameter, layer)
        for parameter in layout.parameters(shape)
        for layer in (range(shape.num_layers) if parameter.per_layer else (None,))
    ]


def random_model(shape: ModelShape, seed: int = 0) -> Memory:
    """Float64 weights of unit-scale outputs, norms near 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[Slot, Tensor] = {}
    for parameter, layer in slots(shape):
        size = parameter.size(shape)
        tensor = torch.randn(size, generator=generator, dtype=torch.float64)
        if parameter.key.endswith("bias"):
            tensors[parameter.key, layer] = 0.5 * tensor
        else:
            tensors[parameter.key, layer] = 1 + 0.2 * tensor if len(size) == 1 else tensor / math.sqrt(size[-1])
    return Memory(shape, tensors)


def to_transformers(model: Memory, eps: float | None = None) -> LlamaForCausalLM:
    """Transformers' model with these weights, float64; QKV taken apart by an independent walk over group cells."""
    shape = model.shape
    eps = shape.layernorm_epsilon if eps is None else eps
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.padded_vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_query_groups,
            head_dim=shape.kv_channels,
            rope_theta=shape.rotary_base,
            tie_word_embeddings=False,
            attention_bias=shape.qkv_bias,
            mlp_bias=shape.mlp_bias,
            attn_implementation="eager",
        )
    )
    for module in [reference.model, *reference.model.layers]:  # transformers' own norm rounds to float32
        for name in [name for name, _ in module.named_children()]:
            if name.endswith("norm"):
                setattr(module, name, torch.nn.RMSNorm(shape.hidden_size, eps=eps))
    reference.to(torch.float64)
    get = {(key.rsplit(".layers.")[-1], layer): value for (key, layer), value in model.tensors.items()}
    state = {
        "model.embed_tokens.weight": get["embedding.word_embeddings.weight", None],
        "model.norm.weight": get["decoder.final_layernorm.weight", None],
        "lm_head.weight": get["output_layer.weight", None],
    }
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        state |= _biases(get, shape, layer, prefix)
        queries, keys, values = [], [], []
        for group in get["self_attention.linear_qkv.weight", layer].chunk(shape.num_query_groups):
            cells = group.split(shape.kv_channels)
            queries += cells[:-2]
            keys.append(cells[-2])
            values.append(cells[-1])
        gate, up = get["mlp.linear_fc1.weight", layer].chunk(2)
        state |= {
            prefix + "self_attn.q_proj.weight": torch.cat(queries),
            prefix + "self_attn.k_proj.weight": torch.cat(keys),
            prefix + "self_attn.v_proj.weight": torch.cat(values),
            prefix + "self_attn.o_proj.weight": get["self_attention.linear_proj.weight", layer],
            prefix + "mlp.gate_proj.weight": gate,
            prefix + "mlp.up_proj.weight": up,
            prefix + "mlp.down_proj.weight": get["mlp.linear_fc2.weight", layer],
            prefix + "input_layernorm.weight": get["self_attention.linear_qkv.layer_norm_weight", layer],
            prefix + "post_attention_layernorm.weight": get["mlp.linear_fc1.layer_norm_weight", layer],
        }
    reference.load_state_dict(state)
    return reference.eval()


def _biases(get: dict[Slot, Tensor], shape: ModelShape, layer: int, prefix: str) -> dict[str, Tensor]:
    """Biases by transformers' names, zeros for an attention's output that has none beside QKV's."""
    found = {}
    if shape.qkv_bias:
        cells = get["self_attention.linear_qkv.bias", layer].view(shape.num_query_groups, -1, shape.kv_channels)
        parts = zip("qkv", (cells[:, :-2], cells[:, -2], cells[:, -1]), strict=True)
        found |= {prefix + f"self_attn.{name}_proj.bias": part.flatten() for name, part in parts}
        zeros = torch.zeros(shape.hidden_size, dtype=torch.float64)
        found[prefix + "self_attn.o_proj.bias"] = get.get(("self_attention.linear_proj.bias", layer), zeros)
    if shape.mlp_bias:
        gate, up = get["mlp.linear_fc1.bias", layer].chunk(2)
        found |= {prefix + "mlp.gate_proj.bias": gate, prefix + "mlp.up_proj.bias": up}
        found[prefix + "mlp.down_proj.bias"] = get["mlp.linear_fc2.bias", layer]
    return found


@torch.no_grad()
def logits(model: Memory, eps: float | None = None) -> Tensor:
    """Logits ``[1, 17, Vp]`` of a fixed token sequence."""
    tokens = torch.arange(17)[None] * 7 % model.shape.vocab_size
    return to_transformers(model, eps)(tokens).logits
