"""Steps on packed conversations against each of them computed alone, in dense float64, by transformers."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from nemo_minitron.checkpoint.fuse import fuse
from nemo_minitron.convert import convert
from nemo_minitron.data.blocks import token_blocks
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.importance.scores import Scores
from nemo_minitron.model import layout
from nemo_minitron.model.shape import ModelShape, RopeScaling
from nemo_minitron.synthetic import make_llama
from tests.nemo.grid_jobs import LENGTH
from tests.nemo.test_grids import _double

JOBS = "tests.nemo.chat_jobs"
ROPE = RopeScaling(8.0, 1.0, 4.0, 64)
TEACHER = ModelShape(3, 48, 96, 6, 3, 16, 250, 250, True, 500000.0, ROPE, 256)  # whole on each rank at TP2
STUDENT = ModelShape(2, 32, 64, 8, 4, 16, 250, 250, True, 500000.0, ROPE, 256)
TEMPLATE = (  # no token of it is a control token, of which a vocabulary of 250 has none to spare
    "{% for message in messages %}{{ '\n' + message.role + ':' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ ' ' + message.content }}{% endgeneration %}{% else %}{{ ' ' + message.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}"
)
PLAIN = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
GRIDS = [
    ((1, 1, False), 1),
    ((1, 1, False), 2),
    ((2, 1, False), 2),
    ((2, 1, True), 2),
    ((1, 2, False), 2),
    ((2, 2, True), 4),
]
APART = ("model.data.reset_attention_mask=true",)
RESTART = ("model.data.reset_position_ids=true",)
DISTILL = {"temperature": 2.0, "kd_weight": 0.7, "lm_weight": 0.3}


def _chats() -> list[list[dict[str, str]]]:
    """Short ones, of which a sample holds several, and one whose question fills more than two samples."""
    short = [
        [
            *([{"role": "system", "content": f"S{n}"}] if n % 3 == 0 else []),
            {"role": "user", "content": f"{n}?"},
            {"role": "assistant", "content": f"a{n * 7 % 10}"},
            *([{"role": "user", "content": "so"}, {"role": "assistant", "content": f"{n}!"}] if n % 2 else []),
        ]
        for n in range(12)
    ]
    return [*short, [{"role": "user", "content": "long " * 30}, {"role": "assistant", "content": "no"}]]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Folder with both models, whose tokenizer has a template, token files of conversations and of text."""
    folder = tmp_path_factory.mktemp("chats")
    for role, shape in (("teacher", TEACHER), ("student", STUDENT)):
        make_llama(folder / role, shape, seed=len(role))
        tokenizer = AutoTokenizer.from_pretrained(folder / role)
        tokenizer.chat_template = PLAIN
        tokenizer.save_pretrained(folder / role)
        convert(folder / role, folder / f"{role}.nemo")
    lines = [json.dumps({"messages": chat, "text": f"line {n} of text"}) for n, chat in enumerate(_chats())]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    for key in ("messages", "text"):
        preprocess(folder / "chats.jsonl", folder / "data", tokenizer_type=str(folder / "student"), json_keys=[key])
    return folder


@pytest.fixture(scope="module")
def documents(chats) -> list[tuple[list[int], list[int]]]:
    """Every document's tokens and which of them count, by transformers alone; text counts as a whole."""
    tokenizer = AutoTokenizer.from_pretrained(chats / "student")
    tokenizer.chat_template = TEMPLATE
    end, found = tokenizer.eos_token_id, []
    for number, chat in enumerate(_chats()):
        made = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        found.append(([*made["input_ids"], end], [*made["assistant_masks"], 1]))  # a turn without an end of its own
        text = tokenizer(f"line {number} of text")["input_ids"]
        found.append(([*text, end], [1] * (len(text) + 1)))
    return found


