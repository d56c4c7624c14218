"""Everything that must stay the same, bit by bit, while code is rearranged; made by the command line alone.

``python tests/same_bytes/make.py OUT`` writes two tiny models, their scores, plans, students, exports and trainings
into the new folder OUT, and what they hold into ``OUT/observed.json``. With ``--checkout DIR`` the package in DIR does
it, of whatever version: two checkouts that compute the same on one machine leave equal ``observed.json`` and equal
``students/*.plan.yaml``. ``--keep`` makes what came out the fixture that ``tests/test_same_bytes.py`` compares with:
only where digits are meant to move.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = Path(__file__).resolve().parent / "fixture"
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from tests.same_bytes.models import write_models  # noqa: E402
from tests.same_bytes.observe import observe  # noqa: E402

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Of every process: with more threads, sums are split among as many as there happen to be."""
LENGTH = 32

Run = Callable[[list[list[str]]], None]
"""Runs commands one after another in a process of their own and the folder of outputs; raises where one fails."""

DRAWN = "calibration.own_samples=0"
"""The model's own text is another since: by the same seed, from other random numbers."""
SCORES: dict[str, tuple[str, list[str]]] = {
    "ranked": ("llama", [DRAWN]),
    "plain": ("llama", [DRAWN, "calibration.reconstruction=false"]),
    "streamed": ("llama", [DRAWN, "importance.stream=true"]),
    "tp2": ("llama", [DRAWN, "trainer.devices=2", "model.tensor_model_parallel_size=2"]),
    "pp2": ("llama", [DRAWN, "trainer.devices=2", "model.pipeline_model_parallel_size=2"]),
    "qwen2": ("qwen2", [DRAWN]),
}
"""Scores folder → model and further keys."""
KEPT_SCORES = ("ranked", "plain", "qwen2")
"""Those whose files are in the fixture."""

WIDTH = ["hidden_size=24", "ffn_hidden_size=32", "num_query_groups=2", "num_attention_heads=2"]
CUT = "compensate=false"
PRUNINGS: dict[str, tuple[str, str | None, list[str]]] = {
    "width_minitron_cut": ("llama", "ranked", [*WIDTH, CUT]),
    "width_reconstruction_cut": ("llama", "ranked", [*WIDTH, CUT, "ranking=reconstruction"]),
    "width_plain_cut": ("llama", "plain", WIDTH),
    "width_turned": ("llama", "ranked", WIDTH),
    "width_unturned": ("llama", "ranked", [*WIDTH, "rotate=false"]),
    "width_minitron_turned": ("llama", "ranked", [*WIDTH, "ranking=minitron"]),
    "heads_ffn": ("llama", "ranked", ["num_attention_heads=4", "ffn_hidden_size=40"]),
    "groups": ("llama", "ranked", ["num_query_groups=3", "num_attention_heads=6"]),
    "named_layers_cut": ("llama", None, ["drop_layers=[2]"]),
    "depth_influence_cut": ("llama", "ranked", ["num_layers=3", CUT]),
    "depth_influence": ("llama", "ranked", ["num_layers=2"]),
    "depth_contiguous": ("llama", "ranked", ["num_layers=2", "layer_selection=contiguous"]),
    "depth_contiguous_cut": ("llama", "plain", ["num_layers=2", "layer_selection=contiguous"]),
    "depth_contiguous_loss": ("llama", "ranked", ["num_layers=2", "layer_selection=contiguous_loss"]),
    "depth_alone": ("llama", "ranked", ["num_layers=2", "layer_selection=leave_one_out"]),
    "depth_greedy": ("llama", "ranked", ["num_layers=2", "layer_selection=greedy"]),
    "depth_greedy_cut": ("llama", "ranked", ["num_layers=2", "layer_selection=greedy", CUT]),
    "depth_beam": ("llama", "ranked", ["num_layers=2", "layer_selection=beam"]),
    "depth_width": ("llama", "ranked", ["num_layers=3", *WIDTH]),
    "everything_cut": ("llama", None, [f"plan={FIXTURE / 'plans' / 'everything_cut.plan.yaml'}"]),
    "qwen2_cut": ("qwen2", "qwen2", [*WIDTH, CUT]),
    "qwen2_turned": ("qwen2", "qwen2", WIDTH),
    "qwen2_ffn": ("qwen2", "qwen2", ["ffn_hidden_size=32"]),
}
"""Student → model, scores and further keys of ``prune``; ``_cut`` where no weight is re-solved."""

