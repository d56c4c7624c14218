"""``minitron prune`` and ``minitron importance`` on files: the student against plain slicing of HF weights."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from nemo_minitron.checkpoint import NemoReader, each_tensor
from nemo_minitron.cli import main
from nemo_minitron.convert import convert
from nemo_minitron.data.blocks import counted_blocks, token_blocks
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.data.tokens import data_fingerprint, open_tokens
from nemo_minitron.importance.scores import Scores
from nemo_minitron.importance.scores_format import AXES, statistic_sizes
from nemo_minitron.prune.choose import make_plan
from nemo_minitron.prune.plan import Compensation, Plan
from nemo_minitron.synthetic import make_llama
from tests.canonical import Memory
from tests.data.test_blocks import add_mask
from tests.importance.made import made
from tests.importance.reference import dense_scores
from tests.importance.test_reconstruction import passed
from tests.llamas import GQA

TEXTS = [
    f"Sentence {i} says that {i * i} is the square of {i}, which is {'even' if i % 2 == 0 else 'odd'}."
    for i in range(400)
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """HF folder, its ``.nemo``, and calibration tokens."""
    folder = tmp_path_factory.mktemp("teacher")
    make_llama(folder / "hf", GQA, tokenizer_texts=TEXTS)
    convert(folder / "hf", folder / "teacher.nemo")
    (folder / "text.txt").write_text("\n".join(TEXTS))
    preprocess(folder / "text.txt", folder / "tokens", tokenizer_type=str(folder / "hf"))
    return folder


@pytest.fixture(scope="module")
def scores(teacher):
    """Random scores of the teacher, so that nothing is kept for its position."""
    rng = np.random.default_rng(0)
    with NemoReader(teacher / "teacher.nemo") as reader:
        found = made(reader.shape, rng.random, source_fingerprint=reader.fingerprint())
    (teacher / "scores").mkdir()
    found.write(teacher / "scores")
    return found


@pytest.fixture
def prune(teacher, tmp_path, capsys):
    """Run the command; returns (exit status, what it printed)."""

    def call(*keys, save=True):
        given = [f"export.save_path={tmp_path}/out/student.nemo"] if save else []
        status = main(["prune", f"model.restore_from_path={teacher}/teacher.nemo", *given, *keys])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


def best(worth, count):
    return np.sort(np.argsort(-worth)[:count])


def test_width_is_plain_slicing_of_hf_weights(teacher, scores, prune, tmp_path):
    status, said = prune(
        f"prune.scores={teacher}/scores",
        "prune.hidden_size=40",
        "prune.ffn_hidden_size=50",
        "prune.num_query_groups=2",
        "prune.num_attention_heads=2",
        "prune.drop_layers=[2]",
    )
    assert status == 0 and "62.5%" in said and "layers removed (counted from 1): 2" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["student.nemo", "student.plan.yaml"]
    convert(tmp_path / "out" / "student.nemo", tmp_path / "hf")
    before, after = load_file(teacher / "hf" / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    worth = scores.published
    hidden = best(worth["hidden"], 40)
    for new, old in enumerate((0, 2)):
        groups = best(worth["groups"][old], 2)
        heads = [2 * g + int(worth["heads"][old, 2 * g + 1] > worth["heads"][old, 2 * g]) for g in groups]
        neurons = best(worth["ffn"][old], 50)
        rows = {
            name: np.concatenate([np.arange(8) + 8 * u for u in units]) for name, units in (("q", heads), ("k", groups))
        }
        expected = {
            "self_attn.q_proj": (rows["q"], hidden),
            "self_attn.k_proj": (rows["k"], hidden),
            "self_attn.v_proj": (rows["k"], hidden),
            "self_attn.o_proj": (hidden, rows["q"]),
            "mlp.gate_proj": (neurons, hidden),
            "mlp.up_proj": (neurons, hidden),
            "mlp.down_proj": (hidden, neurons),
        }
        for name, (kept_rows, kept_columns) in expected.items():
            source = before[f"model.layers.{old}.{name}.weight"].numpy()
            assert np.array_equal(
                after[f"model.layers.{new}.{name}.weight"].numpy(), source[np.ix_(kept_rows, kept_columns)]
            )
        for name in ("input_layernorm", "post_attention_layernorm"):
            assert torch.equal(
                after[f"model.layers.{new}.{name}.weight"], before[f"model.layers.{old}.{name}.weight"][hidden]
            )
    for name in ("model.embed_tokens", "lm_head"):
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"][:, hidden])
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (model.config.head_dim, model.config.num_key_value_heads, model.config.num_hidden_layers) == (8, 2, 2)
    assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_named_layers_need_no_scores(teacher, prune, tmp_path):
    status, _ = prune("prune.drop_layers=[3]")
    assert status == 0
    assert Plan.load(tmp_path / "out" / "student.plan.yaml").layers == (0, 1)


def test_calibration_data_that_nothing_reads_are_told_of(teacher, scores, prune):
    data = f"prune.calib_dataset={teacher}/text.txt"
    status, said = prune("prune.drop_layers=[3]", data)
    assert status == 0 and "prune.calib_dataset is not read: named layers are removed without scores" in said
    status, said = prune("prune.ffn_hidden_size=50", f"prune.scores={teacher}/scores", data)
    assert status == 0 and "prune.calib_dataset is not read: prune.scores were computed already" in said


def test_plan_and_student_are_deterministic(teacher, scores, prune, tmp_path):
    outputs = []
    for _ in range(2):
        assert prune(f"prune.scores={teacher}/scores", "prune.ffn_hidden_size=50")[0] == 0
        outputs.append([(tmp_path / "out" / f"student.{end}").read_bytes() for end in ("nemo", "plan.yaml")])
    assert outputs[0] == outputs[1]


def test_a_plan_file_is_applied_as_it_is(teacher, scores, prune, tmp_path):
    assert prune(f"prune.scores={teacher}/scores", "prune.ffn_hidden_size=50")[0] == 0
    first = (tmp_path / "out" / "student.nemo").read_bytes()
    shutil.copy(tmp_path / "out" / "student.plan.yaml", tmp_path / "kept.yaml")
    (tmp_path / "out" / "student.nemo").unlink()
    assert prune(f"prune.plan={tmp_path}/kept.yaml", f"export.plan_path={tmp_path}/again.yaml")[0] == 0
    assert (tmp_path / "out" / "student.nemo").read_bytes() == first
    assert (tmp_path / "again.yaml").read_bytes() == (tmp_path / "kept.yaml").read_bytes()


def test_identity_plan_is_bit_identical(teacher, prune, tmp_path):
    with NemoReader(teacher / "teacher.nemo") as reader:
        Plan.identity(reader.shape, reader.fingerprint()).save(tmp_path / "identity.yaml")
    assert prune(f"prune.plan={tmp_path}/identity.yaml")[0] == 0
    with NemoReader(teacher / "teacher.nemo") as one, NemoReader(tmp_path / "out" / "student.nemo") as other:
        assert one.shape == other.shape and one.dtype == other.dtype
        for parameter, layer in each_tensor(one.shape):
            assert torch.equal(one.tensor(parameter, layer), other.tensor(parameter, layer))


BAD = {
    "nothing requested": ([], "nothing requested"),
    "larger than the source": (["prune.hidden_size=65"], "prune.hidden_size: 65 asked, 64 available"),
    "layer out of range": (["prune.drop_layers=[4]"], "layer 4 asked, available are 1 to 3"),
    "uneven heads": (["prune.num_attention_heads=6"], "must be a multiple of the query groups kept (4)"),
    "does not split over TP": (
        ["prune.num_query_groups=3", "model.tensor_model_parallel_size=2"],
        "model.tensor_model_parallel_size (2) must divide num_query_groups (3)",
    ),
    "does not split over PP": (
        ["prune.drop_layers=[1]", "model.pipeline_model_parallel_size=3"],
        "model.pipeline_model_parallel_size (3) must be at most num_layers (2)",
    ),
    "no scores": (["prune.hidden_size=40"], "prune.calib_dataset"),
    "missing scores": (
        ["prune.hidden_size=40", "prune.scores=/nowhere"],
        "prune.scores: expected a scores folder, found nothing at /nowhere",
    ),
    "missing data": (["prune.hidden_size=40", "prune.calib_dataset=/nowhere"], "neither '/nowhere.idx' nor"),
    "missing plan": (["prune.plan=/nowhere"], "prune.plan: expected a plan file, found nothing at /nowhere"),
    "unknown ranking": (["prune.ffn_hidden_size=9", "prune.ranking=magic"], "prune.ranking"),
    "missing checkpoint": (["prune.drop_layers=[1]", "model.restore_from_path=/nowhere.nemo"], "/nowhere.nemo"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_leave_the_destination_untouched(prune, tmp_path, case):
    keys, message = BAD[case]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "student.nemo").write_text("an earlier student")
    status, said = prune(*keys)
    assert status == 2 and message in said
    assert "Traceback" not in said
    assert [(p.name, p.read_text()) for p in (tmp_path / "out").iterdir()] == [("student.nemo", "an earlier student")]


def test_scores_and_plans_of_other_weights_are_refused(teacher, scores, prune, tmp_path):
    make_llama(tmp_path / "hf", GQA, seed=1, tokenizer_texts=TEXTS)
    convert(tmp_path / "hf", tmp_path / "other.nemo")
    other = f"model.restore_from_path={tmp_path}/other.nemo"
    status, said = prune(other, f"prune.scores={teacher}/scores", "prune.ffn_hidden_size=50")
    assert status == 2 and "prune.scores: measured on weights" in said
    Plan.identity(scores.shape, scores.source_fingerprint).save(tmp_path / "p.yaml")
    status, said = prune(other, f"prune.plan={tmp_path}/p.yaml")
    assert status == 2 and "prune.plan: made for weights" in said
    status, said = prune(f"prune.plan={tmp_path}/p.yaml", "prune.ffn_hidden_size=50")
    assert status == 2 and "leave out prune.ffn_hidden_size" in said
    assert not (tmp_path / "out").exists()


def test_unwritable_outputs(teacher, prune, tmp_path):
    (tmp_path / "file").write_text("x")
    status, said = prune("prune.drop_layers=[1]", f"export.save_path={tmp_path}/file/student.nemo", save=False)
    assert status == 2 and "file" in said
    status, said = prune("prune.drop_layers=[1]", f"export.plan_path={tmp_path}/file/plan.yaml")
    assert status == 2
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    status, said = prune("prune.drop_layers=[1]", f"export.save_path={teacher}/teacher.nemo", save=False)
    assert status == 2 and "choose another name" in said


def test_a_shape_that_nobody_would_serve_is_said_before_anything_is_written(prune, tmp_path):
    status, said = prune("prune.drop_layers=[1]", "prune.serving.tensor_parallel=3")
    assert status == 2 and "prune.serving: the student would be refused: num_attention_heads 8 does not divide" in said
    assert not (tmp_path / "out").exists()
    status, said = prune("prune.drop_layers=[1]", "prune.serving.tensor_parallel=2")
    assert status == 0 and "student: " not in said.partition("before")[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "expected one of calibration.data_prefix and calibration.path"),
        (["calibration.data_prefix=/nowhere"], "/nowhere"),
        (["calibration.path=/nowhere.txt"], "calibration.path: no file or folder"),
        (["calibration.data_prefix=DATA", "calibration.num_samples=100000"], "100000"),
        (["calibration.data_prefix=DATA", "calibration.seq_length=4096"], "4096 asked, the model has 128 positions"),
        (["calibration.data_prefix=DATA", "calibration.num_samples=0"], "calibration.num_samples"),
        (
            ["calibration.data_prefix=DATA", "calibration.num_samples=4", "calibration.micro_batch_size=0"],
            "micro_batch_size",
        ),
    ],
)
def test_bad_calibration_is_refused_before_the_model_is_built(teacher, tmp_path, capsys, keys, message):
    keys = [key.replace("DATA", f"{teacher}/tokens_text_document") for key in keys]
    (tmp_path / "keep").write_text("x")
    command = ["importance", f"model.restore_from_path={teacher}/teacher.nemo", f"output_path={tmp_path}/scores"]
    assert main([*command, "calibration.seq_length=16", *keys]) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]


def test_importance_does_not_replace_a_foreign_folder(teacher, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    command = ["importance", f"model.restore_from_path={teacher}/teacher.nemo", f"output_path={tmp_path}"]
    assert main([*command, f"calibration.data_prefix={teacher}/tokens_text_document"]) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_prune_computes_the_published_metric_in_nemo(teacher, tmp_path):
    """The whole command in its own process: NeMo builds the model, the scores equal the dense definitions."""
    prefix = teacher / "tokens_text_document"
    keys = [
        f"model.restore_from_path={teacher}/teacher.nemo",
        f"export.save_path={tmp_path}/student.nemo",
        "prune.ffn_hidden_size=50",
        "prune.num_layers=2",
        "prune.ranking=minitron",
        f"prune.calib_dataset={prefix}",
        "prune.num_calib_size=6",
        "prune.calib_seq_length=32",
        "seed=7",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "nemo_minitron", "prune", *keys], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    scores, plan = Scores.load(tmp_path / "student.scores"), Plan.load(tmp_path / "student.plan.yaml")
    with NemoReader(teacher / "teacher.nemo") as reader:
        tensors = {(p.key, layer): reader.tensor(p, layer).double() for p, layer in each_tensor(reader.shape)}
        model = Memory(reader.shape, tensors)
        scores.check_matches(reader.fingerprint(), reader.shape)
    expected = dense_scores(model, token_blocks(prefix, 32, num_samples=6, seed=7)[:, :-1], None)
    for name, array in expected.items():
        found = scores.published[name] if name in AXES else getattr(scores, name)
        np.testing.assert_allclose(found, array, rtol=1e-4, atol=1e-6, err_msg=name)
    assert scores.data_fingerprint == data_fingerprint(prefix)
    assert json.loads((tmp_path / "student.scores" / "scores.json").read_text())["calibration"]["tokens"] == 192
    assert plan.layers == tuple(best(expected["block_influence"], 2))
    assert plan.ffn[0] == tuple(best(expected["ffn"][plan.layers[0]], 50))


@pytest.fixture(scope="module")
def chats(teacher, tmp_path_factory):
    """The same tokens, of which some stretches count, and none for a while."""
    folder = tmp_path_factory.mktemp("chats")
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{teacher}/tokens_text_document{suffix}", folder / f"tokens_text_document{suffix}")
    prefix = folder / "tokens_text_document"
    stream = open_tokens(prefix)
    place = np.arange(len(stream.tokens))
    mask = ((place // 5 % 3 == 1) | (place % 97 == 0)) & (place // 200 % 2 == 0)
    add_mask(prefix, mask.astype(np.uint8), np.diff(stream.ends, prepend=0))
    return str(prefix)


@pytest.mark.parametrize("stream", [False, True], ids=["built", "streamed"])
def test_importance_counts_what_the_mask_says(teacher, chats, stream, prune, tmp_path, capsys):
    """Statistics and sensitivities against dense float64, beside the model's own text, all of which counts."""
    drawn = counted_blocks(chats, 32, num_samples=12, seed=1234, vocab_size=GQA.vocab_size)
    assert not drawn.counted.any(1).all() or drawn.counted.sum() < drawn.counted.numel() / 2
    keys = [f"model.restore_from_path={teacher}/teacher.nemo", f"calibration.data_prefix={chats}"]
    sizes = ["calibration.num_samples=12", "calibration.seq_length=32", "calibration.reconstruction_tokens=256"]
    sizes += ["calibration.own_samples=2", f"importance.stream={stream}"]
    assert main(["importance", *keys, *sizes, f"output_path={tmp_path}/scores"]) == 0
    said, count = capsys.readouterr(), int(drawn.counted.sum())
    assert f"importance: {count:,} tokens that count, of 384, in 12 samples" in said.out and "mask" not in said.err
    scores = Scores.load(tmp_path / "scores")
    with NemoReader(teacher / "teacher.nemo") as reader:
        tensors = {(p.key, layer): reader.tensor(p, layer).double() for p, layer in each_tensor(reader.shape)}
        expected = dense_scores(Memory(reader.shape, tensors), drawn.tokens, drawn.counted)
    for name, array in expected.items():
        found = scores.published[name] if name in AXES else getattr(scores, name)
        np.testing.assert_allclose(found, array, rtol=1e-4, atol=1e-6, err_msg=name)
    assert scores.calibration["tokens"] == count and scores.data_fingerprint == drawn.fingerprint
    assert np.array_equal(scores.tokens[:8], drawn.tokens[:8]) and scores.own_samples == 2
    assert np.array_equal(scores.counted, np.concatenate([drawn.counted[:8], np.ones((2, 32), bool)]))
    tokens, counted = torch.tensor(scores.tokens).long(), torch.tensor(scores.counted)
    _, gradients, _, _ = passed(teacher / "hf", scores.shape, tokens, counted)
    norms = torch.stack([gradient.norm(dim=-1) for gradient in gradients[1:]]).numpy()
    bounds = np.quantile(norms[:, scores.counted], 0.999, axis=1)[:, None, None]
    np.testing.assert_allclose(scores.sensitivity, np.minimum(norms, bounds), rtol=2e-3, atol=1e-6)
    status, said = prune(f"prune.scores={tmp_path}/scores", "prune.ffn_hidden_size=50", "prune.hidden_size=48")
    assert status == 0, said
    (held,) = {int(counted[7, :-1].sum())}
    assert {kind: found.tokens for kind, found in Plan.load(tmp_path / "out/student.plan.yaml").measured.items()} == {
        "calibration": held,
        "own": 31,
    }


