"""Held-out loss of a model, and what it costs to compute."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from nemo_minitron import parallel, runtime
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import ModelShape

if TYPE_CHECKING:
    from nemo_minitron.nemo.model import MinitronGPTModel


def facts(shape: ModelShape) -> dict[str, int]:
    """A model's sizes, under the names that a ``metrics.json`` has for them."""
    return {
        "num_parameters": shape.num_parameters(),
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
    }


@torch.no_grad()
def evaluate(model: MinitronGPTModel, blocks: Tensor, micro_batch_size: int = 1) -> dict[str, Any]:
    """Mean next-token loss over ``blocks`` ``[n, s+1]`` (nats/token, true vocabulary) and the model's cost.

    Blocks are unpadded, so every token counts alike. Runs at any TP and PP, data-parallel ranks take every n-th
    micro-batch. ``tokens_per_second`` is prefill over the whole job, ``peak_memory_bytes`` this rank's.

    Returns the keys of a ``metrics.json`` entry.

    Raises:
        MinitronError: the loss is not finite.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    (module,) = model.get_model_module_list()
    module.eval()
    data = parallel_state.get_data_parallel_group()
    dp, ranks = torch.distributed.get_rank(data), parallel.size(data)
    batches = list(blocks.split(micro_batch_size))[dp::ranks]
    total = torch.zeros(2, dtype=torch.float64)
    start = time.perf_counter()
    rank0 = torch.distributed.get_rank() == 0
    for block in tqdm(batches, desc="evaluate", unit="batch", disable=None if rank0 else True):
        block = block.to(runtime.device())
        batch = {"tokens": block[:, :-1].contiguous(), "labels": block[:, 1:].contiguous()}
        positions = torch.arange(block.shape[1] - 1, device=block.device).expand_as(batch["tokens"])

        def forward_step(iterator: Any, stage: torch.nn.Module, batch=batch, positions=positions) -> tuple[Tensor, Any]:
            tokens = batch["tokens"]
            output = stage(input_ids=tokens, position_ids=positions, attention_mask=None, hidden_only=True)

            def reduce(hidden: Tensor) -> tuple[Tensor, Tensor]:
                loss = model.losses(hidden, batch, torch.ones_like(tokens)).terms["lm_loss"]
                return loss.sum(), loss.double().sum()

            return output, reduce

        sums = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=module,
            num_microbatches=1,
            forward_only=True,
            seq_length=block.shape[1] - 1,
            micro_batch_size=block.shape[0],
        )
        total[0] += sum(float(part) for part in sums)  # the last stage's; others have none
        total[1] += positions.numel()
    total = total.to(runtime.device())
    total[0] = parallel.all_reduce(total[0], parallel_state.get_pipeline_model_parallel_group())
    total = parallel.all_reduce(total, data).cpu()
    seconds = time.perf_counter() - start
    loss = float(total[0] / total[1])
    if not math.isfinite(loss):
        raise MinitronError(f"val_loss is {loss}: the model's weights or its data are broken")
    return {
        "val_loss": loss,
        "perplexity": math.exp(loss),
        **facts(model.shape),
        "tokens": int(total[1]),
        "tokens_per_second": float(total[1]) / seconds,
        "peak_memory_bytes": runtime.peak_memory_bytes(),
    }
