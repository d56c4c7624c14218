"""Time and peak memory of the streams: convert both ways and prune, beside ``cp -r`` and ``tar`` of the same bytes.

    python benchmarks/checkpoint.py --shape 8b --folder /scratch/bench --json benchmarks/results/checkpoint_8b.json

Needs five times the model's size on disk (8b: 80 GB, less with --frugal, which deletes what is no longer needed). Each
step is a process of its own: seconds of wall time, peak resident bytes as the kernel counts them. The copies that are
the measure run in the same call. Nothing is flushed from the page cache in between, for the copies and for us alike;
ours end with an fsync, theirs do not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provenance import provenance

from nemo_minitron.model.shape import ModelShape, RopeScaling

LLAMA = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    padded_vocab_size=128256,
    rotary_base=500000.0,
    rope_scaling=RopeScaling(),
    max_position_embeddings=131072,
)
SHAPES = {
    "1b": LLAMA.replace(
        num_layers=16, hidden_size=2048, ffn_hidden_size=8192, kv_channels=64, share_embeddings_and_output_weights=True
    ),
    "8b": LLAMA,
    "70b": LLAMA.replace(num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64),
}
TARGETS = {"1b": {"hidden_size": 1536, "ffn_hidden_size": 5120}, "8b": {"hidden_size": 3072, "ffn_hidden_size": 9216}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=TARGETS, default="1b")
    parser.add_argument("--layers", type=int, help="fewer layers: the same peaks in less time")
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, made and emptied")
    parser.add_argument("--frugal", action="store_true", help="delete each file when no later step needs it")
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args()
    shape, folder = SHAPES[arguments.shape], arguments.folder
    shape = shape.replace(num_layers=arguments.layers or shape.num_layers)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        steps = measure(shape, TARGETS[arguments.shape], folder, arguments.frugal, arguments.json)
    finally:
        for path in folder.iterdir():
            remove(path)
    print(f"{'step':<12}{'seconds':>10}{'GB/s':>8}{'peak MB':>10}")
    for name, step in steps["steps"].items():
        print(f"{name:<12}{step['seconds']:>10.1f}{step['gb_per_s']:>8.2f}{step['peak_bytes'] / 1e6:>10,.0f}")


def measure(shape: ModelShape, target: dict, folder: Path, frugal: bool, out: Path | None) -> dict[str, Any]:
    """Every step in its order; the table is rewritten after each, so that an interrupted run keeps what it measured."""
    hf, copy, tar, nemo, back = (folder / name for name in ("hf", "copy", "copy.tar", "m.nemo", "back"))
    size = shape.num_parameters() * 2
    table: dict[str, Any] = {
        **provenance(),
        "layers": shape.num_layers,
        "bytes": size,
        "largest_tensor_bytes": shape.vocab_size * shape.hidden_size * 2,
        "steps": {},
    }

    def step(name: str, action: Callable[[], None], *done_with: Path) -> None:
        seconds, processor, peak, load = run(action)
        table["steps"][name] = {
            "seconds": round(seconds, 2), "gb_per_s": round(size / seconds / 1e9, 3), "peak_bytes": peak,
            "processor_seconds": round(processor, 2),
            "load_average": load,
        }  # fmt: skip
        print(f"{name}: {seconds:.1f} s, peak {peak / 1e6:,.0f} MB", flush=True)
        if out:
            out.write_text(json.dumps(table, indent=2) + "\n")
        for path in done_with if frugal else ():
            remove(path)

    step("baseline", lambda: importlib_only())
    step("synthesize", lambda: synthesize(hf, shape))
    step("cp -r", lambda: os.execvp("cp", ["cp", "-r", str(hf), str(copy)]), copy)
    step("tar", lambda: os.execvp("tar", ["tar", "-cf", str(tar), "-C", str(folder), "hf"]), tar)
    step("to .nemo", lambda: to(hf, nemo), hf)
    step("to HF", lambda: to(nemo, back), back)
    step("prune", lambda: prune(nemo, folder / "student.nemo", target))
    seconds = {name: step["seconds"] for name, step in table["steps"].items()}
    bar = 1.5 * (seconds["cp -r"] + seconds["tar"])
    table["times_of_cp"] = {n: round(seconds[n] / seconds["cp -r"], 3) for n in ("to .nemo", "to HF")}
    table["times_of_cp_and_tar"] = {n: round(seconds[n] / bar * 1.5, 3) for n in ("to .nemo", "to HF", "prune")}
    if out:
        out.write_text(json.dumps(table, indent=2) + "\n")
    return table


def run(action: Callable[[], None]) -> tuple[float, float, int, float]:
    """Seconds, processor seconds, peak resident bytes and the machine's load, of ``action`` in a process of its own."""
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit("the step failed")
    processor = usage.ru_utime + usage.ru_stime
    return time.monotonic() - started, processor, usage.ru_maxrss * 1024, round(os.getloadavg()[0], 1)


def importlib_only() -> None:
    """What the imports alone hold."""
    import nemo_minitron.convert
    import nemo_minitron.stages.prune  # noqa: F401


def synthesize(folder: Path, shape: ModelShape) -> None:
    """The model, without a tokenizer, whose training would take longer than the weights."""
    import torch

    from nemo_minitron import synthetic

    synthetic._write_tokenizer = lambda *_: 0  # type: ignore[assignment]
    synthetic.make_llama(folder, shape, dtype=torch.bfloat16)


def to(source: Path, target: Path) -> None:
    from nemo_minitron.convert import convert

    convert(source, target)


def prune(source: Path, target: Path, sizes: dict[str, int]) -> None:
    """As ``minitron prune`` does it, with scores given (random ones: they decide what is kept, not what it costs)."""
    from nemo_minitron.checkpoint import NemoReader
    from nemo_minitron.config.compose import configure
    from nemo_minitron.stages import prune as stage

    with NemoReader(source) as reader:
        scores = random_scores(reader)
    folder = target.with_suffix(".scores")
    folder.mkdir()
    scores.write(folder)
    overrides = [f"prune.{name}={value}" for name, value in sizes.items()]
    stage.run(
        configure(
            "prune",
            [f"model.restore_from_path={source}", f"export.save_path={target}", f"prune.scores={folder}", *overrides],
        )
    )


def random_scores(reader: Any) -> Any:
    """Scores of a checkpoint's sizes, each unit's drawn."""
    import numpy as np

    from nemo_minitron.importance.scores import Scores
    from nemo_minitron.importance.scores_format import axis_sizes, statistic_sizes

    dice, shape = np.random.default_rng(0), reader.shape
    rankings = {"minitron": {axis: dice.random(size) for axis, size in axis_sizes(shape).items()}}
    statistics = {name: dice.random(size) for name, size in statistic_sizes(shape).items()}
    return Scores(shape, reader.fingerprint(), "0" * 64, rankings, **statistics)


def remove(path: Path) -> None:
    """A file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
