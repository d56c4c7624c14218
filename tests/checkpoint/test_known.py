"""Every key of a ``.nemo``'s config and every tensor of its weights is used, neutral, or refused by name."""

import pytest
import torch
import transformers

from nemo_minitron.checkpoint import NemoReader, NemoWriter, each_tensor, known
from nemo_minitron.checkpoint.hf_config import hf_config_from_shape, shape_from_hf
from nemo_minitron.checkpoint.nemo_config import nemo_config_from_hf, shape_from_nemo, update_shape
from nemo_minitron.config.nemo_keys import MODEL
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.layout import EMBEDDING
from nemo_minitron.model.shape import LinearScaling
from nemo_minitron.registry import FAMILIES
from tests.canonical import random_model
from tests.llamas import GQA

SHAPE = GQA.replace(num_layers=2)
HF = hf_config_from_shape(SHAPE, torch.float32)
CONFIG = nemo_config_from_hf(HF, SHAPE, dtype=torch.float32, divisor=64, tokenizer=None)
TIED = SHAPE.replace(share_embeddings_and_output_weights=True)

REFUSED = {
    "qk_layernorm": ("yes", "must be false, found 'yes'"),
    "softmax_scale": (0.1, "must be null, found 0.1"),
    "no_rope_freq": (4, "must be null"),
    "seq_len_interpolation_factor": (0.5, "must be at least 1, found 0.5"),
    "rotary_percentage": (0.5, "must be 1, found 0.5"),
    "rotary_interleaved": (True, "must be false"),
    "window_size": ([128, 128], "must be null or .W, 0., found"),
    "num_moe_experts": (8, "must be null"),
    "activation": ("gelu", "must be 'fast-swiglu'"),
    "normalization": ("layernorm1p", "must be 'rmsnorm'"),
    "bias": ("all", "must be true or false, found 'all'"),
    "drop_layers": ([1], "must be null"),
    "mcore_customization_config": ({"final_logit_softcapping": 30.0}, "must be null"),
    "apply_embedding_scaling": (True, "must be false"),
    "transformer_block_type": ("post_ln", "must be 'pre_ln'"),
    "mtp_num_layers": (1, "must be null"),
    "name": ("megatron_falcon_gpt", "must not be 'megatron_falcon_gpt'"),
    "share_embeddings_and_output_weights": ("no", "must be true or false"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused_by_name(key):
    value, message = REFUSED[key]
    with pytest.raises(MinitronError, match=f"model_config.yaml: {key} {message}"):
        shape_from_nemo({**CONFIG, key: value}, SHAPE.padded_vocab_size)


def test_linear_rope_is_read_and_written():
    linear = SHAPE.replace(rope_scaling=LinearScaling(4.0))
    config = update_shape({**CONFIG, "seq_len_interpolation_factor": None}, linear)
    assert config["seq_len_interpolation_factor"] == 4.0 and config["scale_positional_embedding"] is False
    assert shape_from_nemo(config, SHAPE.padded_vocab_size) == linear
    assert shape_from_nemo({**CONFIG, "seq_len_interpolation_factor": None}, SHAPE.padded_vocab_size) == SHAPE
    assert "seq_len_interpolation_factor" not in update_shape(config, SHAPE)
    with pytest.raises(MinitronError, match="seq_len_interpolation_factor must be 1 with scale_positional_embedding"):
        shape_from_nemo({**config, "scale_positional_embedding": True}, SHAPE.padded_vocab_size)


@pytest.mark.parametrize("key", ["mcore_gpt", "normalization", "activation", "position_embedding_type"])
def test_what_is_absent_means_what_nemo_assumes(key):
    with pytest.raises(MinitronError, match=f"model_config.yaml: {key} must be"):
        shape_from_nemo({name: value for name, value in CONFIG.items() if name != key}, SHAPE.padded_vocab_size)


@pytest.mark.parametrize("value", [[0, 0], [-1, 0], [64], [64.0, 0], [True, 0], 64, "64"])
def test_a_window_that_is_none_is_refused(value):
    with pytest.raises(MinitronError, match=r"model_config\.yaml: window_size must"):
        shape_from_nemo({**CONFIG, "window_size": value}, SHAPE.padded_vocab_size)


def test_a_window_is_read_and_written():
    windowed = SHAPE.replace(sliding_window=64)
    config = update_shape(CONFIG, windowed)
    assert config["window_size"] == [64, 0] and shape_from_nemo(config, SHAPE.padded_vocab_size) == windowed
    assert update_shape(config, SHAPE)["window_size"] is None and "window_size" not in update_shape(CONFIG, SHAPE)


def test_a_run_may_say_again_that_queries_and_keys_have_norms():
    from nemo_minitron.nemo import restore

    normed = update_shape(CONFIG, SHAPE.replace(family="qwen3"))
    assert restore.merge_config(normed, {"qk_layernorm": True}, "m.nemo").qk_layernorm is True
    for config, value, message in ((normed, False, "must be true"), (CONFIG, True, "must be false")):
        with pytest.raises(MinitronError, match=rf"^model\.qk_layernorm {message}"):
            restore.merge_config(config, {"qk_layernorm": value}, "m.nemo")


def test_a_run_may_say_again_how_rope_is_scaled():
    from nemo_minitron.nemo import restore

    linear = update_shape(CONFIG, SHAPE.replace(rope_scaling=LinearScaling(4.0)))
    for config, value in ((CONFIG, 1), (CONFIG, 1.0), (linear, 4)):
        found = restore.merge_config(config, {"seq_len_interpolation_factor": value}, "m.nemo")
        assert found.get("seq_len_interpolation_factor") == config.get("seq_len_interpolation_factor")
    for config, value in ((CONFIG, 4), (linear, 1)):
        with pytest.raises(MinitronError, match=rf"^model\.seq_len_interpolation_factor={value} disagrees"):
            restore.merge_config(config, {"seq_len_interpolation_factor": value}, "m.nemo")


@pytest.mark.parametrize(("key", "value"), [("window_size", [64, 0]), ("drop_layers", [0])])
def test_a_run_does_not_change_the_network(key, value):
    from nemo_minitron.nemo import restore

    with pytest.raises(MinitronError, match=rf"^model\.{key}( must be|=.* disagrees)"):
        restore.merge_config(CONFIG, {key: value}, "m.nemo")


def test_our_own_config_is_known_whole(capsys):
    assert shape_from_nemo(CONFIG, SHAPE.padded_vocab_size, where="own") == SHAPE
    shape_from_nemo(CONFIG | {"rope_flavour": "x"}, SHAPE.padded_vocab_size, where="other")
    assert capsys.readouterr().err == "minitron: other: unknown and not used: 'rope_flavour'\n"


def test_every_key_that_a_run_may_set_is_known():
    """A trained .nemo has the run's keys in its config."""
    begins = known.NEMO.neutral_beginnings
    assert [key for key in MODEL if key not in known.NEMO and not key.startswith(begins)] == []


@pytest.mark.parametrize("table", [known.HF, known.GGUF, known.NEMO])
def test_a_name_has_one_meaning(table):
    assert not table.applied & table.neutral and not (table.applied | table.neutral) & table.only.keys()
    assert table.absent.keys() <= table.only.keys()


def write(path, shape, more=None):
    """A .nemo, and whatever else ``more`` adds to its weights."""
    model = random_model(shape)
    with NemoWriter(path, CONFIG, shape, torch.float32) as writer:
        for parameter, layer in each_tensor(shape):
            writer.write(parameter, model.tensor(parameter, layer), layer)
        if more:
            more(writer._weights, model.tensor(EMBEDDING).float())
    return path


def head(change):
    return lambda weights, table: weights.add("model.output_layer.weight", change(table), (320, 64), (0, 0))


def norms(weights, table):
    for layer in range(2):
        weights.add("model.decoder.layers.self_attention.q_layernorm.weight", table[:1, :8], (2, 8), (layer, 0))


def test_tensors_without_a_place_are_refused(tmp_path):
    with pytest.raises(
        MinitronError, match=r"'model\.decoder\.layers\.self_attention\.q_layernorm\.weight' has no place"
    ):
        NemoReader(write(tmp_path / "a.nemo", SHAPE, norms))
    with pytest.raises(MinitronError, match=r"'lora\.weight' has no place in this architecture, which has"):
        NemoReader(write(tmp_path / "b.nemo", SHAPE, lambda w, t: w.add("lora.weight", t, (320, 64), (0, 0))))
    twice = "model.module.decoder.final_layernorm.weight"
    with pytest.raises(MinitronError, match=r"final_layernorm.weight' must be there once"):
        NemoReader(write(tmp_path / "c.nemo", SHAPE, lambda w, t: w.add(twice, t[0], (64,), (0,))))


def test_neutral_tensors_are_passed_over(tmp_path):
    def state(weights, table):
        weights.add("model.decoder.layers.mlp.linear_fc1._extra_state", table[:2, 0], (2,), (0,))
        weights.add("model.rotary_pos_emb.inv_freq", table[0, :4], (4,), (0,))
        weights.add("optimizer.state.exp_avg.model.x", table[0], (64,), (0,))

    with NemoReader(write(tmp_path / "m.nemo", SHAPE, state)) as reader:
        assert reader.shape == SHAPE


def test_a_head_beside_a_tied_table(tmp_path):
    with NemoReader(write(tmp_path / "same.nemo", TIED, head(lambda table: table))) as reader:
        assert reader.shape == TIED
    for name, change in (("other", lambda table: table + 0.1), ("dtype", lambda table: table.bfloat16())):
        with pytest.raises(MinitronError, match=r"output_layer.weight' differs .* share_embeddings_and_output_weights"):
            NemoReader(write(tmp_path / f"{name}.nemo", TIED, head(change)))


@pytest.mark.parametrize("name", FAMILIES.names())
def test_every_key_that_transformers_saves_is_known(name, capsys):
    """A key of a family's own config class is applied, neutral or refused by its value; none is a stranger."""
    family = FAMILIES.get(name)
    kind = getattr(transformers, family.architecture.replace("ForCausalLM", "Config"))
    config = {**kind().to_dict(), "architectures": [family.architecture]}
    assert shape_from_hf(config).family == family.layers
    assert "unknown" not in capsys.readouterr().err
