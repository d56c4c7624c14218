"""Memory and time of the fused head + distillation loss against dense ``F.kl_div`` under autograd.

    OMP_NUM_THREADS=2 python benchmarks/kd_loss.py --json benchmarks/results/kd_loss_cpu.json

Each variant runs in a process of its own: forward and backward from hidden states and head weights to the gradients of
the student's. ``*_bytes`` is the peak of the resident set while it runs, less what inputs and their gradients hold;
``*_seconds`` the median of several runs, one variant after the other in turns so that both meet the same machine;
``*_cpu_seconds`` the processor time of the same runs, which means more where other processes share the machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_minitron.runtime import resident_bytes


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student hidden ``[s, 1, H]`` and head ``[V, H]`` with gradients, teacher's without, labels ``[1, s]``."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).to(dtype)

    n, v, h, h_t = options.tokens, options.vocab, options.student, options.teacher
    student = draw(n, 1, h).requires_grad_(True), draw(v, h, scale=h**-0.5).requires_grad_(True)
    return *student, draw(n, 1, h_t), draw(v, h_t, scale=h_t**-0.5), torch.randint(0, v, (1, n))


def dense(hidden: Tensor, weight: Tensor, hidden_t: Tensor, weight_t: Tensor, labels: Tensor) -> Tensor:
    """The plain way: whole logits, log-softmax, ``F.kl_div``."""
    with torch.no_grad():
        log_q = F.log_softmax(hidden_t @ weight_t.t(), -1)
    log_p = F.log_softmax(hidden @ weight.t(), -1)
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True) / labels.numel()


def fused(hidden: Tensor, weight: Tensor, hidden_t: Tensor, weight_t: Tensor, labels: Tensor) -> Tensor:
    from nemo_minitron.distill.fused import Head, head_losses
    from nemo_minitron.distill.losses import Mix

    weights = torch.full(labels.shape, 1.0 / labels.numel())
    teacher = Head(hidden_t, weight_t)
    return head_losses(Head(hidden, weight), labels, weights, vocab_size=len(weight), teacher=teacher, mix=Mix()).loss


VARIANTS = {"dense": dense, "fused": fused}


class Peak:
    """Highest resident set seen by a thread that looks every millisecond."""

    def __enter__(self) -> Peak:
        self.bytes, self._stop = resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.bytes = max(self.bytes, resident_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def child(name: str, options: argparse.Namespace, pipe: Any) -> None:
    """One measurement for every message; the first run has its memory watched, after a small one to load kernels."""
    small = argparse.Namespace(**{**vars(options), "tokens": 64, "vocab": 2048})
    VARIANTS[name](*inputs(small)).backward()
    tensors = inputs(options)
    watched = True
    while pipe.recv():
        for x in tensors[:2]:
            x.grad = None
        if watched:
            before = resident_bytes()
            with Peak() as peak:
                loss = VARIANTS[name](*tensors)
                loss.backward()
            gradients = sum(x.grad.nbytes for x in tensors[:2])
            pipe.send((peak.bytes - before - gradients, loss.item()))
            del loss
            watched = False
            continue
        start, spent = time.perf_counter(), time.process_time()
        VARIANTS[name](*tensors).backward()
        pipe.send((time.perf_counter() - start, time.process_time() - spent))


def machine() -> str:
    """The processor's name and how many there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")] or [platform.machine()]
    return f"{len(names)} x {names[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--teacher", type=int, default=1024, help="hidden size")
    parser.add_argument("--student", type=int, default=768, help="hidden size")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {key: value for key, value in vars(options).items() if key != "json"}
    found |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": machine()}
    workers = {}
    for name in VARIANTS:
        pipe, end = context.Pipe()
        worker = context.Process(target=child, args=(name, options, end), daemon=True)
        worker.start()
        workers[name] = (pipe, worker)
    losses = {}
    for name, (pipe, _) in workers.items():
        pipe.send(True)
        found[f"{name}_bytes"], losses[name] = pipe.recv()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    processor: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(options.runs):
        for name, (pipe, _) in workers.items():
            pipe.send(True)
            for values, value in zip((seconds[name], processor[name]), pipe.recv(), strict=True):
                values.append(value)
    for pipe, worker in workers.values():
        pipe.send(False)
        worker.join()
    found |= {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    found |= {f"{name}_cpu_seconds": statistics.median(values) for name, values in processor.items()}
    found |= {"all_seconds": seconds, "losses": losses}
    memory = found["fused_bytes"] / found["dense_bytes"]
    ratio, processor_ratio = (found[f"fused_{k}"] / found[f"dense_{k}"] for k in ("seconds", "cpu_seconds"))
    for name in VARIANTS:
        print(f"{name}: {found[f'{name}_bytes'] / 2**20:,.0f} MiB, {found[f'{name}_seconds']:.2f} s, "
              f"loss {losses[name]:.6f}")  # fmt: skip
    print(f"fused / dense: memory {memory:.3f} (bar 0.1), time {ratio:.3f} (bar 0.9), cpu {processor_ratio:.3f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
