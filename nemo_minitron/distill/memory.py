"""Memory of a distillation run per rank, from shapes, grid and batch alone: nothing is built.

Counts what this package's own path holds: each item is written as the tensors that it consists of. Legend: n tokens of
a micro-batch, H hidden, F ffn, A·d attention width, V padded vocabulary, t tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nemo_minitron.distill.sizes import Sizes
from nemo_minitron.model.family import family_of
from nemo_minitron.model.shape import ModelShape

ITEMS = ("process", "weights", "gradients", "optimizer", "activations", "teacher", "loss")


@dataclass(frozen=True)
class Run:
    """What decides a run's memory.

    ``process`` are bytes that are there before any model (libraries; 0 where a GPU's own memory is meant), ``half``
    that products run in bfloat16, ``half_weights`` that weights are kept in it (megatron_amp_O2), ``sharded_optimizer``
    that data-parallel ranks share the optimizer's state, ``recompute`` full activation recomputation, ``fused_norms``
    that norms and attention are Transformer Engine's.
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
    recompute: bool = False
    fused_norms: bool = False
    device: str = "cpu"
    process: int = 0
    loss_memory: int | None = None


def memory(run: Run) -> dict[str, int]:
    """Bytes per rank by item (:data:`ITEMS`), of the rank that needs most; their sum is the peak of a step."""
    weight = 2 if run.half_weights else 4
    own = max(_parameters(run.student, run, stage) for stage in (0, run.pipeline_parallel - 1))
    shards = run.data_parallel if run.sharded_optimizer else 1
    states = (12 if run.half_weights else 8) * own // shards
    gradients = 4 * own
    activations, loss = _activations(run), _loss(run)
    if run.micro_batches == 1 and not run.half_weights:
        # gradients come as activations go: what is there at once is the larger of both, less the head's own part
        activations = max(0, activations - gradients)
    return {
        "process": run.process,
        "weights": weight * own,
        "gradients": gradients,
        "optimizer": states,
        "activations": activations,
        "teacher": 0 if run.teacher is None else _teacher(run, run.teacher),
        "loss": loss,
    }


def largest_micro_batch(run: Run, available: int) -> int:
    """Largest micro-batch size that fits in ``available`` bytes; 0 where none does."""
    fits = 0
    low, high = 1, 1 << 14
    while low <= high:
        middle = (low + high) // 2
        if sum(memory(replace(run, micro_batch_size=middle)).values()) <= available:
            fits, low = middle, middle + 1
        else:
            high = middle - 1
    return fits


def layer_activations(shape: ModelShape, run: Run) -> int:
    """Bytes that one layer keeps of a micro-batch for backward.

    Per token, in values: two norms with their inputs, normalised inputs and outputs (3 H each; 2 H where fused); the
    attention's queries, keys, values (repeated to all heads), result and the projection's input (5 A·d); fc1's two
    halves, the gate's activation and the product (4 F). Norms of queries and keys keep what they get, the output of
    ``linear_qkv``, and, where they are not fused, it normalised, with three numbers for each head.
    """
    tokens = run.seq_length * run.micro_batch_size
    hidden = (4 if run.fused_norms else 6) * shape.hidden_size / (run.tensor_parallel if run.sequence_parallel else 1)
    if run.recompute:
        return int(tokens * 4 * shape.hidden_size / (run.tensor_parallel if run.sequence_parallel else 1))
    parts = (5 * shape.proj_columns + 4 * shape.ffn_hidden_size) / run.tensor_parallel
    if family_of(shape).queries_and_keys is not None:
        heads = shape.num_attention_heads + shape.num_query_groups
        normalised = 0 if run.fused_norms else heads * (shape.kv_channels + 3)
        parts += (shape.qkv_rows + normalised) / run.tensor_parallel
    return int(tokens * (4 * hidden + (2 if run.half else 4) * parts))


def _parameters(shape: ModelShape, run: Run, stage: int) -> int:
    """Parameters of a rank of one pipeline stage; norms, and biases that write to the stream, are whole on each."""
    layers = _layers(shape, run, stage)
    last = stage == run.pipeline_parallel - 1
    tables = int(stage == 0) + int(last and not (shape.share_embeddings_and_output_weights and stage == 0))
    whole = (2 * layers + int(last)) * shape.hidden_size + layers * shape.whole_biases()
    matrices = layers * (shape.parameters_per_layer() - 2 * shape.hidden_size - shape.whole_biases())
    return (matrices + tables * _padded(shape, run) * shape.hidden_size) // run.tensor_parallel + whole


def _padded(shape: ModelShape, run: Run) -> int:
    multiple = 128 * run.tensor_parallel
    return -(-shape.vocab_size // multiple) * multiple


def _layers(shape: ModelShape, run: Run, stage: int) -> int:
    first = shape.first_stage_layers(run.pipeline_parallel)
    if first is None:
        return shape.num_layers // run.pipeline_parallel
    return first if stage == 0 else (shape.num_layers - first) // (run.pipeline_parallel - 1)


def _activations(run: Run) -> int:
    """Activations of the micro-batches in flight: as many as there are stages on the first one."""
    layers = max(_layers(run.student, run, stage) for stage in (0, run.pipeline_parallel - 1))
    in_flight = min(run.pipeline_parallel, run.micro_batches)
    kept = layers * layer_activations(run.student, run) * in_flight
    if run.recompute:
        kept += layer_activations(run.student, replace(run, recompute=False))
    tokens = run.seq_length * run.micro_batch_size
    return kept + 4 * 3 * tokens * run.student.hidden_size  # the final norm


def _teacher(run: Run, shape: ModelShape) -> int:
    """Weights, and final hidden states of the step's micro-batches."""
    split = run.tensor_parallel
    if not shape.splits_over(split):
        run = replace(run, tensor_parallel=1, sequence_parallel=False)
    own = max(_parameters(shape, run, stage) for stage in (0, run.pipeline_parallel - 1))
    tokens = run.seq_length * run.micro_batch_size * run.micro_batches
    kept = 4 * tokens * shape.hidden_size // (run.tensor_parallel if run.sequence_parallel else 1)
    return (2 if run.half_weights else 4) * own + kept


def _loss(run: Run) -> int:
    """Chunks of logits and sums; gradients of head and hidden states before they are added to what is there."""
    dtype = torch.bfloat16 if run.half else torch.float32
    tokens, hidden = run.seq_length * run.micro_batch_size, run.student.hidden_size
    head = _padded(run.student, run) // run.tensor_parallel * hidden
    sizes = Sizes.fit(
        tokens, run.student.vocab_size, dtype, run.device, run.tensor_parallel, run.loss_memory,
        halves=True, kernels=run.half and run.device == "cuda",
        hidden_sums=4 * tokens * hidden if run.half_weights else 0, weight_sums=4 * head if run.half_weights else 0,
    )  # fmt: skip
    temporaries = sizes.memory_bytes(tokens, run.student.vocab_size, dtype, run.tensor_parallel)
    casts = 0
    if run.half and not run.half_weights:
        wide = hidden + (run.teacher.hidden_size if run.teacher is not None else 0)
        casts = 2 * _padded(run.student, run) // run.tensor_parallel * wide
    return temporaries + (2 if run.half_weights else 4) * (head + tokens * hidden) + casts
