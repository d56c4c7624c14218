"""What a ``prune`` section asks for: what contradicts a plan, and the part about serving."""

from __future__ import annotations

import pytest

from nemo_minitron.config.sections import Prune, Serving
from nemo_minitron.errors import MinitronError
from nemo_minitron.prune.plan import Compensation, Plan
from nemo_minitron.prune.request import check_serving, requested_shape
from tests.llamas import GQA
from tests.model.test_serving import LLAMA, SMOL

PLAN = Plan.identity(GQA, "f")


@pytest.mark.parametrize(
    "asked",
    [
        {"rotate": False},
        {"rotate": True},
        {"ranking": "minitron"},
        {"group_selection": "loss"},
        {"layer_selection": "greedy"},
        {"drop_layers": [1]},
        {"hidden_size": 40},
        {"num_layers": 0},
        {"scores": "scores"},
    ],
)
def test_what_a_plan_decides_cannot_be_asked_for_beside_it(asked):
    """It would have no effect, and nobody would be told."""
    with pytest.raises(
        MinitronError, match=rf"^prune\.plan: says everything already; leave out prune\.{next(iter(asked))}$"
    ):
        requested_shape(GQA, Prune(plan="plan.yaml", **asked), PLAN)


def test_what_applies_a_plan_may_stand_beside_it():
    solved = Plan(**{**vars(PLAN), "compensation": Compensation("tokens")})
    both = Prune(plan="plan.yaml", scores="scores", compensate=True, serving=Serving(row_multiple=8))
    assert requested_shape(GQA, both, solved) == GQA


def test_a_student_that_an_engine_would_refuse_is_an_error_with_every_reason():
    student = LLAMA.replace(num_attention_heads=24, num_query_groups=6, ffn_hidden_size=9217)
    with pytest.raises(MinitronError) as caught:
        check_serving(LLAMA, student, Serving(tensor_parallel=8))
    assert str(caught.value) == (
        "prune.serving: the student would be refused: ffn_hidden_size 9217 does not divide over 8 GPUs; "
        "num_query_groups 6 neither divides over 8 GPUs nor they over it"
    )


def test_only_what_pruning_made_worse_is_told():
    assert check_serving(SMOL, SMOL.replace(ffn_hidden_size=1024), Serving()) == []  # rows of 576 are the source's
    (told,) = check_serving(SMOL, SMOL.replace(hidden_size=512), Serving())
    assert told.startswith("hidden_size 512 is no multiple of 9 heads: transformers 5 refuses")
    (told,) = check_serving(LLAMA, LLAMA.replace(hidden_size=2688), Serving())
    assert told.startswith("hidden_size 2688 is no multiple of 256: llama.cpp's K-quants store ")
    assert check_serving(LLAMA, LLAMA.replace(hidden_size=2688), Serving(row_multiple=128)) == []
