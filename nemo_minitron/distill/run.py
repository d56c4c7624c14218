"""What decides the memory of a distillation or fine-tuning run: shapes, grid, batch, precision, optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.model.shape import ModelShape


@dataclass(frozen=True)
class Run:
    """One run, on one of its ranks.

    Attributes:
        teacher: None where there is none, or where a cache stands for it.
        micro_batches: of one rank in one step.
        half: products run in bfloat16. half_weights: weights are kept in it (``model.megatron_amp_O2``), with float32
            copies unless ``lean``.
        sharded_optimizer: data-parallel ranks share the optimizer's state.
        lean: ``model.optim.name=adamw_8bit``: moments in 8 bits, gradients in the weights' dtype, no float32 copy.
        recompute: full activation recomputation, in groups of ``recompute_layers`` layers; or, with
            ``recompute_block``, of the first ``recompute_layers`` layers alone. Selective recomputation, which is of
            the attention proper, keeps as much as none of it does, and counts as none.
        documents_apart: attention gets a mask of documents (``model.data.reset_attention_mask``); positions_restart:
            every token has its own row of RoPE's tables (``model.data.reset_position_ids``).
        fused_norms: norms and attention are Transformer Engine's.
        fused_swiglu: the gate and its product are one kernel (``model.bias_activation_fusion``).
        process: bytes that are there before any model: libraries, CUDA's context.
        loss_memory: bound of the loss's temporaries in bytes; None for the device's default.
    """

    student: ModelShape
    teacher: ModelShape | None
    seq_length: int
    micro_batch_size: int
    micro_batches: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    sequence_parallel: bool = False
    half: bool = False
    half_weights: bool = False
    sharded_optimizer: bool = False
    lean: bool = False
    recompute: bool = False
    recompute_block: bool = False
    recompute_layers: int = 1
    documents_apart: bool = False
    positions_restart: bool = False
    fused_norms: bool = False
    fused_swiglu: bool = False
    device: str = "cpu"
    process: int = 0
    loss_memory: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.seq_length * self.micro_batch_size

    @property
    def pairs(self) -> int:
        """Pairs of tokens of a micro-batch's samples, each of which a mask of documents has a value for."""
        return self.seq_length * self.tokens if self.documents_apart else 0

    @property
    def value(self) -> int:
        """Bytes of a value that a product takes or gives."""
        return 2 if self.half else 4

    @property
    def weight(self) -> int:
        """Bytes of a weight."""
        return 2 if self.half_weights else 4

    @property
    def stream_ranks(self) -> int:
        """Ranks that share the residual stream's tokens."""
        return self.tensor_parallel if self.sequence_parallel else 1

    @property
    def norms_in_one_kernel(self) -> bool:
        """Whether a norm keeps its input and one number a row: Transformer Engine's, and torch's own on CUDA where
        weight and input have one dtype. Elsewhere torch computes it in float32, step by step."""
        return self.fused_norms or (self.device == "cuda" and self.half == self.half_weights)