EXPORTS: dict[str, list[str]] = {
    "llama": ["llama.nemo"],
    "llama_half": ["llama.nemo", "precision=bf16"],
    "llama_shards": ["llama.nemo", "max_shard_size=100KB"],
    "qwen2": ["qwen2.nemo"],
    **{name: [f"students/{name}.nemo"] for name in ("width_minitron_cut", "depth_influence_cut", "qwen2_cut")},
}
"""HF folder → what it is converted from, and further keys."""

GRIDS: dict[str, list[str]] = {
    "one": [],
    "tp2": ["trainer.devices=2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    "pp2": ["trainer.devices=2", "model.pipeline_model_parallel_size=2"],
    "dp2": ["trainer.devices=2"],
}
TOPK = ["loss=topk", "top_k=8", "lm_weight=0.5", "temperature=2.0"]
TRAININGS: dict[str, tuple[str, str, list[str]]] = {
    "forward_kl_one": ("distill", "one", []),
    "forward_kl_tp2": ("distill", "tp2", []),
    "topk_one": ("distill", "one", TOPK),
    "topk_pp2": ("distill", "pp2", TOPK),
    "cached_one": ("distill", "one", ["loss=topk", "top_k=8", "teacher_cache=cache"]),
    "jsd_hidden_tp2": ("distill", "tp2", ["loss=jsd", "hidden_pairs=[[2,2],[4,4]]"]),
    "reverse_kl_dp2": ("distill", "dp2", ["loss=reverse_kl", "lm_weight=1.0"]),
    "finetune_one": ("finetune", "one", []),
    "finetune_pp2": ("finetune", "pp2", []),
}
"""Training → command, grid and keys of ``distill``; the student is ``width_minitron_cut``."""
EVALUATIONS = ("one", "tp2", "pp2")


def prepare(out: Path, run: Run) -> None:
    """Models as ``.nemo``, tokens, and ``synthesized``, a model that the package itself makes up."""
    write_models(out)
    sizes = "{num_layers: 2, hidden_size: 16, ffn_hidden_size: 24, num_attention_heads: 2, vocab_size: 300}"
    run(
        [
            *(["convert", f"input_name_or_path={name}", f"output_path={name}.nemo"] for name in ("llama", "qwen2")),
            ["preprocess", "input=text.txt", "tokenizer.type=llama.nemo", "output_prefix=tokens"],
            ["synthesize", f"model={sizes}", "output_path=synthesized"],
        ]
    )


def measure(run: Run, names: Iterable[str] = SCORES) -> None:
    """Scores folders; each in a process of its own, as Megatron-Core wants it."""
    data = ["calibration.data_prefix=tokens_text_document", "calibration.num_samples=16"]
    for name in names:
        model, keys = SCORES[name]
        source = f"model.restore_from_path={model}.nemo"
        run([["importance", source, f"output_path=scores/{name}", *data, f"calibration.seq_length={LENGTH}", *keys]])


def prune(
    run: Run,
    names: Iterable[str] = PRUNINGS,
    scores: Path | str = "scores",
    plans: Path | None = None,
    students: str = "students",
) -> None:
    """Plans and students, by request, or by the plans of a folder.

    Args:
        scores: folder of scores folders. plans: folder of ``NAME.plan.yaml``. students: folder to write.
    """
    commands = []
    for name in names:
        model, measured, keys = PRUNINGS[name]
        if plans is not None:
            keys = [f"plan={plans}/{name}.plan.yaml"]
            measured = None if name.endswith("_cut") else measured
        given = [] if measured is None else [f"prune.scores={scores}/{measured}"]
        files = [f"model.restore_from_path={model}.nemo", f"export.save_path={students}/{name}.nemo"]
        commands.append(["prune", *files, *given, *(f"prune.{key}" for key in keys)])
    run(commands)


def export(run: Run) -> None:
    """HF folders."""
    sources = EXPORTS.items()
    run([["convert", f"input_name_or_path={k[0]}", f"output_path=exports/{name}", *k[1:]] for name, k in sources])


def train(run: Run, names: Iterable[str] = TRAININGS) -> None:
    """Distillations and fine-tunings of four steps."""
    for name in names:
        command, grid, keys = TRAININGS[name]
        models = ["model.restore_from_path=llama.nemo"]
        if command == "distill":
            student = "students/width_minitron_cut.nemo"
            models = [f"model.restore_from_path={student}", "model.kd_teacher_restore_from_path=llama.nemo"]
        settings = [
            f"model.nemo_path=trained/{name}.nemo",
            "model.data.data_prefix={train: [tokens_text_document], validation: [tokens_text_document]}",
            "model.data.splits_string=null",
            f"model.data.index_mapping_dir=trained/{name}.index",
            f"model.data.seq_length={LENGTH}",
            "model.micro_batch_size=2",
            "model.global_batch_size=8",
            "model.optim.lr=1e-2",
            "model.optim.sched.warmup_steps=1",
            "trainer.max_steps=4",
            "trainer.val_check_interval=2",
            "trainer.limit_val_batches=2",
            "trainer.log_every_n_steps=1",
            f"exp_manager.explicit_log_dir=trained/{name}",
            "exp_manager.create_checkpoint_callback=false",
        ]
        run([[command, *models, *settings, *GRIDS[grid], *(f"distill.{key}" for key in keys)]])


def evaluate(run: Run, grids: Iterable[str] = EVALUATIONS, source: str = "students/width_turned.nemo") -> None:
    """Held-out losses of a student."""
    data = "evaluate.data_prefix=tokens_text_document"
    given = [f"model.restore_from_path={source}", data, f"evaluate.seq_length={LENGTH}", "evaluate.num_samples=7"]
    for grid in grids:
        run([["evaluate", *given, f"output_path=evaluated/{grid}.json", *GRIDS[grid]]])


def search(run: Run, scores: Path | str = "scores") -> None:
    """Shapes for a budget, by what scores predict."""
    given = ["model.restore_from_path=llama.nemo", f"scores={scores}/ranked", "budget.num_parameters=40000"]
    run([["search", *given, "search.until=predict", "output_path=searched"]])


def subprocesses(out: Path, checkout: Path = ROOT) -> Run:
    """A runner with one thread a process, which imports the package of ``checkout``."""
    code = "import json, sys; from nemo_minitron.cli import main; sys.exit(any(map(main, json.loads(sys.argv[1]))))"
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    environment = {name: value for name, value in os.environ.items() if name not in launcher} | ENVIRONMENT
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))

    def run(commands: list[list[str]]) -> None:
        argv = ["-m", "nemo_minitron", *commands[0]] if len(commands) == 1 else ["-c", code, json.dumps(commands)]
        options: dict[str, Any] = {"cwd": out, "env": environment, "capture_output": True, "text": True}
        result = subprocess.run([sys.executable, *argv], check=False, **options)
        if result.returncode:
            raise RuntimeError(f"{argv}: status {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")

    return run


