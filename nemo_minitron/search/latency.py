"""What one decoding step costs on the present device: a roofline of three measured numbers.

A step reads every weight and the KV cache once and does two operations per weight and sequence, so that it takes the
longer of bytes over bandwidth and operations over the rate of matrix products, and in every layer a fixed time for
starting its operations. Sampling, tensor parallelism and everything outside of the model are left out: the model is for
comparing shapes, and is near the truth only for a runtime that keeps the device busy.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_minitron.model.shape import ModelShape

LAYER_OPERATIONS = 8
"""Operations of one layer, started one after the other: two norms, four matrix products, attention, the gate."""
DTYPES = {2: "bfloat16", 4: "float32"}
SMALL = 200
"""Products too small to measure that are measured together, one after the other."""


@dataclass(frozen=True)
class Rates:
    """What was measured.

    Attributes:
        device: its name. flops: operations per second of a large square product. bandwidth: bytes per second at which
            a matrix-vector product reads its matrix. overhead: seconds of a product too small to measure, among others.
    """

    device: str
    flops: float
    bandwidth: float
    overhead: float

    def decode_seconds(self, shape: ModelShape, batch_size: int, seq_length: int, bytes_per_value: int) -> Any:
        """One token for each of ``batch_size`` sequences of ``seq_length``; of one shape or, given arrays, of many."""
        untied = 0 if shape.share_embeddings_and_output_weights else shape.padded_vocab_size * shape.hidden_size
        weights = (shape.num_parameters(padded=True) - untied) * bytes_per_value  # of the table one row is read
        cache = batch_size * seq_length * shape.kv_cache_bytes_per_token(bytes_per_value)
        operations = batch_size * shape.forward_flops_per_token(2 * seq_length)  # which averages over positions
        busy = np.maximum((weights + cache) / self.bandwidth, operations / self.flops)
        return busy + self.overhead * (LAYER_OPERATIONS * shape.num_layers + 2)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def device_name() -> str:
    """The device that :func:`measure` would measure, with the threads that it would use."""
    import torch

    from nemo_minitron import runtime

    device = runtime.device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def measure(bytes_per_value: int) -> Rates:
    """Measure the present device; takes a second or two. Best of several repetitions, as other work only slows down.

    On CUDA everything is replayed from a captured graph, as serving runtimes decode: what Python needs to start a
    kernel, which is many times what the device needs, is in no figure.
    """
    import torch

    from nemo_minitron import runtime

    device, dtype = runtime.device(), getattr(torch, DTYPES.get(bytes_per_value, "bfloat16"))
    large = device.type == "cuda"
    product = torch.nn.functional.linear

    def matrix(*size: int) -> Any:
        return torch.ones(size, dtype=dtype, device=device)

    with torch.no_grad():
        side = 8192 if large else 1024
        square = matrix(side, side)
        flops = 2 * side**3 / best_seconds(lambda: square @ square, 5)
        wide, vector = matrix(16384, 8192 if large else 4096), matrix(1, 8192 if large else 4096)
        small, one = matrix(8, 8), matrix(1, 8)
        overhead = best_seconds(lambda: [product(one, small) for _ in range(SMALL)], 20) / SMALL
        seconds = best_seconds(lambda: [product(vector, wide) for _ in range(4)], 5) / 4
    bandwidth = wide.numel() * bytes_per_value / max(seconds - overhead, 1e-9)
    return Rates(device_name(), flops, bandwidth, overhead)


def best_seconds(work: Callable[[], Any], repeats: int) -> float:
    """The shortest of ``repeats`` runs of ``work``, on CUDA replayed from a graph that is captured first."""
    import torch

    from nemo_minitron import runtime

    if runtime.has_cuda():
        work()  # libraries set themselves up at a first call, which a capture does not allow
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        work = graph.replay
    seconds = []
    for _ in range(repeats):
        runtime.synchronize()
        start = time.perf_counter()
        work()
        runtime.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
