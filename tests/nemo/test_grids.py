"""Every grid against one process and against a dense float64 reference written without Megatron."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.fuse import fuse
from nemo_minitron.convert import convert
from nemo_minitron.data.blocks import token_blocks
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.data.sources import Source
from nemo_minitron.importance.scores import Scores
from nemo_minitron.model import layout
from nemo_minitron.model.shape import LinearScaling, ModelShape, RopeScaling
from nemo_minitron.synthetic import make_llama
from tests.nemo.grid_jobs import LENGTH, curve

JOBS = "tests.nemo.grid_jobs"
# (TP, PP, SP), processes: all that four of them hold; data parallelism takes what is left
GRIDS = [
    ((1, 1, False), 1),
    ((1, 1, False), 2),
    ((2, 1, False), 2),
    ((2, 1, True), 2),
    ((1, 2, False), 2),
    ((1, 2, False), 4),
    ((2, 1, False), 4),
    ((2, 1, True), 4),
    ((2, 2, False), 4),
    ((2, 2, True), 4),
    ((4, 1, False), 4),
    ((4, 1, True), 4),
]
ROPE, LINEAR = RopeScaling(8.0, 1.0, 4.0, 64), LinearScaling(3.0)
# teacher and student of one pair differ in width and depth; 250 tokens need padding at every TP
PAIRS = {
    "tied_4_groups": (
        ModelShape(5, 48, 96, 8, 4, 16, 250, 250, True, 500000.0, ROPE, 256),  # 5 layers: unequal stages at PP2
        ModelShape(2, 32, 64, 8, 4, 16, 250, 250, True, 500000.0, ROPE, 256),
    ),
    "untied_8_groups": (
        ModelShape(2, 64, 128, 16, 8, 8, 250, 250, False, 10000.0, LINEAR, 256),
        ModelShape(2, 40, 96, 16, 8, 8, 250, 250, False, 10000.0, LINEAR, 256),
    ),
    "teacher_of_3_groups": (  # does not divide over 2 or 4 ranks: whole on each
        ModelShape(3, 48, 90, 6, 3, 16, 250, 250, True, 10000.0, None, 256),
        ModelShape(2, 32, 64, 8, 4, 16, 250, 250, True, 10000.0, None, 256),
    ),
}
DISTILL = {"temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3}


@pytest.fixture(scope="session", params=list(PAIRS))
def family(request, tmp_path_factory):
    """Folder with teacher and student as HF folders and ``.nemo`` files, and token files of their tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    for role, shape in zip(("teacher", "student"), PAIRS[request.param], strict=True):
        make_llama(folder / role, shape, seed=len(role))
        convert(folder / role, folder / f"{role}.nemo")
    preprocess("pydoc_topics", folder / "data", tokenizer_type=str(folder / "teacher"))
    return folder, *PAIRS[request.param]


def _double(folder: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float64, attn_implementation="eager")
    for module in [model.model, *model.model.layers]:  # transformers' own norm rounds to float32
        for name, norm in list(module.named_children()):
            if name.endswith("norm"):
                exact = torch.nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(module, name, exact)
    return model


HIDDEN = {"hidden_loss": "mse", "hidden_weight": 0.5}