def make(out: Path, run: Run) -> None:
    """All of it, into an empty folder."""
    prepare(out, run)
    measure(run)
    prune(run)
    export(run)
    train(run)
    evaluate(run)
    search(run)


def keep(out: Path, observed: dict[str, Any]) -> None:
    """Make what is in ``out`` the fixture."""
    for name in KEPT_SCORES:
        shutil.copytree(out / "scores" / name, FIXTURE / "scores" / name, dirs_exist_ok=True)
    (FIXTURE / "plans").mkdir(parents=True, exist_ok=True)
    for name in PRUNINGS:
        shutil.copy(out / "students" / f"{name}.plan.yaml", FIXTURE / "plans")
    (FIXTURE / "expected.json").write_text(dump(observed))


def dump(value: Any, depth: int = 2) -> str:
    """JSON with a line for each entry down to ``depth``."""
    if depth < 0 or not isinstance(value, dict) or not value:
        return json.dumps(value)
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {dump(value[key], depth - 1)}" for key in value) + "\n}"


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="new folder to write")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="folder that holds the package; this one's")
    parser.add_argument("--keep", action="store_true", help="make it the fixture of the tests")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True)
    make(out, subprocesses(out, options.checkout.resolve()))
    observed = observe(out)
    (out / "observed.json").write_text(dump(observed))
    if options.keep:
        keep(out, observed)


if __name__ == "__main__":
    main()
