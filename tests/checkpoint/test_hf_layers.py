"""Lists per layer of a config.json: layers that stay keep their own entries, in their order."""

import pytest

from nemo_minitron.checkpoint.hf_layers import cut_lists
from nemo_minitron.checkpoint.nemo_config import with_kept_layers
from nemo_minitron.errors import MinitronError

KINDS = ["full_attention", "chunked", "full_attention", "nope"]
CONFIG = {
    "architectures": ["X"],
    "num_hidden_layers": 4,
    "layer_types": KINDS,
    "no_rope_layers": [1, 1, 1, 0],
    "novelty": [0.0, 0.1, 0.2, 0.3],
    "eos_token_id": [1, 2, 3, 4],
    "three": [1, 2, 3],
}


def test_kept_layers_keep_their_entries():
    config = dict(CONFIG)
    cut_lists(config, 4, 2, [1, 3])
    assert config == CONFIG | {"layer_types": ["chunked", "nope"], "no_rope_layers": [1, 0], "novelty": [0.1, 0.3]}


def test_nothing_changes_where_no_layer_went():
    config = dict(CONFIG)
    cut_lists(config, 4, 4, None)
    assert config == CONFIG


def test_equal_entries_need_no_indices():
    config = {"layer_types": ["full_attention"] * 4}
    cut_lists(config, 4, 3, None)
    assert config == {"layer_types": ["full_attention"] * 3}


def test_entries_that_differ_are_not_guessed():
    with pytest.raises(MinitronError, match="layer_types has another entry for each of 4 layers, of which 2 are left"):
        cut_lists(dict(CONFIG), 4, 2, None)


@pytest.mark.parametrize("kept", [[0], [0, 4], [1, 0], [1, 1], [0, True], [0, "1"], "01", {"a": 1}, [-1, 0]])
def test_indices_of_a_file_are_checked(kept):
    with pytest.raises(MinitronError, match=r"minitron\.layers must be 2 ascending indices below 4"):
        cut_lists(dict(CONFIG), 4, 2, kept)


def test_pruning_notes_layers_where_lists_tell_them_apart_and_only_there():
    plain = {"minitron": {"hf_config": CONFIG | dict.fromkeys(("layer_types", "no_rope_layers", "novelty"), [1] * 4)}}
    assert with_kept_layers(plain, [0, 2]) == plain
    once = with_kept_layers({"minitron": {"hf_config": CONFIG}}, [0, 2, 3])
    assert once["minitron"]["layers"] == [0, 2, 3]
    assert with_kept_layers(once, (1, 2))["minitron"]["layers"] == [2, 3]  # among those of hf_config
    assert with_kept_layers({}, [0]) == {}
