"""Our model in NeMo against transformers, and our files against NeMo's own reader and writer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from nemo_minitron.checkpoint import NemoReader, NemoWriter, update_shape
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.model import layout
from nemo_minitron.prune.choose import make_plan
from nemo_minitron.prune.cut import prune_checkpoint
from tests.nemo.conftest import hf_logits, nemo_logits


def _tokens(shape, length=96):
    return torch.randint(0, shape.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


def test_logits_equal_transformers(pair, trainer):
    from nemo_minitron.nemo.restore import load_model

    hf, nemo, shape = pair
    tokens = _tokens(shape)
    model = load_model(nemo, trainer)
    torch.testing.assert_close(nemo_logits(model, tokens), hf_logits(hf, tokens), rtol=1e-4, atol=1e-4)


def test_bfloat16_logits_are_near(pair, trainer):
    from nemo_minitron.nemo.restore import load_model
    from nemo_minitron.nemo.trainer import autocast

    hf, nemo, shape = pair
    tokens = _tokens(shape)
    model = load_model(nemo, trainer)
    with autocast("bf16"):
        ours = nemo_logits(model, tokens).float()
    expected = hf_logits(hf, tokens)
    assert ours.dtype == torch.float32
    assert (ours - expected).norm() / expected.norm() < 0.03


def test_nemos_own_restore_reads_our_file(pair, trainer, monkeypatch):
    """NeMo's class, unpacking and Megatron's distributed loading, strict: nothing missing or unexpected.

    Of the class two things are replaced, which need libraries that are not here: the table of layer specs, all of
    which are built at once, and CUDA streams for context parallelism.
    """
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model

    from nemo_minitron.nemo.restore import job_config
    from nemo_minitron.nemo.spec import RMSNorm, layer_spec

    def local_specs(name, config, *_):
        return TransformerBlockSubmodules(
            layer_specs=[layer_spec(False, config.qk_layernorm)] * config.num_layers, layer_norm=RMSNorm
        )

    hf, nemo, shape = pair
    theirs = megatron_gpt_model.MegatronGPTModel
    monkeypatch.setattr(megatron_gpt_model, "get_specs", local_specs)
    monkeypatch.setattr(theirs, "setup_transformer_engine_cp_groups", lambda self: None)
    with NemoReader(nemo) as reader:
        cfg, _ = job_config(reader, {"dist_ckpt_load_strictness": "raise_all"})
    model = theirs.restore_from(str(nemo), trainer=trainer, override_config_path=cfg)
    assert type(model) is theirs
    tokens = _tokens(shape)
    logits = nemo_logits(model, tokens)[..., : shape.vocab_size]
    torch.testing.assert_close(logits, hf_logits(hf, tokens), rtol=1e-4, atol=1e-4)


def test_we_read_what_nemo_saves(pair, trainer, tmp_path):
    from nemo_minitron.nemo.restore import load_model

    _, nemo, shape = pair
    model = load_model(nemo, trainer)
    saved = tmp_path / "saved" / "by_nemo.nemo"
    saved.parent.mkdir()
    model.save_to(str(saved))
    with NemoReader(saved) as theirs, NemoReader(nemo) as ours:
        assert theirs.shape == ours.shape
        for parameter in layout.parameters(shape):
            for layer in range(shape.num_layers) if parameter.per_layer else [None]:
                assert torch.equal(theirs.tensor(parameter, layer), ours.tensor(parameter, layer)), parameter.key
        assert theirs.fingerprint() == ours.fingerprint()


def test_save_gives_the_same_file_content(pair, trainer, tmp_path):
    from nemo_minitron.nemo import weights
    from nemo_minitron.nemo.restore import load_model

    _, nemo, _ = pair
    model = load_model(nemo, trainer)
    weights.save(model, tmp_path / "again.nemo", torch.float32)
    with NemoReader(nemo) as before, NemoReader(tmp_path / "again.nemo") as after:
        assert after.shape == before.shape and after.fingerprint() == before.fingerprint()
        assert after.config["minitron"] == before.config["minitron"]


def test_pruned_model_agrees_between_nemo_and_hf(pair, trainer, tmp_path):
    from nemo_minitron.nemo.restore import load_model

    _, nemo, shape = pair
    target = {"hidden_size": 32 if shape.hidden_size > 32 else 16, "ffn_hidden_size": 32, "num_layers": 2}
    if shape.num_query_groups > 2:
        target["num_query_groups"] = 2
    generator = torch.Generator().manual_seed(0)
    draw = {
        "ffn": (shape.num_layers, shape.ffn_hidden_size),
        "heads": (shape.num_layers, shape.num_attention_heads),
        "groups": (shape.num_layers, shape.num_query_groups),
        "hidden": (shape.hidden_size,),
        "block_influence": (shape.num_layers,),
    }
    scores = SimpleNamespace(**{name: torch.rand(size, generator=generator).numpy() for name, size in draw.items()})
    student = tmp_path / "student.nemo"
    with NemoReader(nemo) as reader:
        plan = make_plan(reader.shape, scores, target, source_fingerprint=reader.fingerprint())
        config = update_shape(reader.config, plan.target)
        with NemoWriter(student, config, plan.target, reader.dtype, tokenizer=reader.tokenizer_folder()) as writer:
            prune_checkpoint(reader, plan, writer)
    convert(student, tmp_path / "student_hf")
    tokens = _tokens(shape)
    model = load_model(student, trainer)
    assert model.shape.hidden_size == target["hidden_size"]
    torch.testing.assert_close(
        nemo_logits(model, tokens), hf_logits(tmp_path / "student_hf", tokens), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "run,words",
    [
        ({"num_layers": 8}, ["model.num_layers=8", "checkpoint"]),
        ({"hidden_size": 4096}, ["model.hidden_size=4096"]),
        ({"encoder_seq_length": 64, "data": {"seq_length": 32}}, ["encoder_seq_length=64", "seq_length=32"]),
        ({"data": {"seq_length": 10**6}}, ["model.data.seq_length=1000000", "max_position_embeddings"]),
        ({"tensor_model_parallel_size": 3}, ["tensor_model_parallel_size (3)", "num_query_groups"]),
        ({"pipeline_model_parallel_size": 5}, ["pipeline_model_parallel_size (5)", "num_layers"]),
        ({"context_parallel_size": 2}, ["context_parallel_size=2"]),
        ({"virtual_pipeline_model_parallel_size": 2}, ["virtual_pipeline_model_parallel_size=2"]),
        (
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, "encoder_seq_length": 33},
            ["(33)", "tensor_model_parallel_size (2)", "sequence_parallel"],
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 3},
            ["num_layers_in_first_pipeline_stage=3", "pipeline_model_parallel_size=2"],
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(pair, trainer, run, words):
    from nemo_minitron.nemo.restore import load_model

    _, nemo, shape = pair
    if "tensor_model_parallel_size" in run and shape.num_query_groups % 3 == 0:
        pytest.skip("this shape splits over 3")
    with pytest.raises(MinitronError) as error:
        load_model(nemo, trainer, OmegaConf.create(run))
    for word in words:
        assert word in str(error.value)


def test_restating_the_architecture_is_allowed(pair, trainer):
    from nemo_minitron.nemo.restore import load_model

    _, nemo, shape = pair
    model = load_model(nemo, trainer, {"num_layers": shape.num_layers, "normalization": "RMSNorm", "bias": False})
    assert model.cfg.num_layers == shape.num_layers


def test_tokens_of_another_vocabulary_are_refused(pair, trainer, tmp_path):
    from nemo_minitron.data.preprocess import preprocess
    from nemo_minitron.nemo.restore import load_model
    from nemo_minitron.nemo.training import check_tokens
    from nemo_minitron.synthetic import make_llama

    hf, nemo, shape = pair
    model = load_model(nemo, trainer)
    (own,) = preprocess("pydoc_topics", tmp_path / "own", tokenizer_type=str(hf))
    check_tokens(model, [str(own)], "model.data.data_prefix")
    other = make_llama(tmp_path / "other", shape, tokenizer_texts=["entirely different words", "zebra quartz"] * 50)
    (foreign,) = preprocess("pydoc_topics", tmp_path / "foreign", tokenizer_type=str(other))
    with pytest.raises(MinitronError, match=r"model\.data\.data_prefix: .*foreign.*another vocabulary"):
        check_tokens(model, [str(own), str(foreign)], "model.data.data_prefix")