def pieces_of(text: list[int], documents, end: int) -> list[tuple[list[int], list[int]]]:
    """The pieces of documents in a sample, each with what counts, found by their content alone."""
    ends = [n + 1 for n, token in enumerate(text[:-1]) if token == end]
    cuts = [0, *ends, len(text)]
    pieces = []
    for number, (first, last) in enumerate(itertools.pairwise(cuts)):
        piece, candidates = text[first:last], set()
        for ids, counts in documents:
            for begin in range(len(ids) - len(piece) + 1) if number == 0 else [0]:  # only the first lacks its beginning
                if ids[begin : begin + len(piece)] == piece and (last == len(text) or begin + len(piece) == len(ids)):
                    candidates.add(tuple(counts[begin : begin + len(piece)]))
        assert len(candidates) == 1, (piece, candidates)
        pieces.append((piece, list(candidates.pop())))
    return pieces


def reference(chats, documents, texts, command: str, apart: bool, restart: bool):
    """Mean loss over the tokens that count and its canonical gradients, sequences one by one in float64."""
    teacher, student = _double(chats / "teacher"), _double(chats / "student")
    end = AutoTokenizer.from_pretrained(chats / "student").eos_token_id
    total, tokens, counted = torch.zeros((), dtype=torch.float64), 0.0, []
    for text in texts.tolist():
        pieces = pieces_of(text, documents, end)
        positions = torch.cat([torch.arange(len(piece)) for piece, _ in pieces])[None, :-1]
        if apart:  # the label of a piece's last token is of another document
            alone = [(torch.tensor([p]), torch.tensor(c)[1:]) for p, c in pieces if len(p) > 1]
        else:
            counts = torch.tensor([c for _, part in pieces for c in part])
            alone = [(torch.tensor([text]), counts[1:])]
        counted.append(0.0)
        for ids, mask in alone:
            inputs = ids[:, :-1]
            where = {"position_ids": positions} if restart and not apart else {}
            z = student(inputs, **where).logits[0]
            loss = F.cross_entropy(z, ids[0, 1:], reduction="none")
            if command == "distill":
                with torch.no_grad():
                    z_t = teacher(inputs, **where).logits[0]
                t = DISTILL["temperature"]
                kl = F.kl_div(F.log_softmax(z / t, -1), F.log_softmax(z_t / t, -1), reduction="none", log_target=True)
                loss = DISTILL["kd_weight"] * t**2 * kl.sum(-1) + DISTILL["lm_weight"] * loss
            total = total + (loss * mask).sum()
            counted[-1] += float(mask.sum())
        tokens += counted[-1]
    (total / tokens).backward()
    named = dict(student.named_parameters())
    gradients = {
        (p.key, layer): fuse(p, [named[name.format(l=layer)].grad for name in p.hf], STUDENT)
        for p, layer in layout.slots(STUDENT)
    }
    return float(total / tokens), gradients, counted


def run(zygote, chats, tmp_path, command, grid, world, extra=(), blend=None, mute=""):
    keys = [f"distill.{name}={value}" for name, value in DISTILL.items()] if command == "distill" else []
    if command == "distill":
        keys.append(f"model.kd_teacher_restore_from_path={chats / 'teacher.nemo'}")
    blend = blend or str(chats / "data_messages_document")
    args = (command, str(chats / "student.nemo"), blend, str(tmp_path), grid, (*keys, *extra), mute)
    return zygote.run(f"{JOBS}:first_step", world, *args)


def assert_equals_alone(chats, documents, results, command, apart, restart=False, data_ranks=1):
    ranks = len(results) // data_ranks  # tensor parallelism is numbered first, then data, then pipeline
    texts = results[0]["texts"] if data_ranks == 1 else torch.cat([found["texts"] for found in results])
    assert data_ranks == 1 or ranks == 1
    loss, gradients, counted = reference(chats, documents, texts, command, apart, restart)
    if not apart:
        ours = [float(n) for found in results[:data_ranks] for n in found["counted"]]
        assert ours == counted
    assert results[0]["loss"] == pytest.approx(loss, rel=1e-6)
    for (key, layer), expected in gradients.items():
        found = results[0]["gradients"][key, layer].double()[: len(expected)]
        error = ((found - expected).norm() / expected.norm()).item()
        assert error < 1e-5, f"{key} of layer {layer}: relative error {error:.2e}"
    return counted


