"""Held-out loss of a model, and what it costs to compute."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_minitron import parallel, runtime
from nemo_minitron.config.sections import Evaluate
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.nemo.scoring import forward_micro_batch, micro_batches

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
def evaluate(
    model: MinitronGPTModel,
    blocks: Tensor,
    micro_batch_size: int = Evaluate.micro_batch_size,
    counts: Tensor | None = None,
) -> dict[str, Any]:
    """Mean next-token loss over ``blocks`` ``[n, s+1]`` (nats/token, true vocabulary) and the model's size.

    Every token counts alike, or those where ``counts [n, s+1]`` is 1, not 0; ``tokens`` says how many did, and ``text``
    is the same for the same blocks and counts, in hex. Blocks are unpadded. Runs at any TP and PP, data-parallel ranks
    take every n-th micro-batch. ``peak_memory_bytes`` is this rank's. How long it took is not kept: a pass that nothing
    warmed or repeated says little of speed, which
    :mod:`nemo_minitron.evaluate.throughput` measures.

    Returns the keys of a ``metrics.json`` entry.

    Raises:
        MinitronError: the loss is not finite.
    """
    from megatron.core import parallel_state

    (stage,) = model.get_model_module_list()
    stage.eval()
    total = torch.zeros(2, dtype=torch.float64)
    pairs = torch.stack((blocks, torch.ones_like(blocks) if counts is None else counts), dim=1)
    for pair in micro_batches(pairs, micro_batch_size, "evaluate"):
        block, weights = pair[:, 0], pair[:, 1, 1:].contiguous()
        tokens, labels = block[:, :-1].contiguous(), block[:, 1:].contiguous()

        def loss_sum(
            hidden: Tensor, tokens: Tensor = tokens, labels: Tensor = labels, weights: Tensor = weights
        ) -> float:
            terms = model.losses(hidden, {"tokens": tokens, "labels": labels}, torch.ones_like(tokens)).terms
            return float((terms["lm_loss"].double() * weights).sum())

        total[0] += forward_micro_batch(stage, tokens, loss_sum, hidden_only=True) or 0.0  # None before the last stage
        total[1] += int(weights.sum())
    total = total.to(runtime.device())
    total[0] = parallel.all_reduce(total[0], parallel_state.get_pipeline_model_parallel_group())
    total = parallel.all_reduce(total, parallel_state.get_data_parallel_group()).cpu()
    loss = float(total[0] / total[1])
    if not math.isfinite(loss):
        raise MinitronError(f"val_loss is {loss}: the model's weights or its data are broken")
    return {
        "val_loss": loss,
        "perplexity": math.exp(loss),
        **facts(model.shape),
        "tokens": int(total[1]),
        "text": _digest(blocks, counts),
        "peak_memory_bytes": runtime.peak_memory_bytes(),
    }


def _digest(blocks: Tensor, counts: Tensor | None) -> str:
    """48 bits of a hash of what is read and what counts, in hex."""
    digest = hashlib.sha256(blocks.cpu().contiguous().numpy().data)
    if counts is not None and not bool(counts[:, 1:].all()):
        digest.update(counts.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:12]
