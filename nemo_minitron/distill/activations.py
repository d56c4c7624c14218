"""Bytes that a micro-batch's forward pass keeps for backward, and what backward takes beside them.

Each item is a tensor that autograd saves in Megatron's layers of :mod:`nemo_minitron.nemo.spec`, counted once however
often it is saved. Legend: n tokens of a micro-batch, H hidden, F ffn, A heads and G query groups of d channels, t
tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import replace

from nemo_minitron.distill.run import Run
from nemo_minitron.model.family import family_of
from nemo_minitron.model.shape import ModelShape


def kept(shape: ModelShape, run: Run, layers: int) -> int:
    """Bytes of ``layers`` layers and the final norm, of one micro-batch."""
    tokens, hidden = run.tokens / run.stream_ranks, shape.hidden_size
    # the last stream, what normalises it, and the output, which NeMo's wrapper of half weights makes float32
    final = int(tokens * (_norm(run, hidden, 1) + (4 if run.half_weights else run.value) * hidden))
    if not run.recompute:
        return layers * layer_activations(shape, run) + final
    whole = layer_activations(shape, replace(run, recompute=False))
    final += run.pairs  # layers that are computed again share the mask, a byte a pair, and each token's angles
    final += 4 * run.tokens * shape.kv_channels if run.positions_restart else 0
    if run.recompute_block:
        again = min(run.recompute_layers, layers)
        return again * layer_activations(shape, run) + (layers - again) * whole + final
    return -(-layers // run.recompute_layers) * layer_activations(shape, run) + final


def backward_work(shape: ModelShape, run: Run) -> int:
    """Bytes of one layer's backward pass at its widest: gradients inside of the MLP (4 F a token) or the attention (7
    A·d: of results, queries, repeated keys and values, and float32 sums of those of queries) beside three of the
    stream, and that of fc1's weight before it is added; with full recomputation also the layers computed again."""
    inside = max(4 * shape.ffn_hidden_size, 7 * shape.proj_columns) / run.tensor_parallel
    weight = 2 * shape.ffn_hidden_size * shape.hidden_size // run.tensor_parallel
    work = int(run.value * run.tokens * (inside + 3 * shape.hidden_size / run.stream_ranks)) + run.weight * weight
    if run.recompute:
        again = 1 if run.recompute_block else run.recompute_layers
        work += again * layer_activations(shape, replace(run, recompute=False))
    return work


def layer_activations(shape: ModelShape, run: Run) -> int:
    """Bytes that one layer keeps of a micro-batch; with full recomputation its input alone.

    Two norms and their outputs; queries and keys after RoPE, values and keys repeated to all heads, the attention's
    result, which is the projection's input too, and its log-sums in float32; fc1's two halves, the gate's activation
    where that is a kernel of its own, and the product (3 or 4 F); RoPE's tables, two for queries and two for keys; the
    mask of documents, of which torch's attention makes numbers in each layer anew, the same on every rank. Where A = G,
    values are a part of ``linear_qkv``'s output, all of which then stays.
    """
    tokens, hidden = run.tokens, shape.hidden_size
    if run.recompute:
        return int(tokens * run.value * hidden / run.stream_ranks)
    norms = 2 * (_norm(run, hidden, 1) + run.value * hidden) / run.stream_ranks
    attention, heads = _attention(shape, run), shape.num_attention_heads
    ffn = (3 if run.fused_swiglu else 4) * run.value * shape.ffn_hidden_size
    parts = (attention + 4 * heads + ffn) / run.tensor_parallel
    rotary = run.tokens if run.positions_restart else run.seq_length
    return int(tokens * (norms + parts) + 4 * run.value * rotary * shape.kv_channels) + run.value * run.pairs


def _attention(shape: ModelShape, run: Run) -> int:
    """Bytes a token of queries, keys, values and results, with norms of queries and keys where the family has them."""
    heads, groups, width = shape.num_attention_heads, shape.num_query_groups, shape.proj_columns
    repeated = heads != groups
    values, whole_qkv = (4 if repeated else 3) * width, not repeated
    normed = 0
    if family_of(shape).queries_and_keys is not None:
        normed = _norm(run, (heads + groups) * shape.kv_channels, heads + groups)
        if run.norms_in_one_kernel or not run.half:
            # inputs are kept as they are: queries, a copy of their part where G < A; keys, a view of the whole
            normed -= run.value * (heads + groups) * shape.kv_channels
            values, whole_qkv = values + (width if repeated else 0), True
    return run.value * (values + (shape.qkv_rows if whole_qkv else 0)) + normed


def _norm(run: Run, values: int, rows: int) -> int:
    """Bytes that a norm keeps for ``values`` in ``rows``: its input and each row's scale; where it is not one kernel,
    the input in float32 and what is normalised."""
    return (run.value if run.norms_in_one_kernel else 8) * values + 4 * rows