@pytest.mark.parametrize("command", ["finetune", "distill"])
@pytest.mark.parametrize("grid,world", GRIDS, ids=str)
def test_packed_conversations_are_learned_from_as_if_alone(zygote, chats, documents, grid, world, command, tmp_path):
    results = run(zygote, chats, tmp_path, command, grid, world, (*APART, *RESTART))
    data_ranks = world // (grid[0] * grid[1])
    counted = assert_equals_alone(chats, documents, results, command, apart=True, data_ranks=data_ranks)
    assert 0.0 in counted and len(counted) == 8  # one sample is nothing but a question, and divides by nothing


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_what_counts_does_not_depend_on_what_is_attended_to(zygote, chats, documents, command, tmp_path):
    results = run(zygote, chats, tmp_path, command, (1, 1, False), 1)
    assert_equals_alone(chats, documents, results, command, apart=False)


def test_positions_restart_where_documents_are_attended_to_together(zygote, chats, documents, tmp_path):
    results = run(zygote, chats, tmp_path, "distill", (2, 1, True), 2, RESTART)
    assert_equals_alone(chats, documents, results, "distill", apart=False, restart=True)


def test_all_tokens_count_of_text_that_is_blended_with_conversations(zygote, chats, documents, tmp_path):
    blend = f"0.5,{chats / 'data_messages_document'},0.5,{chats / 'data_text_document'}"
    results = run(zygote, chats, tmp_path, "finetune", (1, 1, False), 1, (), blend)
    counted = assert_equals_alone(chats, documents, results, "finetune", apart=False)
    assert counted.count(LENGTH) == 4 and sum(counted) > 4 * LENGTH


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_a_step_without_a_token_that_counts_changes_nothing(zygote, chats, command, tmp_path):
    (found,) = run(zygote, chats, tmp_path, command, (1, 1, False), 1, (*APART, *RESTART), mute="training")
    assert found["loss"] == 0.0
    assert all((gradient == 0).all() for gradient in found["gradients"].values())


def test_a_validation_without_a_token_that_counts_is_refused(zygote, chats, tmp_path):
    """Its loss would be 0, the best there is."""
    with pytest.raises(RuntimeError, match=r"trainer\.limit_val_batches: none of the tokens that validate counts"):
        run(zygote, chats, tmp_path, "finetune", (1, 1, False), 1, mute="validation")
    assert not list(tmp_path.glob("*.nemo"))


@pytest.mark.parametrize("grid,world", [((1, 1, False), 2), ((2, 1, True), 2), ((1, 2, False), 2)], ids=str)
def test_evaluation_measures_on_the_tokens_that_count(zygote, chats, documents, grid, world, tmp_path):
    prefix = str(chats / "data_messages_document")
    blocks = token_blocks(prefix, LENGTH, num_samples=13, seed=1234)
    ids, counts = (torch.tensor([value for pair in documents[::2] for value in pair[part]]) for part in (0, 1))
    rows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    order = [(rows == block).all(1).nonzero().item() for block in blocks]
    mask = counts[: rows.numel()].view_as(rows)[order][:, 1:]
    with torch.no_grad():
        logits = _double(chats / "student")(blocks[:, :-1]).logits
    losses = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten(), reduction="none")
    found = zygote.run("tests.nemo.grid_jobs:evaluate", world, str(chats / "student.nemo"), prefix, str(tmp_path), grid)
    assert found == pytest.approx([((losses * mask.flatten()).sum() / mask.sum()).item()] * world, rel=1e-6)
    assert json.loads((tmp_path / "out.json").read_text())["tokens"] == mask.sum() < mask.numel() / 2


@pytest.fixture(scope="module")
def scored(zygote, chats):
    out = chats / "scored"
    out.mkdir()
    source, prefix = str(chats / "student.nemo"), str(chats / "data_messages_document")
    zygote.run("tests.nemo.grid_jobs:scores_and_student", 1, source, prefix, str(out), (1, 1, False), SIZES)
    return out


