"""Students on files: what the guard measures is what the files lose, and a worse student is never written."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nemo_minitron.checkpoint import NemoReader, NemoWriter, each_tensor
from nemo_minitron.config.sections import Prune
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.importance.own_text import write_blocks
from nemo_minitron.importance.scores import Scores
from nemo_minitron.model import layout
from nemo_minitron.prune.choose import plan_from_scores
from nemo_minitron.prune.plan import Plan
from nemo_minitron.prune.student import check_compensation, write_student
from nemo_minitron.synthetic import make_llama
from tests.canonical import Memory, random_model, to_transformers
from tests.importance.made import made
from tests.importance.reference import answers
from tests.llamas import GQA
from tests.prune.test_resolve import stream
from tests.ranks import run_ranks

SAMPLES, OWN, LENGTH = 36, 16, 24
HELD_OUT = (18, 19, 35)
COUNTED = answers(SAMPLES, LENGTH)
COUNTED[SAMPLES - OWN :] = True
NARROWER = Prune(hidden_size=40, ffn_hidden_size=64)
HARDLY_CUT = Prune(hidden_size=60)
"""Where cutting costs so little that weights solved on two tokens in turn are clearly worse."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher that is sure of what comes next, and scores: by text that it wrote, by two tokens in turn, by few, and
    by the first text of which, but in the model's own, only some tokens count."""
    folder = tmp_path_factory.mktemp("guard")
    model = random_model(GQA)
    model.tensors[layout.OUTPUT.key, None] *= 4
    with NemoReader(convert(make_llama(folder / "hf", GQA), folder / "any.nemo")) as reader:
        config = reader.config
    with NemoWriter(folder / "teacher.nemo", config, GQA, torch.float32) as writer:
        for parameter, layer in each_tensor(GQA):
            writer.write(parameter, model.tensors[parameter.key, layer].float(), layer)
    with NemoReader(folder / "teacher.nemo") as reader:
        tokens = write_blocks(reader, SAMPLES, LENGTH, seed=5)
        energy = stream(reader, tokens[:8]).flatten(0, 1).double()
        scores = made(
            GQA,
            np.random.default_rng(0).random,
            reconstruction=True,
            source_fingerprint=reader.fingerprint(),
            stream_moment=(energy.T @ energy).numpy(),
        )
    in_turn, few = tokens.clone(), tokens[:3]
    in_turn[[sample for sample in range(SAMPLES) if sample not in HELD_OUT]] = torch.arange(LENGTH) % 2
    kinds = (("scores", tokens, OWN), ("in_turn", in_turn, OWN), ("few", few, 0), ("chats", tokens, OWN))
    for name, text, own in kinds:
        (folder / name).mkdir()
        weights = np.ones((2 * GQA.num_layers, *text.shape))
        changes = {"tokens": text.numpy(), "sensitivity": weights, "calibration": {"own_samples": own}}
        changes |= {"counted": COUNTED.numpy()} if name == "chats" else {}
        dataclasses.replace(scores, **changes).write(folder / name)
    return folder


def student(folder: Path, scores: str, out: Path, plan: Plan | None = None, **changes: bool) -> Plan:
    """Write a student and its plan to ``out``."""
    found = Scores.load(folder / scores)
    with NemoReader(folder / "teacher.nemo") as reader:
        sizes = HARDLY_CUT if scores == "in_turn" else NARROWER
        prune = dataclasses.replace(sizes, ranking="reconstruction", **changes)
        plan = plan or plan_from_scores(GQA, reader.fingerprint(), prune, found)
        return write_student(reader, plan, out / "student.nemo", out / "student.plan.yaml", found, None)


@torch.no_grad()
def loss(path: Path, tokens: torch.Tensor, counted: torch.Tensor | None = None) -> float:
    """Of a ``.nemo``, by transformers in float64."""
    with NemoReader(path) as reader:
        tensors = {(row.key, at): reader.tensor(row, at).double() for row, at in each_tensor(reader.shape)}
        logits = to_transformers(Memory(reader.shape, tensors))(tokens).logits[:, :-1, : reader.shape.vocab_size]
    some = torch.ones_like(tokens[:, 1:], dtype=torch.bool) if counted is None else counted[:, :-1]
    return float(F.cross_entropy(logits[some], tokens[:, 1:][some]))


