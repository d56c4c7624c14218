"""How much of a head's logits exists at a time: chunks, blocks and columns within a budget of bytes.

:mod:`nemo_minitron.distill.fused` computes in these sizes, and :mod:`nemo_minitron.distill.memory` predicts from them
what memory it takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MEMORY_BYTES = {"cuda": 896 << 20, "cpu": 384 << 20}
"""Default budget of one call's temporaries: both sides' logits of a chunk, what computing on a block needs, and sums of
gradients in a wider dtype than theirs."""

_BLOCK_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
"""float32 logits of the tokens that losses are computed on at a time: near a CPU's caches, enough work for a GPU."""
_SHARDED_BLOCK_BYTES = 16 << 20
"""The same on CPU under tensor parallelism, where every block costs collectives."""
_BLOCKS_ALIVE = 7  # float32 copies of a block while its losses are computed (jsd has most)
_WORTHWHILE = 512  # tokens of a chunk, below which matrix products spend their time on the weights


@dataclass(frozen=True)
class Sizes:
    """What is at hand at a time within a budget of bytes: ``chunk`` tokens in matrix products with the whole head and
    ``block`` tokens of it in the losses; ``columns`` of the head in products with all tokens, 0 where every gradient
    is summed up over chunks of tokens instead."""

    chunk: int
    block: int
    columns: int
    compute: torch.dtype
    alive: int
    sums: int

    @classmethod
    def fit(
        cls,
        tokens: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: str,
        ranks: int,
        budget: int | None = None,
        *,
        halves: bool = False,
        kernels: bool = False,
        hidden_sums: int = 0,
        weight_sums: int = 0,
    ) -> Sizes:
        """The same on every rank, whatever its share of padding: all must meet in the same collectives.

        Chunks are of nearly equal sizes: a small last one would waste its matrix products.

        Args:
            halves: the loss is one of :mod:`nemo_minitron.distill.rows`, so that columns may come in pieces.
            kernels: it is computed in place.
            hidden_sums: bytes of sums of the gradient of hidden states beside the gradient itself.
            weight_sums: the same of the head's. Where they do not fit, and ``halves`` allows it, the logits are made
                twice, and the second time for some columns of all tokens: half as many products more, and no sums.
        """
        budget = budget or MEMORY_BYTES.get(device, MEMORY_BYTES["cuda"])
        compute = compute_dtype(dtype)
        width = -(-vocab_size // ranks)
        row, pair = width * compute.itemsize, 2 * width * dtype.itemsize
        alive = 0 if kernels else _BLOCKS_ALIVE
        block_bytes = (
            _SHARDED_BLOCK_BYTES if device == "cpu" and ranks > 1 else _BLOCK_BYTES.get(device, _BLOCK_BYTES["cuda"])
        )
        block = max(1, min(block_bytes, budget // (2 * _BLOCKS_ALIVE)) // row)
        left = budget - alive * block * row - hidden_sums
        columns, sums = 0, hidden_sums + weight_sums
        if halves and weight_sums and left - weight_sums < min(tokens, _WORTHWHILE) * pair:
            parts = -(-width * tokens * 2 * dtype.itemsize // max(left, 1))
            columns, sums = max(1, -(-width // parts)), hidden_sums
            columns = min(width, -(-columns // 128) * 128 if columns > 128 else columns)
        elif left - weight_sums >= pair:
            left -= weight_sums
        chunk = max(1, left // pair)
        chunk = -(-tokens // -(-tokens // chunk))
        return cls(chunk, min(block, chunk), columns, compute, alive, sums)

    def memory_bytes(self, tokens: int, vocab_size: int, dtype: torch.dtype, ranks: int) -> int:
        """Temporaries of a call that has a teacher's logits."""
        width = -(-vocab_size // ranks)
        logits = max(self.chunk * width, tokens * self.columns)
        return 2 * logits * dtype.itemsize + self.alive * self.block * width * self.compute.itemsize + self.sums


def compute_dtype(product: torch.dtype) -> torch.dtype:
    """Dtype of losses and sums, for products of a dtype."""
    return torch.float64 if product == torch.float64 else torch.float32