@pytest.fixture(scope="module")
def measured(teacher):
    """Scores with ranks and tokens, from ``minitron importance``."""
    keys = [
        f"model.restore_from_path={teacher}/teacher.nemo",
        f"calibration.data_prefix={teacher}/tokens_text_document",
    ]
    sizes = ["calibration.num_samples=12", "calibration.seq_length=32", "calibration.reconstruction_tokens=256"]
    sizes += ["calibration.own_samples=2"]
    assert main(["importance", *keys, *sizes, f"output_path={teacher}/measured"]) == 0
    return Scores.load(teacher / "measured")


def test_importance_keeps_tokens_and_ranks_for_compensation(measured):
    assert measured.tokens.shape == (10, 32) and measured.sensitivity.shape == (6, 10, 32)  # 256 of 12 * 32, and 2 own
    assert {name: tuple(ranking) for name, ranking in measured.rankings.items()} == {
        "minitron": AXES,
        "reconstruction": AXES,
    }
    assert measured.stream_moment.shape == (64, 64)


def test_weights_are_resolved_by_default_and_again_from_the_plan(teacher, measured, prune, tmp_path):
    sizes = ["prune.ffn_hidden_size=50", "prune.hidden_size=48", "prune.num_query_groups=2"]
    status, said = prune(f"prune.scores={teacher}/measured", *sizes)
    assert status == 0 and all(text in said for text in ("nats/token on text held back", "the model's own text"))
    plan = Plan.load(tmp_path / "out" / "student.plan.yaml")
    assert plan.measured.keys() == {"calibration", "own"} and measured.own_samples == 2
    ranks = measured.rankings["reconstruction"]
    assert plan.ranking == "reconstruction"
    assert plan.ffn[0] == tuple(best(ranks["ffn"][0], 50)) and plan.hidden == tuple(best(ranks["hidden"], 48))
    file, all_of_them = tmp_path / "all.yaml", Compensation(measured.tokens_fingerprint(), rotate=True, rescale=True)
    replace(plan, compensation=all_of_them, measured={}).save(file)  # a random teacher's losses would decide by chance
    status, said = prune(f"prune.plan={file}", f"prune.scores={teacher}/measured")
    assert status == 0 and "re-solved on the calibration tokens; none held back" in said
    assert (tmp_path / "out" / "student.plan.yaml").read_bytes() == file.read_bytes()
    student = (tmp_path / "out" / "student.nemo").read_bytes()
    convert(tmp_path / "out" / "student.nemo", tmp_path / "hf")
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model(torch.arange(9)[None]).logits.isfinite().all()

    file = tmp_path / "plan.yaml"
    shutil.copy(tmp_path / "out" / "student.plan.yaml", file)
    again = f"export.save_path={tmp_path}/again/student.nemo"
    status, said = prune(f"prune.plan={file}", f"prune.scores={teacher}/measured", again, save=False)
    assert status == 0, said
    assert (tmp_path / "again" / "student.nemo").read_bytes() == student
    for keys, message in (
        ([], "the plan re-solves weights on calibration tokens"),
        ([f"prune.scores={teacher}/measured", "prune.compensate=false"], "false asked, but the plan says"),
    ):
        status, said = prune(f"prune.plan={file}", *keys, again.replace("again", "never"), save=False)
        assert status == 2 and message in said and not (tmp_path / "never").exists()


