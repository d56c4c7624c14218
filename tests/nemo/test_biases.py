"""Llamas whose linear layers have a bias: in NeMo, trained on grids, and through the whole journey."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.convert import convert
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.importance.scores import Scores
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.synthetic import make_llama
from tests.nemo.conftest import hf_logits, nemo_logits
from tests.nemo.test_grids import DISTILL, _assert_step_equals, _dense_step

TEACHER = ModelShape(3, 48, 90, 6, 2, 16, 250, 250, True, 500000.0, None, 256)
STUDENT = ModelShape(2, 32, 64, 8, 4, 16, 250, 250, False, 10000.0, None, 256)
KINDS = {
    "all": {"qkv_bias": True, "proj_bias": True, "mlp_bias": True},
    "attention": {"qkv_bias": True, "proj_bias": True},
    "mlp": {"mlp_bias": True},
}
SLOW = pytest.mark.slow
GRIDS = [
    pytest.param("all", (1, 1, False), 1, marks=SLOW),
    pytest.param("all", (2, 1, False), 2, marks=SLOW),
    ("all", (2, 1, True), 2),
    pytest.param("all", (1, 2, False), 2, marks=SLOW),
    pytest.param("all", (2, 2, True), 4, marks=SLOW),
    pytest.param("attention", (2, 1, True), 2, marks=SLOW),
    pytest.param("attention", (1, 2, False), 2, marks=SLOW),
    ("mlp", (2, 1, True), 2),
]


@pytest.fixture(scope="module")
def family(tmp_path_factory, request):
    """Folder of each kind with teacher and student as HF folders and ``.nemo`` files, with their shapes."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            shapes = [shape.replace(**KINDS[kind]) for shape in (TEACHER, STUDENT)]
            for role, shape in zip(("teacher", "student"), shapes, strict=True):
                convert(make_llama(folder / role, shape, seed=len(role)), folder / f"{role}.nemo")
            made[kind] = (folder, *shapes)
        return made[kind]

    return of


@pytest.mark.parametrize(("kind", "grid", "world"), GRIDS)
def test_distillation_gradients_equal_dense_float64(zygote, family, kind, grid, world):
    """Under sequence parallelism a bias that writes to the stream has a part of its gradient on every rank."""
    made = family(kind)
    _assert_step_equals(zygote, made, _dense_step(made), grid, world, DISTILL)


