"""What ``benchmarks/gpu`` counts and keeps; its measurements need a GPU, ``--tiny`` runs the same code here."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "gpu")]

import distill_step  # noqa: E402
from record import Record  # noqa: E402


def fail() -> None:
    raise RuntimeError("out of memory")


def test_a_step_that_fails_is_kept_and_the_next_begins(tmp_path, capsys):
    path = tmp_path / "out" / "found.json"
    record = Record(path)

    def on_disk() -> dict:
        return json.loads(path.read_text())["steps"]

    assert record.step("a", fail) is None
    assert on_disk()["a"]["error"] == "RuntimeError: out of memory"
    assert record.step("b", lambda: {"seconds": 2}) == {"seconds": 2}
    assert on_disk()["b"]["seconds"] == 2 and list(path.parent.iterdir()) == [path]
    assert "in fail" in capsys.readouterr().out, "the traceback"


def test_no_step_begins_without_the_time_that_it_needs():
    record = Record(None, seconds=5)
    assert record.step("long", fail, needs=60) is None
    assert "skipped" in record.table["steps"]["long"]
    assert record.step("short", lambda: {"found": 1}, needs=1) == {"found": 1}


def test_settings_are_read():
    full, block = (distill_step.Setting.of(text) for text in ("4x2+full+swiglu", "2+block20+compile"))
    assert (full.micro_batch, full.micro_batches, full.recompute, full.swiglu, full.compiled) == (4, 2, -1, True, False)
    assert (block.micro_batch, block.micro_batches, block.recompute) == (2, 1, 20) and block.compiled


def options(**given: object) -> argparse.Namespace:
    asked = {"tiny": False, "layers": None, "length": 4096, "optimizer": "adamw", "steps": 2}
    return argparse.Namespace(**asked | given)


def test_operations_of_a_token_are_those_of_transformers():
    """Products of matrices as torch counts them in transformers' Llama; half of what attention masks is not needed."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    bench, length = distill_step.Bench(options(tiny=True, length=64), None), 64

    def counted(shape) -> float:
        config = LlamaConfig(
            num_hidden_layers=shape.num_layers, hidden_size=shape.hidden_size, vocab_size=shape.vocab_size,
            intermediate_size=shape.ffn_hidden_size, num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_query_groups, head_dim=shape.kv_channels, attn_implementation="eager",
        )  # fmt: skip
        model, tokens = LlamaForCausalLM(config), torch.zeros(1, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens)
        counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
        positions = shape.kv_channels * length  # RoPE's angles, a product of them there
        return counts["aten.mm"] + (counts["aten.bmm"] - positions) / 2

    expected = counted(bench.teacher) + 3 * counted(bench.student)
    assert bench.flops() * length == expected


def test_the_8b_and_its_student_take_44_gflop_a_token():
    bench = distill_step.Bench(options(), None)
    assert bench.student.num_parameters() == pytest.approx(4.5e9, rel=0.01)
    assert 43e9 < bench.flops() < 45e9


@pytest.mark.slow
def test_a_step_runs_on_models_of_a_shape_alone(tmp_path):
    bench = distill_step.Bench(options(tiny=True, length=32), None)
    built = bench.build(tmp_path)
    assert built["parameters"] == {name: getattr(bench, name).num_parameters() for name in ("teacher", "student")}
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    found = bench.measure(distill_step.Setting.of("2x2+swiglu"))
    assert found["tokens"] == 128 and found["losses"][-1] < found["losses"][0]
    assert found["step_s"] == pytest.approx(sum(found[f"{part}_s"] for part in distill_step.PARTS), rel=0.5)
