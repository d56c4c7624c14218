"""Memory of a distillation run per rank, from shapes, grid and batch alone: nothing is built.

Counts what this package's own path holds: each item is written as the tensors that it consists of. Legend: n tokens of
a micro-batch, H hidden, V padded vocabulary, t tensor-parallel ranks.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from nemo_minitron.distill import activations
from nemo_minitron.distill.run import Run
from nemo_minitron.distill.sizes import Sizes
from nemo_minitron.model.layout import parameters
from nemo_minitron.model.shape import ModelShape

ITEMS = ("process", "weights", "gradients", "optimizer", "activations", "teacher", "loss")

CUDA_PROCESS = 700 << 20
"""What a process takes of a GPU beside torch's allocator: CUDA's context, the code of kernels, cuBLAS. About: it
differs by card and driver."""

_LEAN_BLOCK = 256  # values that share a scale in torchao's 8-bit moments
_LEAN_SMALLEST = 4096  # values of a parameter from which on they are taken
_LEAN_CODES = 1024  # bytes of the table of codes that each of them carries


def memory(run: Run) -> dict[str, int]:
    """Bytes per rank by item (:data:`ITEMS`), of the rank that needs most; their sum is the peak of a step.

    The peak is of backward or of the optimizer's step, when activations and the loss are gone: what that takes beyond
    them is counted as the optimizer's.
    """
    own = max(_parameters(run.student, run, stage) for stage in (0, run.pipeline_parallel - 1))
    gradients = _gradients(run, own)
    loss = _loss(run)
    busy = _busy(run, own, loss)
    step = _step(run, own)
    return {
        "process": run.process,
        "weights": run.weight * own,
        "gradients": gradients,
        "optimizer": _states(run, own) + max(0, step - busy),
        "activations": max(0, busy - loss),
        "teacher": 0 if run.teacher is None else _teacher(run, run.teacher),
        "loss": min(loss, busy),
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


def _gradients(run: Run, own: int) -> int:
    """Gradients in float32, or of the lean mode in the weights' dtype. Float32 weights on CUDA have them twice: torch's
    DDP, which NeMo puts around them, allocates buckets that it never fills, and that take no memory on a CPU."""
    if run.lean:
        return run.weight * own
    return (4 if run.half_weights or run.sharded_optimizer or run.device != "cuda" else 8) * own


def _states(run: Run, own: int) -> int:
    """Two float32 moments, of half weights also the float32 copies; or torchao's 8-bit moments, parameter by parameter:
    of small ones they stay in float32."""
    if not run.lean:
        return (12 if run.half_weights else 8) * own // (run.data_parallel if run.sharded_optimizer else 1)
    shape = run.student.replace(padded_vocab_size=_padded(run.student, run))
    total = 0
    for parameter in parameters(shape):
        values = math.prod(parameter.size(shape))
        if values >= _LEAN_SMALLEST and values % _LEAN_BLOCK == 0:
            moment = values + 4 * values // _LEAN_BLOCK + _LEAN_CODES
        else:
            moment = 4 * values
        total += 2 * moment * (shape.num_layers if parameter.per_layer else 1)
    return total


def _step(run: Run, own: int) -> int:
    """Temporaries of the optimizer's step: a float32 value of every parameter (torch's Adam on CUDA takes all at
    once); of the lean one, which takes pieces, a float64 copy of the largest gradient, while the norm of all is taken.
    """
    if run.lean:
        return 8 * max(math.prod(parameter.size(run.student)) for parameter in parameters(run.student))
    if run.device != "cuda":
        return 0
    return 4 * own // (run.data_parallel if run.sharded_optimizer else 1)


def _busy(run: Run, own: int, loss: int) -> int:
    """Activations of the micro-batches in flight, as many as there are stages on the first one, with the loss of one or
    the backward pass of a layer. Where a step is one micro-batch, gradients come as activations go, and are subtracted.
    """
    layers = max(_layers(run.student, run, stage) for stage in (0, run.pipeline_parallel - 1))
    held = min(run.pipeline_parallel, run.micro_batches) * activations.kept(run.student, run, layers)
    work = activations.backward_work(run.student, run)
    buffers = run.sharded_optimizer or (run.half_weights and not run.lean)
    if run.micro_batches > 1 or buffers:
        return held + max(loss, work)
    return max(held + loss - run.weight * own, work)


def _teacher(run: Run, shape: ModelShape) -> int:
    """Weights, and final hidden states of the step's micro-batches."""
    if not shape.splits_over(run.tensor_parallel):
        run = replace(run, tensor_parallel=1, sequence_parallel=False)
    own = max(_parameters(shape, run, stage) for stage in (0, run.pipeline_parallel - 1))
    kept = run.weight * run.tokens * run.micro_batches * shape.hidden_size // run.stream_ranks
    return run.weight * own + kept


def _loss(run: Run) -> int:
    """Chunks of logits and sums; gradients of head and hidden states before they are added to what is there."""
    dtype = torch.bfloat16 if run.half else torch.float32
    tokens, hidden = run.tokens, run.student.hidden_size
    head = _padded(run.student, run) // run.tensor_parallel * hidden
    sizes = Sizes.fit(
        tokens, run.student.vocab_size, dtype, run.device, run.tensor_parallel, run.loss_memory,
        halves=True, kernels=run.half and run.device == "cuda",
        weight_sums=4 * head if run.half_weights else 0,
    )  # fmt: skip
    temporaries = sizes.memory_bytes(tokens, run.student.vocab_size, dtype, run.tensor_parallel)
    if run.half_weights:  # hidden states come in float32, and are rounded for the products
        return temporaries + 2 * head + (4 + 2) * tokens * hidden
    casts = 0
    if run.half:
        wide = hidden + (run.teacher.hidden_size if run.teacher is not None else 0)
        casts = 2 * _padded(run.student, run) // run.tensor_parallel * wide
    return temporaries + 4 * (head + tokens * hidden) + casts