def test_compensation_can_be_declined_and_needs_tokens(teacher, scores, measured, prune, tmp_path):
    status, said = prune(f"prune.scores={teacher}/measured", "prune.ffn_hidden_size=50", "prune.compensate=false")
    assert status == 0 and "kept weights cut" in said
    plan = Plan.load(tmp_path / "out" / "student.plan.yaml")
    assert plan.compensation is None and plan.ffn[0] == tuple(best(measured.published["ffn"][0], 50))
    status, said = prune(f"prune.scores={teacher}/scores", "prune.ffn_hidden_size=50", "prune.compensate=true")
    assert status == 2 and "hold no calibration tokens" in said
    status, said = prune(f"prune.scores={teacher}/scores", "prune.ffn_hidden_size=50", "prune.ranking=reconstruction")
    assert status == 2 and "no ranking 'reconstruction', they have minitron; run `minitron importance cal" in said


def test_units_are_ranked_by_a_further_metric(teacher, measured, prune, tmp_path, capsys):
    keys = [
        "importance",
        f"model.restore_from_path={teacher}/teacher.nemo",
        f"calibration.data_prefix={teacher}/tokens_text_document",
        *("calibration.num_samples=6", "calibration.seq_length=32", "importance.stream=true"),
        "trainer.precision=bf16",
        f"output_path={tmp_path}/taylor",
    ]
    assert main([*keys, "importance.metrics=[tailor]"]) == 2
    said = capsys.readouterr().err
    assert "importance.metrics: expected one of minitron, reconstruction, taylor, found 'tailor'. Did you mean" in said
    assert main([*keys, "importance.metrics=[taylor]", "calibration.reconstruction=false"]) == 0
    scores = Scores.load(tmp_path / "taylor")
    assert list(scores.rankings) == ["minitron", "taylor"] and scores.tokens is None and scores.stream_moment is None
    assert scores.calibration["precision"] == "32", "layers that are read one by one run in no other"
    sizes = ["prune.ffn_hidden_size=50", "prune.hidden_size=48", "prune.ranking=taylor"]
    status, said = prune(f"prune.scores={tmp_path}/taylor", *sizes)
    assert status == 0, said
    plan, worth = Plan.load(tmp_path / "out" / "student.plan.yaml"), scores.rankings["taylor"]
    assert plan.ranking == "taylor" and plan.compensation is None
    assert plan.ffn[2] == tuple(best(worth["ffn"][2], 50)) and plan.hidden == tuple(best(worth["hidden"], 48))
    status, said = prune(f"prune.scores={teacher}/measured", *sizes)
    assert status == 2 and "these scores have no ranking 'taylor', they have minitron, reconstruction; run" in said


