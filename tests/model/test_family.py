"""What a family says, and that files of models that need none say nothing of it."""

import dataclasses
from pathlib import Path

import pytest
import torch

from nemo_minitron.errors import MinitronError
from nemo_minitron.model import layout
from nemo_minitron.model.family import Family
from nemo_minitron.model.parameter import HEAD, HIDDEN, PROJ, Parameter
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.cut import rewrite
from nemo_minitron.prune.plan import Plan
from nemo_minitron.registry import FAMILIES
from tests.llamas import GQA

NAME, HF = "decoder.layers.self_attention.scale", ("model.layers.{l}.self_attn.scale",)


@pytest.fixture
def scaled(monkeypatch):
    """A family with a number for each channel of every head, split as heads are, and one for all heads."""
    monkeypatch.setattr(FAMILIES, "_files", {})
    monkeypatch.setattr(FAMILIES, "_loaded", {})
    rows = (Parameter(NAME, HF, axes=(PROJ,), tp_dim=0), Parameter(NAME + "s", HF, axes=(HEAD,)))
    family = Family(name="scaled", architecture="Scaled", model_type="scaled", parameters=rows)
    FAMILIES.add(family, Path("mine.py"))
    return family


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Parameter(NAME, HF, axes=(HIDDEN,)), "axes must be some of head, .* found 'hidden'"),
        (Parameter(NAME, HF, axes=("experts",)), "found 'experts'"),
        (Parameter("decoder.scale", ("model.scale",), axes=(HEAD,), per_layer=False), "a parameter of each layer"),
    ],
)
def test_a_row_that_pruning_cannot_follow_is_refused(row, message):
    with pytest.raises(MinitronError, match=message):
        Family(name="x", architecture="X", model_type="x", parameters=(row,))


def test_a_further_row_is_counted_and_cut(scaled):
    shape = GQA.replace(family="scaled")
    rows = list(layout.layer_parameters(shape))
    assert [row for row in rows if row not in list(layout.layer_parameters(GQA))] == list(scaled.parameters)
    assert shape.parameters_per_layer() == GQA.parameters_per_layer() + shape.proj_columns + shape.kv_channels
    whole = Plan.identity(shape, "f")
    target = shape.replace(num_attention_heads=4, num_query_groups=2)
    groups, heads = ((0, 3),) * 3, ((0, 1, 6, 7),) * 3
    plan = dataclasses.replace(whole, target=target, groups=groups, heads=heads)
    channels = torch.arange(64.0)
    found = rewrite(plan, scaled.parameters[0], 1, channels)
    assert torch.equal(found, torch.cat([channels[:16], channels[48:]]))  # heads 0, 1, 6 and 7 of 8 channels each
    assert torch.equal(rewrite(plan, scaled.parameters[1], 1, channels[:8]), channels[:8])


def test_files_name_a_family_only_where_its_layers_are_its_own(scaled):
    newer = ("family", "proj_bias", "mlp_bias", "sliding_window")
    for shape in (GQA, GQA.replace(qkv_bias=True)):
        assert shape.to_dict() == {k: v for k, v in dataclasses.asdict(shape).items() if k not in newer}
        assert ModelShape.from_dict(shape.to_dict()) == shape
    own = GQA.replace(family="scaled")
    assert own.to_dict()["family"] == "scaled" and ModelShape.from_dict(own.to_dict()) == own
    assert [FAMILIES.get(name).layers for name in ("llama", "mistral", "qwen2", "scaled")] == ["llama"] * 3 + ["scaled"]


def test_an_unknown_family_is_refused():
    with pytest.raises(MinitronError, match="no model family 'scaled'; known are llama, mistral, qwen2"):
        ModelShape.from_dict(GQA.to_dict() | {"family": "scaled"})


def test_a_name_stands_for_one_family():
    families = list(FAMILIES.every())
    for field in ("name", "architecture", "model_type"):
        assert len({getattr(family, field) for family in families}) == len(families)