@pytest.mark.parametrize(("name", "counted"), [("scores", torch.ones_like(COUNTED)), ("chats", COUNTED)])
def test_what_is_measured_is_what_the_files_lose(folder, tmp_path, name, counted):
    plan = student(folder, name, tmp_path / "resolved")
    cut = student(folder, name, tmp_path / "cut", compensate=False)
    assert plan.compensation.held_out == HELD_OUT and not cut.measured
    assert plan == Plan.load(tmp_path / "resolved" / "student.plan.yaml")
    tokens = torch.tensor(Scores.load(folder / name).tokens.astype("int64"))
    for kind, held in (("calibration", HELD_OUT[:2]), ("own", HELD_OUT[2:])):
        found = plan.measured[kind]
        files = (folder / "teacher.nemo", *(tmp_path / name / "student.nemo" for name in ("cut", "resolved")))
        expected = [loss(file, tokens[list(held)], counted[list(held)]) for file in files]
        assert [found.teacher, found.cut, found.resolved] == pytest.approx(expected, abs=1e-4), kind
        assert found.tokens == counted[list(held), :-1].sum() and found.teacher < found.resolved < found.cut - 0.2
    again = student(folder, name, tmp_path / "again", plan)
    assert again == plan
    for name in ("student.nemo", "student.plan.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "resolved" / name).read_bytes()


def test_a_student_worse_than_a_cut_one_is_cut(folder, tmp_path, capsys):
    plan = student(folder, "in_turn", tmp_path / "found")
    said = capsys.readouterr().err
    assert said.count("minitron: student: its weights are cut and not re-solved, which lost more on text held") == 1
    assert plan.compensation is None and plan == Plan.load(tmp_path / "found" / "student.plan.yaml")
    assert any(found.resolved > found.cut for found in plan.measured.values())
    for found in plan.measured.values():
        assert f"{found.cut:.4f} cut, {found.resolved:.4f} re-solved on" in said
    cut = student(folder, "in_turn", tmp_path / "cut", compensate=False)
    assert cut == dataclasses.replace(plan, measured={})
    assert student(folder, "in_turn", tmp_path / "again", plan) == plan
    same = [(tmp_path / name / "student.nemo").read_bytes() for name in ("found", "cut", "again")]
    assert same[0] == same[1] == same[2]
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["student.nemo", "student.plan.yaml"]


ALL = ("scores", "in_turn", "few", "chats")
"""Of the third only one sample is held out: a second process has none."""


def _students(folder: Path, out: Path) -> list[Plan]:
    return [student(folder, name, out / name) for name in ALL]


@pytest.mark.slow
def test_processes_write_and_decide_alike(folder, tmp_path):
    plans = _students(folder, tmp_path / "one")
    assert [plan.compensation is None for plan in plans[:2]] == [False, True]
    both, one = ["calibration", "own"], ["calibration"]
    assert [list(plan.measured) for plan in plans] == [both, both, one, both]
    assert run_ranks(_students, 2, folder, tmp_path / "two") == [plans, plans]
    for name in ALL:
        for file in ("student.nemo", "student.plan.yaml"):
            one, two = (tmp_path / processes / name / file for processes in ("one", "two"))
            assert one.read_bytes() == two.read_bytes(), (name, file)


def test_what_counted_is_of_the_plan(folder, tmp_path):
    """The same tokens of which others count make another student, so that their plan is not this one's."""
    plan = student(folder, "chats", tmp_path / "some")
    with pytest.raises(MinitronError, match="the plan re-solves weights on calibration tokens"):
        check_compensation(plan, None, Scores.load(folder / "scores"))
    check_compensation(plan, None, Scores.load(folder / "chats"))
    every = student(folder, "scores", tmp_path / "every")
    assert every.ffn == plan.ffn and every.hidden == plan.hidden
    files = [(tmp_path / name / "student.nemo").read_bytes() for name in ("some", "every")]
    assert files[0] != files[1]


@pytest.mark.parametrize("held_out", [(3, 36), tuple(range(36))], ids=["beyond", "all"])
def test_plans_that_hold_back_what_is_not_there_are_refused(folder, held_out):
    scores = Scores.load(folder / "scores")
    plan = plan_from_scores(GQA, scores.source_fingerprint, NARROWER, scores)
    plan = dataclasses.replace(plan, compensation=dataclasses.replace(plan.compensation, held_out=held_out))
    with pytest.raises(MinitronError, match=r"compensation\.held_out: expected some of the scores' 36 samples, found"):
        check_compensation(plan, None, scores)