def _dense_step(family, hidden_pair: list[int] | None = None):
    """Loss, terms and canonical gradients of one global batch in dense float64."""
    folder, _, shape = family
    generator = torch.Generator().manual_seed(5)
    blocks = torch.randint(0, shape.vocab_size, (8, LENGTH + 1), generator=generator)
    mask = (torch.rand(8, LENGTH, generator=generator) > 0.3).float()
    mask[1], mask[4:6] = 0.0, 0.0  # micro-batches of very different weight, one of none
    teacher, student = _double(folder / "teacher"), _double(folder / "student")
    inputs, labels = blocks[:, :-1], blocks[:, 1:]
    ours = student(inputs, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(inputs, output_hidden_states=True)
    z, z_t = ours.logits, theirs.logits
    t = DISTILL["temperature"]
    kl = F.kl_div(F.log_softmax(z / t, -1), F.log_softmax(z_t / t, -1), reduction="none", log_target=True).sum(-1)
    ce = F.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    tokens = mask.sum()
    kd, lm = ((t**2 * kl) * mask).sum() / tokens, (ce * mask).sum() / tokens
    loss = DISTILL["kd_weight"] * kd + DISTILL["lm_weight"] * lm
    terms = {"train_kd_loss": kd.item(), "train_lm_loss": lm.item()}
    if hidden_pair is not None:
        x, y = ours.hidden_states[hidden_pair[0]], theirs.hidden_states[hidden_pair[1]]
        s, target = x.detach()[mask > 0], y[mask > 0]
        gram = s.T @ s
        ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        projection = torch.linalg.lstsq(gram + ridge, s.T @ target).solution
        distance = (((x @ projection - y) ** 2).mean(-1) * mask).sum() / tokens
        terms["train_hidden_loss"] = distance.item()
        loss = loss + HIDDEN["hidden_weight"] * distance
    loss.backward()
    named = dict(student.named_parameters())
    gradients = {
        (p.key, layer): fuse(p, [named[name.format(l=layer)].grad for name in p.hf], shape)
        for p, layer in layout.slots(shape)
    }
    return blocks, mask, loss.item(), terms, gradients


@pytest.fixture(scope="session")
def dense(family):
    return _dense_step(family)


@pytest.mark.parametrize("grid,world", GRIDS, ids=str)
def test_distillation_gradients_equal_dense_float64(zygote, family, dense, grid, world):
    _assert_step_equals(zygote, family, dense, grid, world, DISTILL)


@pytest.mark.parametrize("grid,world", [g for g in GRIDS if g[0][1] == 1 and g[1] <= 2], ids=str)
def test_hidden_state_gradients_equal_dense_float64(zygote, family, grid, world):
    """Outputs of the student's first layer against the teacher's second last, through a fitted projection."""
    pair = [1, family[1].num_layers - 1]
    step = _dense_step(family, pair)
    _assert_step_equals(zygote, family, step, grid, world, {**DISTILL, **HIDDEN, "hidden_pairs": [pair]})


def test_micro_batches_in_another_order_give_the_same_step(zygote, family, dense):
    blocks, mask, *expected = dense
    order = torch.tensor([4, 5, 2, 3, 6, 7, 0, 1])
    step = (blocks[order], mask[order], *expected)
    _assert_step_equals(zygote, family, step, (1, 1, False), 1, DISTILL)


def _assert_step_equals(zygote, family, step, grid, world, distill):
    folder, _, shape = family
    blocks, mask, loss, terms, gradients = step
    results = zygote.run(
        f"{JOBS}:distillation_step",
        world,
        str(folder / "teacher.nemo"),
        str(folder / "student.nemo"),
        grid,
        blocks,
        mask,
        distill,
    )
    ours_loss, ours_terms, ours = results[0]
    assert ours_loss == pytest.approx(loss, rel=1e-6)
    for name, value in terms.items():
        assert ours_terms[name] == pytest.approx(value, rel=1e-6), name
    for (key, layer), expected in gradients.items():
        found = ours[key, layer].double()
        if found.shape[0] != expected.shape[0]:
            assert found[shape.vocab_size :].abs().max() == 0, f"{key}: padding rows received a gradient"
            found = found[: shape.vocab_size]
        error = ((found - expected).norm() / expected.norm()).item()
        assert error < 1e-5, f"{key} of layer {layer}: relative error {error:.2e}"


def _paths(folder: Path) -> tuple[str, str]:
    return str(folder / "wide.nemo"), str(folder / "wide_text_document")


# one model and the sizes that it is pruned to: every grid can hold it and its student
WIDE = {
    "untied_8_groups": (
        ModelShape(4, 64, 128, 16, 8, 8, 250, 250, False, 10000.0, LINEAR, 256),
        ["hidden_size=32", "ffn_hidden_size=64", "num_query_groups=4", "num_layers=2"],
    ),
    "tied_4_groups": (  # 5 layers: unequal stages at PP2; heads are pruned within their groups
        ModelShape(5, 48, 96, 8, 4, 16, 250, 250, True, 500000.0, ROPE, 256),
        ["hidden_size=32", "ffn_hidden_size=48", "num_attention_heads=4", "num_layers=3"],
    ),
}
UNTIED = pytest.mark.parametrize("wide", ["untied_8_groups"], indirect=True)


@pytest.fixture(scope="session", params=list(WIDE))
def wide(request, tmp_path_factory):
    """Folder with one of :data:`WIDE` as ``hf`` and ``wide.nemo``, and its tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    make_llama(folder / "hf", WIDE[request.param][0], seed=2)
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    tokenizer.pad_token = tokenizer.eos_token  # as many have it: ends of documents must count all the same
    tokenizer.save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "wide.nemo")
    lines = [line for topic in sorted(topics) for line in topics[topic].splitlines() if line.strip()]
    (folder / "lines.txt").write_text("\n".join(lines[:2000]))  # short documents: their ends are many
    text = Source(str(folder / "lines.txt"), document="line")
    preprocess(text, folder / "wide", tokenizer_type=str(folder / "hf"))
    return folder


def _sizes(wide: Path) -> list[str]:
    return next(sizes for name, (_, sizes) in WIDE.items() if wide.name.startswith(name))


@pytest.fixture(scope="session")
def one_process(zygote, wide):
    out = wide / "one"
    out.mkdir()
    zygote.run(f"{JOBS}:scores_and_student", 1, *_paths(wide), str(out), (1, 1, False), _sizes(wide))
    return out


@pytest.mark.parametrize("grid,world", GRIDS[1:], ids=str)
def test_scores_plan_and_student_are_the_same_on_every_grid(zygote, wide, one_process, grid, world, tmp_path):
    zygote.run(f"{JOBS}:scores_and_student", world, *_paths(wide), str(tmp_path), grid, _sizes(wide))
    ours, expected = Scores.load(tmp_path / "scores"), Scores.load(one_process / "scores")
    for name in ("block_influence", "residual_cosine"):
        np.testing.assert_allclose(getattr(ours, name), getattr(expected, name), rtol=1e-5, atol=0, err_msg=name)
    for axis, worth in expected.published.items():
        np.testing.assert_allclose(ours.published[axis], worth, rtol=1e-5, atol=0, err_msg=axis)
    plan = "student.plan.yaml"
    assert (tmp_path / plan).read_bytes() == (one_process / plan).read_bytes()
    with NemoReader(tmp_path / "student.nemo") as a, NemoReader(one_process / "student.nemo") as b:
        assert a.fingerprint() == b.fingerprint()


@pytest.mark.parametrize("grid,world", GRIDS, ids=str)
def test_evaluation_is_the_same_on_every_rank_of_every_grid(zygote, wide, grid, world, tmp_path):
    """Against transformers in float64; 13 blocks in micro-batches of 2 leave data-parallel ranks unequal shares."""
    source, prefix = _paths(wide)
    blocks = token_blocks(prefix, LENGTH, num_samples=13, seed=1234)
    with torch.no_grad():
        logits = _double(wide / "hf")(blocks[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()
    found = zygote.run(f"{JOBS}:evaluate", world, source, prefix, str(tmp_path), grid)
    assert found == pytest.approx([expected] * world, rel=1e-6)
    assert json.loads((tmp_path / "out.json").read_text())["val_loss"] == found[0]


@pytest.fixture(scope="session")
def tuned(zygote, wide):
    out = wide / "tuned"
    out.mkdir()
    zygote.run(f"{JOBS}:train", 1, "finetune", *_paths(wide), str(out), (1, 1, False))
    return curve(out)


FINETUNED = [pytest.param(*case, marks=[pytest.mark.slow] * (case[0][0] == 4)) for case in GRIDS[1:]]
"""TP 4 of the next-token loss is also in the scores', the evaluation's and the fused loss's tests."""


@pytest.mark.parametrize("grid,world", FINETUNED, ids=str)
def test_finetuning_follows_the_same_curve(zygote, wide, tuned, grid, world, tmp_path):
    zygote.run(f"{JOBS}:train", world, "finetune", *_paths(wide), str(tmp_path), grid)
    assert len(tuned) == 10 and tuned[9] < tuned[0]
    assert curve(tmp_path, "tokens")[9] == 10 * 8 * LENGTH
    assert curve(tmp_path) == pytest.approx(tuned, abs=1e-4)


CHECKPOINTS = (
    "exp_manager.create_checkpoint_callback=true",
    "exp_manager.resume_if_exists=true",
    "trainer.val_check_interval=2",
)


@UNTIED
@pytest.mark.parametrize(
    "first,then",
    [
        (((1, 1, False), 1), ((1, 1, False), 1)),
        (((1, 1, False), 1), ((2, 1, True), 2)),
        pytest.param(((2, 1, True), 4), ((2, 1, True), 4), marks=pytest.mark.slow),
        pytest.param(((1, 2, False), 2), ((1, 2, False), 2), marks=pytest.mark.slow),
        pytest.param(((2, 2, True), 4), ((1, 1, False), 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_killed_distillation_resumes_as_if_nothing_had_happened(zygote, wide, one_process, first, then, tmp_path):
    """Killed in step 5 after a checkpoint at step 4; the same grid goes on bit by bit, another one to 1e-5."""
    student, prefix = str(one_process / "student.nemo"), _paths(wide)[1]
    extra = (*CHECKPOINTS, f"model.kd_teacher_restore_from_path={_paths(wide)[0]}")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    zygote.run(f"{JOBS}:train", first[1], "distill", student, prefix, str(whole), first[0], 8, extra)
    expected = curve(whole, "train_kd_loss")
    with pytest.raises(RuntimeError, match="died"):
        zygote.run(f"{JOBS}:train", first[1], "distill", student, prefix, str(broken), first[0], 8, extra, 5)
    assert not (broken / "trained.last.nemo").exists()
    zygote.run(f"{JOBS}:train", then[1], "distill", student, prefix, str(broken), then[0], 8, extra)
    resumed = curve(broken, "train_kd_loss")
    assert sorted(resumed) == list(range(8))  # the table goes on
    assert resumed == (expected if first == then else pytest.approx(expected, abs=1e-5))
    if first == then:
        with NemoReader(whole / "trained.last.nemo") as a, NemoReader(broken / "trained.last.nemo") as b:
            assert a.fingerprint() == b.fingerprint()


TOP_K = ("distill.loss=topk", "distill.top_k=16")


def test_a_cached_teacher_serves_every_grid_and_batch_size(zygote, wide, one_process, tmp_path):
    """Written at DP2, killed and resumed to the same bytes, read elsewhere without a teacher: the online curve."""
    student, prefix = str(one_process / "student.nemo"), _paths(wide)[1]
    teacher = f"model.kd_teacher_restore_from_path={_paths(wide)[0]}"

    def distil(name, grid, world, *extra, steps=10):
        run = tmp_path / name
        zygote.run(f"{JOBS}:train", world, "distill", student, prefix, str(run), grid, steps, (*TOP_K, *extra))
        return curve(run, "train_kd_loss")

    def content(folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    cache = tmp_path / "cache"
    online = distil("online", (1, 1, False), 1, teacher)
    cached = distil("dp2", (1, 1, False), 2, teacher, f"distill.teacher_cache={cache}")
    assert len(online) == 10 and cached == pytest.approx(online, abs=5e-3)  # float16 log-probabilities
    whole = content(cache)
    assert sorted(whole) == ["cache.json", "train/00000000.npy", "train/00000001.npy", "validation/00000000.npy"]
    (cache / "train" / "00000001.npy").unlink()  # as if killed before
    assert distil("again", (1, 1, False), 1, teacher, f"distill.teacher_cache={cache}") == pytest.approx(
        cached, abs=1e-4
    )
    assert content(cache) == whole
    without = ("model.kd_teacher_restore_from_path=null", f"distill.teacher_cache={cache}")
    assert distil("tp2", (2, 1, True), 2, *without) == pytest.approx(cached, abs=1e-4)
    assert distil("pp2", (1, 2, False), 2, *without) == pytest.approx(cached, abs=1e-4)
    small = distil("small", (1, 1, False), 1, *without, "model.global_batch_size=4", steps=6)
    assert small[0] == pytest.approx(cached[0], rel=0.2)
    with pytest.raises(RuntimeError, match=r"another temperature: it has 1\.0, this run 2\.0"):
        distil("other", (1, 1, False), 1, *without, "distill.temperature=2.0")
    with pytest.raises(RuntimeError, match="another data"):
        distil("seed", (1, 1, False), 1, *without, "seed=7")
    with pytest.raises(RuntimeError, match="lacks answers"):
        distil("more", (1, 1, False), 1, *without, steps=40)


SAMPLED = ("distill.loss=sampled_kl", "distill.teacher_samples=12")


@pytest.mark.slow
def test_a_teacher_that_was_drawn_from_serves_every_grid(zygote, wide, one_process, tmp_path):
    """Written at DP2, and again by one process after a kill, to the same bytes; read elsewhere without a teacher."""
    student, prefix = str(one_process / "student.nemo"), _paths(wide)[1]
    teacher = f"model.kd_teacher_restore_from_path={_paths(wide)[0]}"
    cache = tmp_path / "cache"
    reads = (f"distill.teacher_cache={cache}", *SAMPLED)

    def distil(name, grid, world, *extra):
        run = tmp_path / name
        zygote.run(f"{JOBS}:train", world, "distill", student, prefix, str(run), grid, 10, extra)
        return curve(run, "train_kd_loss"), curve(run, "val_kd_loss")

    def content():
        return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}

    online = distil("online", (1, 1, False), 1, teacher, SAMPLED[0])  # with the teacher itself: forward KL
    cached = distil("dp2", (1, 1, False), 2, teacher, *reads)
    whole = content()
    (cache / "train" / "00000001.npy").unlink()  # as if killed before
    assert distil("again", (1, 1, False), 1, teacher, *reads)[0] == pytest.approx(cached[0], abs=1e-4)
    assert content() == whole
    without = ("model.kd_teacher_restore_from_path=null", *reads)
    for name, grid in (("tp2", (2, 1, True)), ("pp2", (1, 2, False))):
        assert distil(name, grid, 2, *without)[0] == pytest.approx(cached[0], abs=1e-4)
    # an estimate of the same loss, and a student that is the same but for the noise of the draws
    for found, expected in zip(cached, online, strict=True):
        assert found == pytest.approx(expected, rel=0.15) and found != expected
    with pytest.raises(RuntimeError, match="another samples: it has 12, this run 13"):
        distil("other", (1, 1, False), 1, *without, "distill.teacher_samples=13")
    with pytest.raises(RuntimeError, match="another top_k"):
        distil("kind", (1, 1, False), 1, *without, "distill.loss=topk")
