"""Time and memory of a distillation step at Llama-3.1-8B's size on one GPU, in the lean mode.

    COMMIT=$(git rev-parse --short=12 HEAD) python benchmarks/gpu/distill_step.py --seconds 240 \\
        --json benchmarks/results/gpu_distill_step_h100.json
    python benchmarks/gpu/distill_step.py --tiny

The teacher has the 8B's shape, the student hidden 3072 and ffn 9216 of it: 4.5B. Both are the product's models with
the weights that their classes begin with (weightless.py), built once; micro-batches and recomputation are set between
the settings, on the same fields that a config sets. A step is ``MinitronDistillModel.fwd_bwd_step``, clipping, and the
step of the optimizer that the model makes of ``model.optim``, as NeMo's ``training_step`` and Lightning order them;
random tokens, no data loader. Settings: MICRO_BATCH[xMICRO_BATCHES][+full | +blockN][+swiglu][+compile]: all layers or
N recomputed, Megatron-Core's fused SwiGLU, layers compiled.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from record import Record

TARGETS_8B = {"hidden_size": 3072, "ffn_hidden_size": 9216}
SETTINGS = "1x1,1x8,2x4,1x8+swiglu,2x4+swiglu,4x2+full,4x2+block20+swiglu,1x8+compile"
PARTS = ("teacher", "student", "clip", "optimizer")


@dataclass(frozen=True)
class Setting:
    """A way to run a step: ``recompute`` is the number of layers that are, -1 all of them."""

    name: str
    micro_batch: int
    micro_batches: int
    recompute: int
    swiglu: bool
    compiled: bool

    @classmethod
    def of(cls, text: str) -> Setting:
        """Read one from the command line."""
        sizes, *more = text.split("+")
        micro, _, count = sizes.partition("x")
        recompute = next((int(word[5:]) for word in more if word.startswith("block")), -1 if "full" in more else 0)
        return cls(text, int(micro), int(count or 1), recompute, "swiglu" in more, "compile" in more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here, and the profile beside it as .txt")
    parser.add_argument("--seconds", type=float, default=240, help="no setting begins later")
    parser.add_argument("--settings", default=SETTINGS, help="in their order, comma-separated")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=2, help="timed of each setting, after one that warms up")
    parser.add_argument("--layers", type=int, help="of both models, fewer than 32")
    parser.add_argument("--optimizer", default="adamw_8bit", help="model.optim.name")
    parser.add_argument("--profile", default="1x1", help="setting whose step is profiled once more")
    parser.add_argument("--tiny", action="store_true", help="the same code on a shape for a CPU")
    options = parser.parse_args()
    if options.tiny:
        options.length = 64
    record = Record(options.json, options.seconds)
    record.table["options"] = {"length": options.length, "optimizer": options.optimizer, "layers": options.layers}
    record.table["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF")
    rate = record.step("matrix_rate", lambda: {"tflops": matrix_rate(256 if options.tiny else 8192)})
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, rate and rate["tflops"])
        if record.step("build", lambda: bench.build(Path(folder))) is None:
            raise SystemExit("no models, nothing to measure")
        for text in options.settings.split(","):
            record.step(text, lambda text=text: bench.measure(Setting.of(text)), needs=10)
            if text == options.profile:
                out = options.json and options.json.with_suffix(".txt")
                record.step("profile", lambda text=text, out=out: bench.profile(Setting.of(text), out), needs=10)


def matrix_rate(size: int) -> float:
    """TFLOP/s of a product of two square bf16 matrices of random numbers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    synchronize()
    return round(20 * 2 * size**3 / (time.perf_counter() - start) / 1e12, 1)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Bench:
    """Teacher, student and optimizer, and what a step of theirs takes."""

    def __init__(self, options: argparse.Namespace, tflops: float | None) -> None:
        from checkpoint import LLAMA

        self.options, self.tflops = options, tflops
        teacher = LLAMA.replace(num_layers=options.layers or LLAMA.num_layers)
        if options.tiny:
            sizes = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 8}
            sizes |= {"num_query_groups": 4, "kv_channels": 16, "vocab_size": 512, "padded_vocab_size": 512}
            teacher = teacher.replace(**sizes)
        smaller = {"hidden_size": 96, "ffn_hidden_size": 192} if options.tiny else TARGETS_8B
        self.teacher, self.student = teacher, teacher.replace(**smaller)

    def build(self, folder: Path) -> dict[str, Any]:
        """Both models and the optimizer, whose moments come with its first step."""
        from nemo_minitron import runtime

        runtime.prepare()
        from weightless import ShapeReader, weightless, write_tokenizer

        from nemo_minitron.config.sections import Distill
        from nemo_minitron.nemo.distillation import MinitronDistillModel
        from nemo_minitron.nemo.restore import load_model
        from nemo_minitron.nemo.trainer import inference_trainer

        tokenizer = write_tokenizer(folder / "tokenizer", self.teacher.vocab_size)
        student = ShapeReader.make(folder / "student.nemo", self.student, tokenizer)
        teacher = ShapeReader.make(folder / "teacher.nemo", self.teacher, tokenizer)
        run = {"micro_batch_size": 1, "global_batch_size": 1, "encoder_seq_length": self.options.length, "seed": 1}
        run |= {"precision": "bf16", "megatron_amp_O2": True}
        run |= {"optim": {"name": self.options.optimizer, "lr": 1e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]}}
        took, start = {}, time.perf_counter()
        with weightless():
            self.model = load_model(student, inference_trainer("bf16"), run, MinitronDistillModel)
            took["student_s"] = round(time.perf_counter() - start, 1)
            self.model.set_teacher(teacher, Distill())
        self.model.to(runtime.device())
        took["teacher_s"] = round(time.perf_counter() - start - took["student_s"], 1)
        (self.module,) = self.model.get_model_module_list()
        self.model.log = lambda *_, **__: None  # there is no loop that it could log to
        self.model.train()
        self.model.configure_optimizers()
        self.optimizer = self.model._optimizer
        sizes = {name: sum(p.numel() for p in parameters) for name, parameters in self._parameters().items()}
        dtypes = {name: str(next(iter(p)).dtype) for name, p in self._parameters().items()}
        kinds = {"optimizer_class": type(self.optimizer).__name__, "dtypes": dtypes}
        return took | {"parameters": sizes, "gflop_per_token": self.flops() / 1e9, **kinds, "gib": _gib()}

    def _parameters(self) -> dict[str, list[torch.Tensor]]:
        return {
            "teacher": list(self.model._teacher[0]._module.parameters()),
            "student": list(self.model.parameters()),
        }

    def flops(self) -> int:
        """Of a token: the teacher's forward, the student's forward and backward; causal attention, no recomputation."""

        def forward(shape: Any) -> int:
            matrices = shape.parameters_per_layer() - 2 * shape.hidden_size
            attention = 2 * self.options.length * shape.proj_columns  # QK and PV, half of each
            return shape.num_layers * (2 * matrices + attention) + 2 * shape.vocab_size * shape.hidden_size

        return forward(self.teacher) + 3 * forward(self.student)

    @contextmanager
    def as_set(self, setting: Setting) -> Iterator[list[dict[str, torch.Tensor]]]:
        """The model set to a setting; the micro-batches of a step."""
        from megatron.core.num_microbatches_calculator import (
            destroy_num_microbatches_calculator,
            init_num_microbatches_calculator,
        )

        destroy_num_microbatches_calculator()
        whole = setting.micro_batch * setting.micro_batches
        init_num_microbatches_calculator(0, None, whole, setting.micro_batch, 1)
        config, teacher = self.module.config, self.model._teacher[0]._module
        config.recompute_granularity = "full" if setting.recompute else None
        config.recompute_method = "uniform" if setting.recompute < 0 else "block"
        config.recompute_num_layers = max(1, setting.recompute)
        fused = config.bias_activation_fusion
        config.bias_activation_fusion = teacher.config.bias_activation_fusion = setting.swiglu or fused
        layers = [*self.module.decoder.layers, *teacher.decoder.layers]
        for layer in layers if setting.compiled else ():
            layer.compile()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            yield [self._batch(setting.micro_batch) for _ in range(setting.micro_batches)]
        finally:
            config.bias_activation_fusion = teacher.config.bias_activation_fusion = fused
            for layer in layers:
                layer._compiled_call_impl = None
            for parameter in self.model.parameters():
                parameter.grad = None
            teacher_found = self.model._teacher[0]._found
            teacher_found.clear()

    def _batch(self, samples: int) -> dict[str, torch.Tensor]:
        from nemo_minitron import runtime

        length = self.options.length
        blocks = torch.randint(0, self.student.vocab_size, (samples, length + 1), device=runtime.device())
        positions = torch.arange(length, device=runtime.device()).expand(samples, -1)
        return {
            "tokens": blocks[:, :-1].contiguous(),
            "labels": blocks[:, 1:].contiguous(),
            "position_ids": positions,
            "loss_mask": torch.ones(samples, length, device=runtime.device()),
        }

    def step(self, batches: list[dict[str, torch.Tensor]], mark: Callable[[], None] = lambda: None) -> float:
        """One step on a global batch; ``mark`` is called at its beginning and after each of :data:`PARTS`."""
        from nemo_minitron.nemo.anywhere import clip_gradients

        own = type(self.model).teacher_outputs

        def teacher_outputs(given: list[dict[str, torch.Tensor]]) -> None:
            own(self.model, given)
            mark()

        self.model.teacher_outputs = teacher_outputs
        mark()
        self.optimizer.zero_grad()
        loss = self.model.fwd_bwd_step(iter(batches), False)
        mark()
        clip_gradients(self.model.parameters(), 1.0)
        mark()
        self.optimizer.step()
        mark()
        return float(loss)

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Seconds of the parts of a step, tokens a second, peak memory, and what was said of it before."""
        predicted = self.predicted(setting)
        found: dict[str, Any] = {"predicted_gib": round(sum(predicted.values()) / 2**30, 2)}
        found["predicted_items_gib"] = {name: round(value / 2**30, 2) for name, value in predicted.items()}
        steps, losses = [], []
        with self.as_set(setting) as batches:
            for turn in range(self.options.steps + 1):
                clock = Clock()
                losses.append(self.step(batches, clock.mark))
                if turn:  # the first one warms up, compiles the optimizer and makes its moments
                    steps.append(clock.seconds())
                else:
                    found["first_step_s"] = round(sum(clock.seconds()), 2)
        parts = [statistics.median(values) for values in zip(*steps, strict=True)]
        total = statistics.median(map(sum, steps))
        tokens = setting.micro_batch * setting.micro_batches * self.options.length
        found |= {"tokens": tokens, "step_s": round(total, 4), "tokens_per_s": round(tokens / total, 1)}
        found |= {f"{name}_s": round(value, 4) for name, value in zip(PARTS, parts, strict=True)}
        found |= {"all_step_s": [round(sum(step), 4) for step in steps], "losses": [round(loss, 4) for loss in losses]}
        if self.tflops:
            found["floor_s"] = round(tokens * self.flops() / self.tflops / 1e12, 4)
            found["of_floor"] = round(total / found["floor_s"], 3) if found["floor_s"] else None
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**30
            found |= {
                "peak_allocated_gib": round(peak, 2),
                "predicted_of_peak": round(found["predicted_gib"] / peak, 3),
            }
            found["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        return found

    def predicted(self, setting: Setting) -> dict[str, int]:
        """Bytes by item, as the planner has them."""
        from nemo_minitron.distill.memory import Run, memory

        said = {
            "student": self.student, "teacher": self.teacher, "seq_length": self.options.length,
            "micro_batch_size": setting.micro_batch, "micro_batches": setting.micro_batches,
            "half": True, "half_weights": True, "lean": self.options.optimizer == "adamw_8bit",
            "recompute": setting.recompute != 0, "recompute_block": setting.recompute > 0,
            "recompute_layers": max(1, setting.recompute),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }  # fmt: skip
        known = {field.name for field in fields(Run)}
        return memory(Run(**{name: value for name, value in said.items() if name in known}))

    def profile(self, setting: Setting, out: Path | None) -> dict[str, Any]:
        """The 25 kernels that a step spends most on, as a table beside the figures; how often it waits for the GPU."""
        from torch.profiler import ProfilerActivity, profile

        kinds, order = [ProfilerActivity.CPU], "self_cpu_time_total"
        if torch.cuda.is_available():
            kinds, order = [*kinds, ProfilerActivity.CUDA], "self_cuda_time_total"
        with self.as_set(setting) as batches:
            self.step(batches)
            synchronize()
            with profile(activities=kinds) as profiler:
                self.step(batches)
                synchronize()
        found = profiler.key_averages()
        text = found.table(sort_by=order, row_limit=25, max_name_column_width=90)
        print(text, flush=True)
        if out is not None:
            out.write_text(f"{setting.name}\n{text}\n")
        waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense", "cudaLaunchKernel")
        return {"counts": {event.key: event.count for event in found if event.key in waits}}


class Clock:
    """Marks on the device's own time where there is one, so that nothing waits between them."""

    def __init__(self) -> None:
        self._marks: list[Any] = []

    def mark(self) -> None:
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between marks."""
        synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if torch.cuda.is_available():
            return [first.elapsed_time(second) / 1000 for first, second in pairs]
        return [second - first for first, second in pairs]


def _gib() -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    free, whole = torch.cuda.mem_get_info()
    return {
        "allocated": round(torch.cuda.memory_allocated() / 2**30, 2),
        "free": round(free / 2**30, 2),
        "whole": round(whole / 2**30, 2),
    }


if __name__ == "__main__":
    main()
