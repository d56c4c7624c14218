"""The plan's arithmetic; against what models really hold see ``tests/nemo/test_memory.py``."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_minitron.distill.memory import ITEMS, Run, largest_micro_batch, memory
from nemo_minitron.model.shape import ModelShape

TEACHER = ModelShape(4, 64, 128, 8, 4, 16, 512, 512)
STUDENT = TEACHER.replace(hidden_size=48, ffn_hidden_size=96)
RUN = Run(STUDENT, TEACHER, seq_length=32, micro_batch_size=2, micro_batches=4)


def test_weights_are_the_parameters():
    items = memory(RUN)
    assert tuple(items) == ITEMS
    assert items["weights"] == items["gradients"] == 4 * STUDENT.num_parameters(padded=True)
    assert items["optimizer"] == 8 * STUDENT.num_parameters(padded=True)
    assert items["teacher"] == 4 * TEACHER.num_parameters(padded=True) + 4 * 4 * 64 * 64  # and its hidden states


def test_mixed_precision_on_gpus_keeps_float32_masters():
    run = dataclasses.replace(RUN, half=True, half_weights=True, sharded_optimizer=True, data_parallel=4)
    parameters = STUDENT.num_parameters(padded=True)
    items = memory(run)
    assert (items["weights"], items["gradients"]) == (2 * parameters, 4 * parameters)
    assert items["optimizer"] == 3 * parameters  # 12 bytes over 4 ranks


@pytest.mark.parametrize("change", [{"tensor_parallel": 2}, {"tensor_parallel": 4, "sequence_parallel": True},
                                    {"pipeline_parallel": 2}])  # fmt: skip
def test_more_ranks_need_less_each(change):
    whole, part = memory(RUN), memory(dataclasses.replace(RUN, **change))
    for name in ("weights", "gradients", "optimizer", "teacher"):
        assert part[name] < whole[name], name


def test_a_teacher_that_does_not_split_is_whole_and_a_cached_one_takes_nothing():
    odd = TEACHER.replace(num_attention_heads=6, num_query_groups=3)
    run = dataclasses.replace(RUN, teacher=odd, tensor_parallel=2)
    assert memory(run)["teacher"] > 4 * odd.num_parameters()
    assert memory(dataclasses.replace(RUN, teacher=None))["teacher"] == 0


def test_the_largest_micro_batch_is_the_last_that_fits():
    available = 64 << 20
    largest = largest_micro_batch(RUN, available)
    assert largest > 1

    def total(size: int) -> int:
        return sum(memory(dataclasses.replace(RUN, micro_batch_size=size)).values())

    assert total(largest) <= available < total(largest + 1)
    assert largest_micro_batch(RUN, 1000) == 0