@pytest.mark.parametrize("selection", ["leave_one_out", "contiguous_loss", "greedy", "beam"])
def test_layers_are_chosen_by_the_loss_without_them(teacher, measured, prune, tmp_path, selection):
    keys = ["prune.num_layers=1", f"prune.layer_selection={selection}", "prune.compensate=false"]
    status, said = prune(f"prune.scores={teacher}/measured", *keys, "prune.layer_tokens=1000000")  # all
    assert status == 0, said
    plan = Plan.load(tmp_path / "out" / "student.plan.yaml")
    convert(teacher / "teacher.nemo", tmp_path / "hf")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").float()
    tokens, layers = torch.tensor(measured.tokens).long(), list(model.model.layers)
    half = tokens.shape[1] // 2
    tokens = torch.cat([tokens, tokens[:, :half].repeat(1, 2)])
    labels = tokens[:, 1:].clone()
    labels[len(labels) // 2 :, :half] = -100  # the second time counts, but not its first token

    def loss(kept):
        model.model.layers = torch.nn.ModuleList(layers[at] for at in kept)
        logits = model(tokens, use_cache=False).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))

    if selection == "leave_one_out":
        alone = sorted(range(3), key=lambda gone: loss([at for at in range(3) if at != gone]))
        expected = (alone[2],)
    elif selection == "contiguous_loss":
        expected = min(((0,), (2,)), key=loss)
    elif selection == "greedy":
        first = min(range(3), key=lambda gone: loss([at for at in range(3) if at != gone]))
        expected = min(((at,) for at in range(3) if at != first), key=loss)
    else:  # three sets of one layer are all there are
        expected = min(((0,), (1,), (2,)), key=loss)
    assert plan.layers == expected
    assert float(re.findall(r"loss (\S+)", said)[-1]) == pytest.approx(loss(expected), abs=1e-4)


