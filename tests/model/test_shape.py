"""Counts against the published numbers, and grids that cannot be."""

import pytest

from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import LinearScaling, ModelShape, RopeScaling

LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, 128256)
SMOLLM2 = ModelShape(30, 576, 1536, 9, 3, 64, 49152, 49152, True)
LINEAR = SMOLLM2.replace(rope_scaling=LinearScaling(4.0))


@pytest.mark.parametrize("scaling", [None, RopeScaling(32.0, 1.0, 4.0, 64), LinearScaling(4.0)])
def test_a_shape_comes_back_from_plain_values(scaling):
    shape = SMOLLM2.replace(rope_scaling=scaling)
    assert ModelShape.from_dict(shape.to_dict()) == shape
    assert (shape.to_dict()["rope_scaling"] or {}).get("rope_type") == ("linear" if shape == LINEAR else None)


def test_parameter_counts():
    assert LLAMA_8B.num_parameters() == 8_030_261_248
    assert SMOLLM2.num_parameters() == 134_515_008
    assert LLAMA_8B.replace(padded_vocab_size=129024).num_parameters() == LLAMA_8B.num_parameters()
    assert LLAMA_8B.kv_cache_bytes_per_token() == 131072


@pytest.mark.parametrize("layers,stages,first", [(32, 4, None), (5, 2, 2), (30, 4, 6), (5, 4, 2), (7, 3, 1)])
def test_unequal_stages_leave_every_stage_a_layer(layers, stages, first):
    shape = LLAMA_8B.replace(num_layers=layers)
    assert shape.first_stage_layers(stages) == first
    if first is not None:
        assert first >= 1 and (layers - first) % (stages - 1) == 0 and layers > first


@pytest.mark.parametrize(
    "grid,words",
    [((16, 1), ["(16)", "num_query_groups (8)"]), ((1, 64), ["(64)", "num_layers (32)"])],
)
def test_a_grid_that_cannot_hold_the_model_is_refused_with_both_numbers(grid, words):
    with pytest.raises(MinitronError) as error:
        LLAMA_8B.check_parallel(*grid)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "change", [{"num_query_groups": 5}, {"hidden_size": 0}, {"kv_channels": 63}, {"num_layers": 2.0}]
)
def test_an_impossible_shape_is_refused(change):
    with pytest.raises(MinitronError, match=next(iter(change))):
        LLAMA_8B.replace(**change)