def nemos_own(nemo, trainer, monkeypatch, spec):
    """NeMo's class by its own ``restore_from``, strict; two things replaced as in ``test_model.py``."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model

    from nemo_minitron.nemo.anywhere import _name_what_apex_would
    from nemo_minitron.nemo.restore import job_config
    from nemo_minitron.nemo.spec import RMSNorm

    def local_specs(name, config, *_):
        return TransformerBlockSubmodules(layer_specs=[spec] * config.num_layers, layer_norm=RMSNorm)

    _name_what_apex_would()
    theirs = megatron_gpt_model.MegatronGPTModel
    monkeypatch.setattr(megatron_gpt_model, "get_specs", local_specs)
    monkeypatch.setattr(theirs, "setup_transformer_engine_cp_groups", lambda self: None)
    with NemoReader(nemo) as reader:
        cfg, _ = job_config(reader, {})
    return theirs.restore_from(str(nemo), trainer=trainer, override_config_path=cfg)


TOKENS = torch.arange(96)[None] * 7 % 250


def test_nemos_own_restore_reads_one_with_all_biases(family, trainer, monkeypatch):
    from nemo_minitron.nemo.spec import layer_spec

    folder = family("all")[0]
    model = nemos_own(folder / "teacher.nemo", trainer, monkeypatch, layer_spec(False))
    logits = nemo_logits(model, TOKENS)[..., :250]
    torch.testing.assert_close(logits, hf_logits(folder / "teacher", TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_nemos_own_restore_stops_at_one_with_some(family, trainer, monkeypatch, kind):
    """NeMo has one switch for all linear layers: the biases that are not there are missed, not taken for zero."""
    from nemo_minitron.nemo.spec import layer_spec

    with pytest.raises(CheckpointException, match=r"linear_\w+\.bias from model not in state dict"):
        nemos_own(family(kind)[0] / "teacher.nemo", trainer, monkeypatch, layer_spec(False))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(family, trainer, kind):
    from nemo_minitron.nemo.restore import load_model

    folder, shape, _ = family(kind)
    model = load_model(folder / "teacher.nemo", trainer)
    expected = hf_logits(folder / "teacher", TOKENS)
    torch.testing.assert_close(nemo_logits(model, TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters(padded=True)


@SLOW
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_journey(family, zygote, trainer, tmp_path, kind):
    """Convert, score, prune with and without re-solve, distil, evaluate, export: equal logits at the end."""
    from nemo_minitron.nemo.restore import load_model

    folder, _, _ = family(kind)
    teacher, out = folder / "teacher.nemo", tmp_path
    preprocess("pydoc_topics", out / "data", tokenizer_type=str(folder / "teacher"))
    data = f"{out}/data_text_document"
    source = f"model.restore_from_path={teacher}"
    calibration = [f"calibration.data_prefix={data}", "calibration.num_samples=16", "calibration.seq_length=32"]
    calibration += ["importance.metrics=[taylor]"]
    sizes = ["prune.hidden_size=32", "prune.ffn_hidden_size=64", "prune.num_layers=2", "prune.num_attention_heads=4"]
    files = f"prune.scores={out}/scores"
    measured = [f"evaluate.data_prefix={data}", "evaluate.seq_length=32", "evaluate.num_samples=8"]
    distill = [
        f"model.restore_from_path={out}/student.nemo",
        f"model.kd_teacher_restore_from_path={teacher}",
        f"model.nemo_path={out}/distilled.nemo",
        f"model.data.data_prefix={{train:[1.0,{data}],validation:[{data}]}}",
        "model.data.seq_length=32",
        "trainer.max_steps=4",
        "trainer.val_check_interval=4",
        "trainer.limit_val_batches=1",
        "model.micro_batch_size=2",
        "model.global_batch_size=4",
        "model.optim.lr=1e-2",
        f"exp_manager.explicit_log_dir={out}/log",
    ]
    lines = [
        ["importance", source, *calibration, f"output_path={out}/scores"],
        ["importance", source, *calibration[:-1], "importance.stream=true", f"output_path={out}/streamed"],
        ["prune", source, *sizes, files, f"export.save_path={out}/cut.nemo", "prune.compensate=false"],
        ["prune", source, *sizes, files, f"export.save_path={out}/student.nemo", "prune.layer_selection=greedy"],
        ["distill", *distill],
        ["evaluate", f"model.restore_from_path={out}/distilled.nemo", *measured, f"output_path={out}/out.json"],
        ["convert", f"input_name_or_path={out}/distilled.nemo", f"output_path={out}/hf", "verify=true"],
    ]
    for line in lines:
        assert zygote.run("tests.nemo.extending_jobs:commands", 1, line) == [[0]], line
    watched, streamed = (Scores.load(out / name).published for name in ("scores", "streamed"))
    for axis, worth in watched.items():
        np.testing.assert_allclose(streamed[axis], worth, rtol=1e-4, err_msg=axis)
    with NemoReader(out / "distilled.nemo") as reader, NemoReader(out / "cut.nemo") as cut:
        assert reader.shape.replace(num_layers=2) == cut.shape
        assert reader.fingerprint() != cut.fingerprint()
        shape = reader.shape
    assert {name: getattr(shape, name) for name in KINDS[kind]} == KINDS[kind]
    model = load_model(out / "distilled.nemo", trainer)
    torch.testing.assert_close(nemo_logits(model, TOKENS), hf_logits(out / "hf", TOKENS), rtol=1e-4, atol=2e-4)


@SLOW
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_student_are_the_same_on_a_grid(family, zygote, tmp_path, kind):
    """TP 2 with sequence parallelism x PP 2 against one process, re-solved weights bit by bit."""
    folder, _, _ = family(kind)
    source, data = str(folder / "teacher.nemo"), f"{tmp_path}/data"
    preprocess("pydoc_topics", data, tokenizer_type=str(folder / "teacher"))
    sizes = ["hidden_size=32", "ffn_hidden_size=64", "num_attention_heads=4", "num_layers=2"]
    for name, grid, world in (("one", (1, 1, False), 1), ("four", (2, 2, True), 4)):
        (tmp_path / name).mkdir()
        step = (source, f"{data}_text_document", str(tmp_path / name), grid, sizes)
        zygote.run("tests.nemo.grid_jobs:scores_and_student", world, *step)
    one, four = (Scores.load(tmp_path / name / "scores").published for name in ("one", "four"))
    for axis, worth in one.items():
        np.testing.assert_allclose(four[axis], worth, rtol=1e-5, err_msg=axis)
    with NemoReader(tmp_path / "one" / "student.nemo") as a, NemoReader(tmp_path / "four" / "student.nemo") as b:
        assert a.shape == b.shape and a.fingerprint() == b.fingerprint()