SIZES = ["hidden_size=24", "ffn_hidden_size=48", "num_query_groups=2"]


@pytest.mark.parametrize("grid,world", GRIDS[1:], ids=str)
def test_scores_and_student_are_the_same_on_every_grid(zygote, chats, scored, grid, world, tmp_path):
    source, prefix = str(chats / "student.nemo"), str(chats / "data_messages_document")
    zygote.run("tests.nemo.grid_jobs:scores_and_student", world, source, prefix, str(tmp_path), grid, SIZES)
    ours, expected = Scores.load(tmp_path / "scores"), Scores.load(scored / "scores")
    assert np.array_equal(ours.counted, expected.counted) and 0 < ours.counted[:8].mean() < 0.5
    assert expected.counted[8:].all() and ours.tokens_fingerprint() == expected.tokens_fingerprint()
    assert ours.data_fingerprint == expected.data_fingerprint and ours.calibration == expected.calibration
    assert np.array_equal(ours.sensitivity, expected.sensitivity)
    assert np.array_equal(ours.stream_moment, expected.stream_moment)
    for axis, worth in expected.published.items():
        np.testing.assert_allclose(ours.published[axis], worth, rtol=1e-5, atol=0, err_msg=axis)
        assert np.array_equal(ours.rankings["reconstruction"][axis], expected.rankings["reconstruction"][axis]), axis
    for name in ("student.plan.yaml", "student.nemo"):
        assert (tmp_path / name).read_bytes() == (scored / name).read_bytes(), name


def apart_by(found, expected) -> float:
    """Relative distance of all gradients."""
    pairs = [(found[key].double(), gradient.double()) for key, gradient in expected.items()]
    return (sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)).sqrt().item()


def test_a_cached_teacher_saw_the_same_documents_and_serves_any_mask(zygote, chats, tmp_path):
    topk = ("distill.loss=topk", "distill.top_k=16")
    cache = f"distill.teacher_cache={tmp_path / 'cache'}"

    def step(name, *extra, **options):
        found = run(zygote, chats, tmp_path / name, "distill", (1, 1, False), 1, (*topk, *extra), **options)
        return found[0]["gradients"]

    online = step("online", *APART, *RESTART)
    assert apart_by(step("written", *APART, *RESTART, cache), online) < 0.005  # log-probabilities in float16
    assert apart_by(step("together"), online) > 0.05  # or this test could not tell
    with pytest.raises(RuntimeError, match="is of another reset_attention_mask: it has True, this run False"):
        step("other", *RESTART, cache)
    copy = tmp_path / "data_messages_document"
    for file in chats.glob("data_messages_*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    mask = tmp_path / "data_messages_mask.bin"
    mask.write_bytes(b"\1" * mask.stat().st_size)
    masked = {"blend": str(copy)}
    expected = step("all", *APART, *RESTART, **masked)
    assert apart_by(expected, online) > 0.05
    without = "model.kd_teacher_restore_from_path=null"
    assert apart_by(step("cached", *APART, *RESTART, cache, without, **masked), expected) < 0.005


def test_a_changed_mask_is_another_training(zygote, chats, tmp_path):
    """A run is resumed where what counts is the same alone."""
    copy = tmp_path / "data_messages_document"
    for file in chats.glob("data_messages_*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    resumed = ("exp_manager.create_checkpoint_callback=true", "exp_manager.resume_if_exists=true")
    run(zygote, chats, tmp_path / "run", "finetune", (1, 1, False), 1, resumed, blend=str(copy))
    mask = tmp_path / "data_messages_mask.bin"
    mask.write_bytes(b"\1" * mask.stat().st_size)
    with pytest.raises(RuntimeError, match=r"model\.data\.data_prefix\.train"):
        run(zygote, chats, tmp_path / "run", "finetune", (1, 1, False), 1, resumed, blend=str(copy))
