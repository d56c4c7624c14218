"""The plan's arithmetic; against what models really hold see ``tests/nemo/test_memory.py``."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nemo_minitron.distill.activations import backward_work, kept, layer_activations
from nemo_minitron.distill.memory import ITEMS, largest_micro_batch, memory
from nemo_minitron.distill.run import Run
from nemo_minitron.model.layout import parameters
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


def test_the_lean_mode_has_what_torchao_allocates():
    """8-bit moments of torchao's own optimizer, with small ones in float32 as ours has them, tensor by tensor."""
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    shape = STUDENT.replace(hidden_size=96, kv_channels=10, qkv_bias=True)
    sizes = [(p.size(shape), shape.num_layers if p.per_layer else 1) for p in parameters(shape)]
    weights = [
        torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size, times in sizes for _ in range(times)
    ]
    optimizer, states = AdamW8bit(weights), 0
    for weight in weights:
        for signed in (True, False):
            moment = optimizer._new_buffer(weight, signed)
            parts = (
                [moment.codes, moment.scale, moment.qmap] if isinstance(moment, OptimState8bit) else [moment.float()]
            )
            states += sum(part.nbytes for part in parts)
    run = dataclasses.replace(RUN, student=shape, half=True, half_weights=True, lean=True)
    items, number = memory(run), sum(weight.numel() for weight in weights)
    assert items["weights"] == items["gradients"] == 2 * number
    assert items["optimizer"] == states
    assert memory(dataclasses.replace(run, half_weights=False))["gradients"] == 4 * number


def test_a_step_of_one_micro_batch_has_gradients_or_activations():
    """The lean mode has no buffers of gradients: they come as activations go."""
    one = dataclasses.replace(RUN, micro_batches=1, micro_batch_size=64, half=True, half_weights=True, lean=True)
    two = dataclasses.replace(one, micro_batches=2)
    held = kept(STUDENT, one, STUDENT.num_layers)
    assert memory(two)["activations"] - memory(one)["activations"] == memory(one)["gradients"]
    assert memory(two)["activations"] >= held


def test_recomputation_keeps_inputs_and_one_group_of_layers():
    run = dataclasses.replace(RUN, student=STUDENT.replace(num_layers=12), seq_length=512)
    layer = layer_activations(run.student, run)
    inputs = 4 * 512 * 2 * STUDENT.hidden_size
    final = kept(run.student, run, 0)
    for layers, block, stays, again in ((1, False, 12 * inputs, 1), (5, False, 3 * inputs, 5),
                                        (5, True, 5 * inputs + 7 * layer, 1)):  # fmt: skip
        recompute = dataclasses.replace(run, recompute=True, recompute_layers=layers, recompute_block=block)
        assert kept(run.student, recompute, 12) == stays + final
        added = backward_work(run.student, recompute) - backward_work(run.student, run)
        assert added == again * layer


def test_recomputation_shows_in_the_peak():
    """A layer that is computed again for backward needs more than the loss does where that has little room."""
    run = dataclasses.replace(RUN, seq_length=512, loss_memory=1)
    recompute = dataclasses.replace(run, recompute=True)
    items, layer = memory(recompute), layer_activations(STUDENT, run)
    inputs = STUDENT.num_layers * 4 * 512 * 2 * STUDENT.hidden_size
    assert items["activations"] + items["loss"] >= inputs + layer
    assert items["activations"] + items["loss"] < sum(memory(run)[name] for name in ("activations", "loss"))


def test_the_optimizers_step_counts_where_it_takes_more_than_backward():
    """torch's Adam on CUDA takes a value of each parameter more, when activations are gone."""
    gpu = dataclasses.replace(RUN, seq_length=1, device="cuda")
    number = STUDENT.num_parameters(padded=True)
    items = memory(dataclasses.replace(gpu, loss_memory=1))
    assert items["optimizer"] + items["activations"] + items["loss"] == pytest.approx(12 * number)


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
