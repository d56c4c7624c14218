"""Memory and time of the fused head + distillation loss against dense ``F.kl_div`` under autograd.

    OMP_NUM_THREADS=2 python benchmarks/kd_loss.py --json benchmarks/results/kd_loss_cpu.json
    python benchmarks/kd_loss.py --device cuda --tokens 8192 --teacher 4096 --student 3072 --dtype bfloat16 --runs 20 \\
        --json benchmarks/results/kd_loss_h200.json

On a GPU also against Liger-Kernel's fused linear JSD at beta 0, which is forward KL (``pip install liger-kernel``): as
it comes, with the head's gradient summed up in bf16, and with float32 sums; and ours with a budget of 4 GiB, in which
it makes the logits once.

Each variant runs in a process of its own: forward and backward from hidden states and head weights to the gradients of
the student's. ``*_bytes`` is the peak of the resident set (of the GPU's allocated memory) while it runs, less what
inputs and their gradients hold; ``*_seconds`` the median of several runs, one variant after the other in turns so that
all meet the same machine; ``*_cpu_seconds`` the processor time of the same runs, which means more where other processes
share the machine. ``*_errors`` are those of loss and gradients against a dense float64 computation on fewer tokens,
relative, by norm.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from torch import Tensor
from torch.nn import functional as F

from nemo_minitron.runtime import resident_bytes

CHECKED_TOKENS = 256


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student hidden ``[s, 1, H]`` and head ``[V, H]`` with gradients, teacher's without, labels ``[1, s]``."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=options.device) * scale).to(dtype)

    n, v, h, h_t = options.tokens, options.vocab, options.student, options.teacher
    student = draw(n, 1, h).requires_grad_(True), draw(v, h, scale=h**-0.5).requires_grad_(True)
    labels = torch.randint(0, v, (1, n), device=options.device)
    return *student, draw(n, 1, h_t), draw(v, h_t, scale=h_t**-0.5), labels


def dense(hidden: Tensor, weight: Tensor, hidden_t: Tensor, weight_t: Tensor, labels: Tensor) -> Tensor:
    """The plain way: whole logits, log-softmax in float32, ``F.kl_div``."""
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        log_q = F.log_softmax(hidden_t @ weight_t.t(), -1, dtype=exact)
    log_p = F.log_softmax(hidden @ weight.t(), -1, dtype=exact)
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True) / labels.numel()


def fused(
    hidden: Tensor, weight: Tensor, hidden_t: Tensor, weight_t: Tensor, labels: Tensor, memory: int | None = None
) -> Tensor:
    from nemo_minitron.distill.fused import Head, head_losses
    from nemo_minitron.distill.loss import Mix

    weights = torch.full(labels.shape, 1.0 / labels.numel(), device=labels.device)
    student, teacher = Head(hidden, weight), Head(hidden_t, weight_t)
    return head_losses(
        student, labels, weights, vocab_size=len(weight), teacher=teacher, mix=Mix(), memory_bytes=memory
    ).loss


def roomy(*tensors: Tensor) -> Tensor:
    return fused(*tensors, memory=4 << 30)


def liger(*tensors: Tensor, sums: torch.dtype | None = None) -> Tensor:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    hidden, weight, hidden_t, weight_t, _ = tensors
    return LigerFusedLinearJSDFunction.apply(
        hidden.flatten(0, 1), weight, hidden_t.flatten(0, 1), weight_t, None, 0.0, -100, 1.0, sums
    )


def liger_float32(*tensors: Tensor) -> Tensor:
    return liger(*tensors, sums=torch.float32)


VARIANTS: dict[str, Callable[..., Tensor]] = {"dense": dense, "fused": fused}
ON_GPU: dict[str, Callable[..., Tensor]] = {"roomy": roomy, "liger": liger, "liger_float32": liger_float32}


class Peak:
    """Highest resident set seen by a thread that looks every millisecond; on a GPU, what its allocator counted."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def __enter__(self) -> Peak:
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        self.bytes, self._stop = resident_bytes(), threading.Event()
        self.before = self.bytes
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.bytes = max(self.bytes, resident_bytes())

    def __exit__(self, *_: object) -> None:
        if self.on_gpu:
            self.bytes = torch.cuda.max_memory_allocated()
            return
        self._stop.set()
        self._thread.join()


def errors(variant: Callable[..., Tensor], options: argparse.Namespace) -> list[float]:
    """Of loss, gradient of hidden states and of the head, against float64."""
    found = []
    tensors = inputs(argparse.Namespace(**{**vars(options), "tokens": CHECKED_TOKENS}))
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in tensors]
    for function, given in ((variant, tensors), (dense, exact)):
        loss = function(*given)
        loss.backward()
        found.append([loss.detach(), given[0].grad, given[1].grad])
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(*found, strict=True)]