def test_layers_by_loss_need_tokens(teacher, scores, prune):
    keys = ["prune.num_layers=1", "prune.layer_selection=greedy"]
    status, said = prune(f"prune.scores={teacher}/scores", *keys)
    assert status == 2 and "prune.layer_selection=greedy: the scores hold no calibration tokens" in said


def test_streamed_scores_are_those_of_the_model_in_memory(teacher, measured):
    keys = [
        f"model.restore_from_path={teacher}/teacher.nemo",
        f"calibration.data_prefix={teacher}/tokens_text_document",
    ]
    sizes = ["calibration.num_samples=12", "calibration.seq_length=32", "calibration.reconstruction_tokens=256"]
    sizes += ["calibration.own_samples=2"]
    assert main(["importance", *keys, *sizes, "importance.stream=true", f"output_path={teacher}/streamed"]) == 0
    streamed = Scores.load(teacher / "streamed")
    pairs = [(name, getattr(streamed, name), getattr(measured, name)) for name in statistic_sizes(measured.shape)]
    pairs += [(axis, streamed.published[axis], measured.published[axis]) for axis in AXES]
    for name, found, wanted in pairs:
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * abs(wanted).max(), err_msg=name)
    assert streamed.tokens_fingerprint() == measured.tokens_fingerprint()
    assert streamed.data_fingerprint == measured.data_fingerprint
    for axis, array in measured.rankings["reconstruction"].items():
        assert np.array_equal(streamed.rankings["reconstruction"][axis], array), axis
    assert np.array_equal(streamed.stream_moment, measured.stream_moment)
    targets = {"hidden_size": 48, "ffn_hidden_size": 50, "num_query_groups": 2, "num_layers": 2}
    plans = [
        make_plan(measured.shape, one.ranked_by("minitron"), targets, source_fingerprint=one.source_fingerprint)
        for one in (measured, streamed)
    ]
    assert plans[0].to_yaml() == plans[1].to_yaml()
