"""How long a distillation is said to take: rates are those of the measured files, and times follow from them."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_minitron.distill.duration import H100, H200, RATES, Rate, _span, gflop_per_token, speed, table
from nemo_minitron.distill.run import Run
from nemo_minitron.model.shape import ModelShape
from tests.distill.test_cards import RUN

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
SMOLLM2 = ModelShape(30, 576, 1536, 9, 3, 64, 49152, 49152, share_embeddings_and_output_weights=True)
SMALL = Run(SMOLLM2.replace(ffn_hidden_size=1024), SMOLLM2, seq_length=512, micro_batch_size=16, micro_batches=1)


def load(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_rates_are_those_of_the_measured_files():
    from checkpoint import SHAPES

    small, large, middle = RATES
    lean = load("gpu_lean_h100")
    assert lean["machine"].count(H100) == 1
    seconds = [step["train_s"] for name, step in lean["steps"].items() if name.startswith("adamw, ")]
    options = lean["options"]
    tokens = options["steps"] * options["batch"] * options["length"]
    assert small.tokens_per_s == pytest.approx((tokens / max(seconds), tokens / min(seconds)), rel=2e-3)
    assert small.card == H100 and small.gflop == pytest.approx(gflop_per_token(SMALL), rel=1e-3)

    step = load("gpu_distill_step_h100")
    assert step["machine"].count(H100) == 1
    settings = [step["steps"][name] for name in ("1x8", "1x8+swiglu", "2x4+swiglu")]
    times = [(one["tokens"], seconds) for one in settings for seconds in one["all_step_s"]]
    rates = [tokens / seconds for tokens, seconds in times]
    assert large.tokens_per_s == pytest.approx((min(rates), max(rates)), rel=2e-3)
    assert large.card == H100 and large.gflop == pytest.approx(step["steps"]["build"]["gflop_per_token"], rel=1e-3)
    assert large.gflop == pytest.approx(gflop_per_token(RUN), rel=1e-3)
    full, block = replace(RUN, recompute=True), replace(RUN, recompute=True, recompute_block=True, recompute_layers=8)
    for name, run in (("4x2+full+swiglu", full), ("2x4+block8+swiglu", block)):
        found = step["steps"][name]["tokens_per_s"] * gflop_per_token(run) / 1e3
        assert found == pytest.approx(large.tflops[1], rel=0.03), "what is computed again is counted"

    llama = load("kd_step_llama_1b_h200")
    teacher = SHAPES["1b"]
    student = teacher.replace(hidden_size=llama["hidden"], ffn_hidden_size=llama["ffn"])
    run = Run(student, teacher, llama["length"], llama["batch"], 1)
    rates = [run.tokens / seconds for seconds in llama["all_seconds"]["step"]]
    assert middle.tokens_per_s == pytest.approx((min(rates), max(rates)), rel=2e-3)
    assert middle.card == llama["machine"] == H200 and middle.gflop == pytest.approx(gflop_per_token(run), rel=1e-3)


def test_operations_are_a_forward_pass_of_the_teacher_and_three_of_the_student():
    """Twice the matrices' weights a token, the tied head's among them, and half of what attention masks not."""
    full, ten = (
        replace(SMALL, recompute=True),
        replace(SMALL, recompute=True, recompute_block=True, recompute_layers=10),
    )
    for run, share in ((SMALL, 0), (full, 1), (ten, 1 / 3), (replace(SMALL, teacher=None), 0)):
        expected = 0.0
        for shape, times, again in ((run.teacher, 1, 0), (run.student, 3, share)):
            if shape is not None:
                head = 49152 * 576
                matrices = shape.num_parameters() - shape.hidden_size * (2 * shape.num_layers + 1)
                attention = 2 * shape.num_layers * 512 * 576
                expected += times * (2 * matrices + attention) + again * (2 * (matrices - head) + attention)
        assert gflop_per_token(run) == pytest.approx(expected / 1e9)


FIRST, SECOND = Rate("a", 1.0, (1e3, 2e3), "one"), Rate("a", 100.0, (1e3, 1.5e3), "hundred")


@pytest.mark.parametrize(
    ("gflop", "expected"),
    [
        (1.5, (1, 2, "measured on one")),
        (60.0, (100, 150, "measured on hundred")),
        (10.0, (1, 150, "between one and hundred, both measured")),
        (300.0, (100, 150, "measured on smaller ones, hundred")),
    ],
)
def test_speed_is_that_of_runs_of_about_the_size(gflop, expected):
    found = speed([FIRST, SECOND], gflop)
    assert (found.least, found.most, found.why) == expected


def test_nothing_is_said_of_smaller_models_or_without_rates():
    assert speed([FIRST, SECOND], 0.4) is None and speed([], 1.0) is None


def test_table_has_the_time_of_the_run():
    lines = table(RUN, 1000, H100).splitlines()
    assert "\n".join(lines) in (ROOT / "docs" / "running.md").read_text()
    tokens = 1000 * 128 * 4096
    assert f"1,000 steps of 128 x 4,096 tokens, {tokens:,} in all" in lines[0] and "44 GFLOP a token" in lines[0]
    assert len(lines) == 3 and all(len(line) <= 140 for line in lines)
    low, high = (float(one) for one in re.search(r"1 x NVIDIA H100 .* about ([\d.]+) to ([\d.]+) h", lines[1]).groups())
    assert [low, high] == pytest.approx([tokens / 10_910 / 3600, tokens / 10_270 / 3600], rel=0.05)
    assert "measured on an 8B teaching 4.5B" in lines[1] and "measured on smaller ones, a 1.2B" in lines[2]


def test_several_cards_share_the_work_and_that_is_said():
    shared = replace(RUN, tensor_parallel=2, data_parallel=2, micro_batches=64)
    one, four = table(RUN, 1000, H100), table(shared, 1000, H100)
    hours = [float(re.search(r"about ([\d.]+) to [\d.]+ h", text)[1]) for text in (one, four)]
    assert hours[0] == pytest.approx(4 * hours[1], rel=0.05)
    assert "4 x NVIDIA H100 80GB HBM3" in four and "what 4 lose to each other was not measured" in four


def test_a_device_without_rates_gets_no_time():
    assert table(RUN, 10, "NVIDIA A100").splitlines()[-1] == "  this machine, NVIDIA A100: no rate was measured"
    assert table(RUN, 10).splitlines()[-1] == "  this machine, a CPU: no rate was measured"
    assert "this machine" not in table(RUN, 10, H200)
    shape = SMOLLM2.replace(num_layers=2)
    tiny = table(replace(SMALL, student=shape, teacher=shape), 10)
    assert tiny.count("no rate was measured on models as small as these") == 2 and "about" not in tiny


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [
        (10.0, 20.4, "10 to 20 s"),
        (50.0, 100.0, "50 s to 1.7 min"),
        (3601.0, 7300.0, "1 to 2 h"),
        (70.0, 100.0, "1.2 to 1.7 min"),
        (86400.0 * 10, 86400.0 * 123, "10 to 120 days"),
        (3600.0 * 4, 3600.0 * 4.001, "4 h"),
    ],
)
def test_spans_are_in_one_unit_where_it_serves_both(least, most, expected):
    assert _span(least, most) == expected