def child(name: str, options: argparse.Namespace, pipe: Any) -> None:
    """Answers "errors", "memory" (with the loss) and "time"; a small run first loads the kernels."""
    variant, on_gpu = (VARIANTS | ON_GPU)[name], options.device == "cuda"
    variant(*inputs(argparse.Namespace(**{**vars(options), "tokens": 64, "vocab": 2048}))).backward()
    tensors: tuple[Tensor, ...] = ()
    while (asked := pipe.recv()) != "end":
        if asked == "errors":
            pipe.send(errors(variant, options))
            if on_gpu:
                torch.cuda.empty_cache()
            continue
        tensors = tensors or inputs(options)
        for x in tensors[:2]:
            x.grad = None
        if asked == "memory":
            with Peak(options.device) as peak:
                loss = variant(*tensors)
                loss.backward()
            gradients = sum(x.grad.nbytes for x in tensors[:2])
            pipe.send((peak.bytes - peak.before - gradients, loss.item()))
            del loss
            continue
        if on_gpu:
            torch.cuda.synchronize()
        start, spent = time.perf_counter(), time.process_time()
        variant(*tensors).backward()
        if on_gpu:
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - start, time.process_time() - spent))


def matmul_rate() -> float:
    """bf16 operations per second of an 8,192-cubed product of random numbers, the median of 20."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for turn in range(25):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        if turn >= 5:
            seconds.append(time.perf_counter() - start)
    return 2 * 8192**3 / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--teacher", type=int, default=1024, help="hidden size")
    parser.add_argument("--student", type=int, default=768, help="hidden size")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {key: value for key, value in vars(options).items() if key != "json"}
    found |= {"threads": torch.get_num_threads(), "torch": torch.__version__} | provenance()
    variants = [*VARIANTS]
    if options.device == "cuda":
        variants.append("roomy")
        if importlib.util.find_spec("liger_kernel"):
            variants += ["liger", "liger_float32"]
    workers = {}
    for name in variants:
        pipe, end = context.Pipe()
        worker = context.Process(target=child, args=(name, options, end), daemon=True)
        worker.start()
        workers[name] = (pipe, worker)

    def ask(name: str, what: str) -> Any:
        pipe = workers[name][0]
        pipe.send(what)
        return pipe.recv()

    if options.device == "cuda":
        found |= {f"{name}_errors": ask(name, "errors") for name in variants}
    losses = {}
    for name in variants:
        found[f"{name}_bytes"], losses[name] = ask(name, "memory")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    processor: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(options.runs + (options.device == "cuda")):
        for name in variants:
            measured = ask(name, "time")
            if turn or options.device == "cpu":  # a GPU has its first one to warm up
                for values, value in zip((seconds[name], processor[name]), measured, strict=True):
                    values.append(value)
    for pipe, worker in workers.values():
        pipe.send("end")
        worker.join()
    found |= {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    found |= {f"{name}_cpu_seconds": statistics.median(values) for name, values in processor.items()}
    found |= {"all_seconds": seconds, "losses": losses}
    rate = matmul_rate() if options.device == "cuda" else 0.0
    needed = 2 * options.tokens * options.vocab * (options.teacher + 3 * options.student)
    if rate:
        found |= {"matmul_rate": rate}
        found |= {f"{name}_of_matmul_rate": needed / found[f"{name}_seconds"] / rate for name in variants}
    for name in variants:
        line = f"{name}: {found[f'{name}_bytes'] / 2**20:,.0f} MiB, {found[f'{name}_seconds']:.4f} s, "
        line += f"loss {losses[name]:.6f}"
        if rate:
            line += (
                f", {found[f'{name}_of_matmul_rate']:.2f} of {rate / 1e12:.0f} TFLOP/s, errors of loss and gradients "
            )
            line += ", ".join(f"{error:.1e}" for error in found[f"{name}_errors"])
        print(line)
    memory = found["fused_bytes"] / found["dense_bytes"]
    ratio, processor_ratio = (found[f"fused_{k}"] / found[f"dense_{k}"] for k in ("seconds", "cpu_seconds"))
    print(f"fused / dense: memory {memory:.3f} (bar 0.1), time {ratio:.3f} (bar 0.9), cpu {processor_ratio:.3f}")
    if "liger" in variants:
        against = found["fused_seconds"] / found["liger_seconds"]
        print(f"fused: {found['fused_bytes'] / 1e9:.3f} GB (bar 1), time {against:.3f} of Liger's (bar 1)")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
