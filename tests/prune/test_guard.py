"""The guard's losses against transformers in float64, on the teacher, the cut and the re-solved student."""

import pytest
import torch
from torch.nn import functional as F

from nemo_minitron.model import layout
from nemo_minitron.prune.cut import prune_checkpoint
from nemo_minitron.prune.resolve import compensate
from tests.canonical import Memory, to_transformers
from tests.importance.reference import answers
from tests.prune.test_resolve import BIASED, EVEN, SHAPE, TARGETS, TIED, TOKENS, model_in_float32, plan_for

OWN = torch.tensor([False, True, True])
"""Of the last three samples."""


COUNTED = answers(12, 33)
COUNTED[-1, :-1] = False


def guarded(shape, target, dtype=torch.float32, tokens=TOKENS, counted=None):
    """The teacher, its plan, the student and what was measured."""
    plan, model = plan_for(shape, TARGETS[target], rescale=True), model_in_float32(shape)
    model.tensors = {slot: tensor.to(dtype).float() for slot, tensor in model.tensors.items()}  # as it is stored
    writer = Memory(plan.target)
    measured = compensate(model, plan, tokens, EVEN, writer, counted=counted, held_out=OWN, dtype=dtype)
    return model, plan, writer, measured


@torch.no_grad()
def losses(model: Memory, counted: torch.Tensor | None = None) -> list[float]:
    """Of the held-out samples by kind, by transformers."""
    tensors = {slot: tensor.double() for slot, tensor in model.tensors.items()}
    tensors.setdefault((layout.OUTPUT.key, None), tensors[layout.EMBEDDING.key, None])
    logits = to_transformers(Memory(model.shape, tensors))(TOKENS[-3:]).logits[:, :-1, : model.shape.vocab_size]
    each = F.cross_entropy(logits.transpose(1, 2), TOKENS[-3:, 1:], reduction="none")
    some = torch.ones_like(each, dtype=torch.bool) if counted is None else counted[-3:, :-1]
    return [float(each[wrote == OWN][some[wrote == OWN]].mean()) for wrote in (False, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "target"), [(SHAPE, "all"), (TIED, "all"), (BIASED, "all"), (SHAPE, "heads")])
def test_losses_are_those_of_whole_models(shape, target, dtype):
    model, plan, student, measured = guarded(shape, target, dtype=dtype)
    cut = Memory(plan.target)
    prune_checkpoint(model, plan, cut)
    assert [(kind, found.tokens) for kind, found in measured.items()] == [("calibration", 32), ("own", 64)]
    for name, one in {"teacher": model, "cut": cut, "resolved": student}.items():
        found = [getattr(kind, name) for kind in measured.values()]
        assert found == pytest.approx(losses(one), abs=2e-4 if shape is BIASED else 2e-5), name


def test_losses_are_those_of_tokens_that_count():
    """Of the three samples held out two are the model's own, and of the last no label counts."""
    model, plan, student, measured = guarded(SHAPE, "all", counted=COUNTED)
    cut = Memory(plan.target)
    prune_checkpoint(model, plan, cut)
    counts = COUNTED[-3:, :-1].sum(1).tolist()
    assert [found.tokens for found in measured.values()] == counts[:2] and 0 == counts[2] < counts[0] != counts[1]
    for name, one in {"teacher": model, "cut": cut, "resolved": student}.items():
        found = [getattr(kind, name) for kind in measured.values()]
        assert found == pytest.approx(losses(one, COUNTED), abs=2e-5), name


def test_of_a_kind_without_a_label_that_counts_nothing_is_said():
    counted = COUNTED.clone()
    counted[-2] = False
    assert list(guarded(SHAPE, "ffn", counted=counted)[3]) == ["calibration"]


def test_nothing_is_solved_on_what_is_held_out():
    _, plan, student, _ = guarded(SHAPE, "all")
    changed = torch.cat([TOKENS[:-3], 39 - TOKENS[-3:]])
    _, _, other, _ = guarded(SHAPE, "all", tokens=changed)
    _, _, some, _ = guarded(SHAPE, "all", counted=COUNTED)
    without = torch.cat([COUNTED[:-3], ~COUNTED[-3:]])
    _, _, others, _ = guarded(SHAPE, "all", tokens=changed, counted=without)
    assert any(not torch.equal(tensor, some.tensors[slot]) for slot, tensor in student.tensors.items())
    alone = Memory(plan.target)
    nothing = compensate(model_in_float32(SHAPE), plan, TOKENS[:-3], EVEN[:, :-3], alone)
    assert nothing == {}
    for slot, tensor in student.tensors.items():
        assert torch.equal(tensor, other.tensors[slot]) and torch.equal(tensor, alone.tensors[slot]), slot
        assert torch.equal(some.tensors[slot], others.tensors[slot]), slot
