"""What fits on which card: the table against the plan of each of its cells, and the recipes for an 8B."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_minitron.config.compose import compose
from nemo_minitron.distill.cards import CARDS, Choice, choices, table, usable
from nemo_minitron.distill.memory import memory
from nemo_minitron.distill.run import Run
from nemo_minitron.model.shape import shape_of

TEACHER = shape_of(compose("synthesize", ["model=llama3_1_8b", "output_path=x"]).model)
WIDTH = TEACHER.replace(hidden_size=3072, ffn_hidden_size=9216)
RUN = Run(WIDTH, TEACHER, seq_length=4096, micro_batch_size=1, micro_batches=128)


def needed(choice: Choice, size: int) -> float:
    return sum(memory(choice.of(RUN, size)).values()) / 1e9


def test_each_cell_is_the_largest_micro_batch_that_fits():
    lines = table(RUN).splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert table(RUN) in (Path(__file__).parents[2] / "docs" / "running.md").read_text()
    rows = [re.split(r" {2,}", line.strip()) for line in lines[2 : 2 + len(choices(RUN))]]
    for choice, row in zip(choices(RUN), rows, strict=True):
        assert row[0].split()[0] == choice.optimizer
        for card, cell in zip(CARDS, row[-len(CARDS) :], strict=True):
            if lacking := re.fullmatch(r"lacks (\d+) GB", cell):
                assert needed(choice, 1) - usable(card) / 1e9 == pytest.approx(int(lacking[1]), abs=0.5)
                continue
            size, takes = (int(number) for number in re.fullmatch(r"(\d+) \((\d+) GB\)", cell).groups())
            assert needed(choice, size) == pytest.approx(takes, abs=0.5) and needed(choice, size) * 1e9 <= usable(card)
            assert size == 128 or needed(choice, 2 * size) * 1e9 > usable(card)


def test_a_line_for_each_card_says_what_to_take():
    """What needs no recomputation before what does, and then the first of the table."""
    advice = dict(line.split(": ", 1) for line in re.findall(r"^\d+ GB: .*(?:\n  with .*)?", table(RUN), re.M))
    assert advice["24 GB"].startswith("nothing fits; adamw_8bit, full recompute, lacks ")
    assert advice["80 GB"].startswith("adamw_8bit, no recompute, micro-batch 1 (")
    small = table(replace(RUN, student=WIDTH.replace(num_layers=4), teacher=None))
    advice = dict(line.split(": ", 1) for line in re.findall(r"^\d+ GB: .*", small, re.M))
    assert advice["24 GB"].startswith("adamw_8bit, no recompute, ")
    assert advice["141 GB"].startswith("adamw, no recompute, ")
    assert "teacher" not in small


def test_where_a_teacher_has_no_room_its_cache_may_have():
    line = next(line for line in table(RUN).splitlines() if line.startswith("  with distill.teacher_cache: adamw_8bit"))
    size, takes = (
        int(number) for number in re.search(r"full recompute, micro-batch (\d+) \((\d+) GB\)", line).groups()
    )
    alone = Choice("adamw_8bit", True, True).of(replace(RUN, teacher=None), size)
    assert sum(memory(alone).values()) / 1e9 == pytest.approx(takes, abs=0.5) and takes <= 40


def test_micro_batches_divide_the_samples_of_a_step_and_split_models_have_no_8_bit_moments():
    odd = replace(RUN, micro_batches=3, micro_batch_size=2, tensor_parallel=8, sequence_parallel=True)
    found = table(odd)
    assert "TP 8 x PP 1" in found and "adamw_8bit" not in found
    assert set(re.findall(r"(\d+) \(", found)) <= {"1", "2", "3", "6"}


def test_a_choice_is_planned_as_on_a_gpu_in_bf16_whatever_the_run_has():
    run = Choice("adamw_8bit", True, False).of(replace(RUN, micro_batch_size=4, micro_batches=8, process=9), 2)
    assert (run.device, run.half, run.half_weights, run.lean) == ("cuda", True, True, True)
    assert (run.micro_batch_size, run.micro_batches) == (2, 16) and run.process != 9
