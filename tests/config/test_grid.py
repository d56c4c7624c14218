"""The sizes of a job, from NeMo's and Lightning's sections."""

import pytest

from nemo_minitron.config.grid import Grid, Machines


def test_a_grid_is_one_rank_unless_the_model_section_says_more():
    absent = {"tensor_model_parallel_size": None, "sequence_parallel": None}
    assert Grid.of({}) == Grid.of(absent) == Grid(1, 1, False)
    asked = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    assert Grid.of(asked) == Grid(4, 2, True)


@pytest.mark.parametrize("processes, replicas", [(16, 2), (8, 1), (1, 1)])
def test_replicas_are_counted_from_the_processes(processes, replicas):
    assert Grid(tensor=4, pipeline=2).data_ranks(processes) == replicas


@pytest.mark.parametrize("precision, half", [(32, False), ("bf16", True), ("bf16-mixed", True), (16, False)])
def test_machines_are_one_process_in_float32_unless_the_trainer_section_says_more(precision, half):
    assert Machines.of({}) == Machines.of({"devices": None, "precision": None}) == Machines(1, 1, 32)
    machines = Machines.of({"devices": "2", "num_nodes": 3, "precision": precision})
    assert machines == Machines(2, 3, precision) and machines.half is half
    assert Machines.of({"devices": "auto"}).devices == 1
