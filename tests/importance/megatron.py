"""A real Megatron-Core GPTModel with given canonical weights, on this process's grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_minitron import runtime
from nemo_minitron.importance.collect import Groups, collect
from nemo_minitron.importance.reductions import Aggregation
from nemo_minitron.model import layout
from nemo_minitron.model.shape import ModelShape
from tests.canonical import Slot, random_model


def build(shape: ModelShape, tensor: int, pipeline: int, sequence_parallel: bool) -> Any:
    """This rank's part of the float32 model of ``random_model(shape)``."""
    runtime.init_distributed(tensor, pipeline)
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_minitron.nemo.spec import RMSNorm, layer_spec

    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=shape.layernorm_epsilon,
        add_bias_linear=shape.proj_bias or shape.mlp_bias,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=sequence_parallel,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[layer_spec(False, biases=_biases(shape))] * get_num_layers_to_build(config),
            layer_norm=RMSNorm,
        ),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
    )
    weights = random_model(shape).tensors
    with torch.no_grad():
        for slot, target in slots_of(model, shape).items():
            target.copy_(this_ranks_part(shape, slot, weights[slot]))
    return model


def _biases(shape: ModelShape) -> list[str]:
    there = {"linear_qkv": shape.qkv_bias, "linear_proj": shape.proj_bias}
    there |= dict.fromkeys(("linear_fc1", "linear_fc2"), shape.mlp_bias)
    return [name for name, bias in there.items() if bias]


def slots_of(model: Any, shape: ModelShape) -> dict[Slot, torch.nn.Parameter]:
    """This rank's parameters by canonical key and global layer."""
    parameters = {p.memory_name(0): p.key for p in layout.parameters(shape)}
    found: dict[Slot, torch.nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        number = [part for part in name.split(".") if part.isdigit()]
        key = parameters[name.replace(f".{number[0]}.", ".0.", 1) if number else name]
        found[key, model.decoder.layers[int(number[0])].layer_number - 1 if number else None] = parameter
    return found


def this_ranks_part(shape: ModelShape, slot: Slot, whole: Tensor) -> Tensor:
    """This tensor-parallel rank's part of a canonical tensor."""
    from megatron.core import parallel_state

    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    parameter = next(p for p in layout.parameters(shape) if p.key == slot[0])
    if parameter.tp_dim is None:
        return whole
    halves = whole.chunk(2) if parameter.axes[0] == layout.GATE_UP else (whole,)
    return torch.cat([half.chunk(size, dim=parameter.tp_dim)[rank] for half in halves])


def scores_on_grid(
    shape: ModelShape,
    tokens: Tensor,
    mask: Tensor | None,
    micro_batch: int,
    grid: tuple[int, int, bool],
    aggregation: Aggregation,
) -> Any:
    """``collect`` on this rank of a (TP, PP, SP) grid; data-parallel ranks take every n-th micro-batch."""
    model = build(shape, *grid)
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def schedule(batch: Tensor) -> None:
        def step(_: Any, stage: Any) -> Any:
            positions = torch.arange(batch.shape[1]).expand_as(batch)
            return stage(input_ids=batch, position_ids=positions, attention_mask=None), lambda out: (out.sum(), {})

        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=model,
            num_microbatches=1,
            forward_only=True,
            seq_length=batch.shape[1],
            micro_batch_size=batch.shape[0],
        )

    dp, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    parts = [part for part in tokens.split(micro_batch) if len(part)][dp::ranks]
    masks = [None] * len(parts) if mask is None else list(mask.split(micro_batch))[dp::ranks][: len(parts)]
    batches = [part if m is None else (part, m) for part, m in zip(parts, masks, strict=True)]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    result = collect(
        model,
        batches,
        shape,
        groups=Groups(
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
            parallel_state.get_data_parallel_group(),
        ),
        sequence_parallel=grid[2],
        aggregation=aggregation,
        forward=schedule if grid[1] > 1 else None,
    )
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert model.training
    return result
