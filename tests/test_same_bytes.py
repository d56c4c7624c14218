"""The same bytes as before: what commit 7a7243c made of two tiny models, in ``same_bytes/fixture``, is made again.

What is only copied or chosen (cut students, exports, plans) must be equal on every machine. What is computed in
floating point depends on the CPU's vector units and on libraries as well: it is compared bit by bit where the fixture's
``facts`` hold, else within a tolerance. ``same_bytes/observe.py`` reads scores and plans by meaning: a new format gets
a reader there.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.same_bytes import make, observe

EXPECTED: dict[str, Any] = json.loads((make.FIXTURE / "expected.json").read_text())
TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 2**-7}
"""How far the sketch of an array may be off where this machine's facts are others, as a share of its norm."""
COPIED = [name for name in make.PRUNINGS if name.endswith("_cut") and name != "depth_greedy_cut"]
REQUESTED = [*COPIED, "width_turned", "width_unturned", "qwen2_turned", "depth_greedy"]
REPLAYED = [*REQUESTED, "heads_ffn", "depth_contiguous", "qwen2_ffn"]
"""Prunings by old scores and by old plans that the tests which are not slow do."""


# ------------------------------------------------------------------------------------------------------ comparison


def other_facts() -> str:
    """What of this machine is not as where the fixture was made; empty where results must be equal bit by bit."""
    here, there = observe.facts(), EXPECTED["facts"]
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    return ", ".join(f"{name} is {here.get(name)}, was {there.get(name)}" for name in names)


def same(found: dict[str, Any], expected: dict[str, Any], others: str = "") -> None:
    """Arrays of ``observe.describe`` by name; ``others`` says why bits may differ, and then a sketch decides."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name]["dtype"], found[name]["shape"]) == (array["dtype"], array["shape"]), name
        if not others:
            assert found[name]["sha256"] == array["sha256"], f"{name}: other bits"
            continue
        limit = TOLERANCE[array["dtype"]]
        new, old = np.array(found[name]["sketch"]), np.array(array["sketch"])
        off = np.abs(new - old).max() / max(old[0], 1e-30)
        assert off <= limit, f"{name}: {off:.1e} apart, at most {limit} was expected (not bit by bit: {others})"


def same_plan(found: Path, expected: Path, compensation: bool = True) -> None:
    """The same source, sizes, indices and, if asked, compensation; a shape may have got fields since."""
    new, old = observe.plan(found), observe.plan(expected)
    if not compensation:
        new["compensation"] = old["compensation"]
    shape = new["source"]["shape"]
    new["source"]["shape"] = {name: shape.get(name) for name in old["source"]["shape"]}
    assert new == old


def computed(name: str, others: str) -> str:
    """Why a student's bits may differ; empty where it is only cut."""
    return "" if name.endswith("_cut") else others


def test_a_changed_bit_and_a_changed_digit_are_seen():
    array = np.linspace(-1, 1, 1000).astype(np.float32)
    bit, digits = array.copy(), array.copy()
    bit.view(np.uint32)[500] ^= 1
    digits += np.float32(3e-5) * np.cos(np.arange(1000, dtype=np.float32))
    expected = {"x": observe.describe(array)}
    same({"x": observe.describe(array.copy())}, expected)
    same({"x": observe.describe(bit)}, expected, "another CPU")
    with pytest.raises(AssertionError, match="x: other bits"):
        same({"x": observe.describe(bit)}, expected)
    with pytest.raises(AssertionError, match="another CPU"):
        same({"x": observe.describe(digits)}, expected, "another CPU")
    with pytest.raises(AssertionError, match="x"):
        same({"x": observe.describe(array.astype(np.float64))}, expected, "another CPU")


@pytest.mark.parametrize("change", [("keep", "hidden"), ("target", "hidden_size"), ("compensation", "rotate")])
def test_a_changed_plan_is_seen(change, tmp_path, monkeypatch):
    path = make.FIXTURE / "plans" / "width_turned.plan.yaml"
    same_plan(path, path)
    old = observe.plan(path)
    new = copy.deepcopy(old)
    section, key = change
    new[section][key] = new[section][key][1:] if section == "keep" else 1 - int(new[section][key])
    monkeypatch.setattr(observe, "plan", lambda asked: copy.deepcopy(new if asked == tmp_path else old))
    with pytest.raises(AssertionError):
        same_plan(tmp_path, path)


# ----------------------------------------------------------------------------- from the scores and plans of the fixture


@pytest.fixture(scope="module")
def others() -> str:
    return other_facts()


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Students of old scores in ``students``, of old plans in ``replayed``, and exports; all made by one process."""
    folder = tmp_path_factory.mktemp("same_bytes")
    commands: list[list[str]] = []
    make.prepare(folder, commands.extend)
    make.prune(commands.extend, REQUESTED, make.FIXTURE / "scores")
    make.prune(commands.extend, REPLAYED, make.FIXTURE / "scores", make.FIXTURE / "plans", "replayed")
    make.export(commands.extend)
    make.subprocesses(folder)(commands)
    return folder


def test_models(out, others):
    for name in ("llama", "qwen2"):
        same(observe.hf_tensors(out / name), EXPECTED["models"][name])
        same(observe.nemo_tensors(out / f"{name}.nemo"), EXPECTED["nemo"][name])
    same(observe.hf_tensors(out / "synthesized"), EXPECTED["models"]["synthesized"], others)


def test_tokens(out):
    found = observe.digests(out, "tokens*")
    assert found and found == {name: EXPECTED["files"][name] for name in found}


@pytest.mark.parametrize("name", REQUESTED)
def test_old_scores_make_the_same_plan_and_cut_student(out, name, others):
    """Of a student that is re-solved, the same plan of what is kept: new plans hold samples back, old ones do not."""
    cut = name.endswith("_cut")
    same_plan(out / "students" / f"{name}.plan.yaml", make.FIXTURE / "plans" / f"{name}.plan.yaml", compensation=cut)
    found = observe.nemo_tensors(out / "students" / f"{name}.nemo")
    if cut:
        same(found, EXPECTED["students"][name], computed(name, others))
    assert found.keys() == EXPECTED["students"][name].keys()


@pytest.mark.parametrize("name", REPLAYED)
def test_an_old_plan_makes_the_same_student(out, name, others):
    found = observe.nemo_tensors(out / "replayed" / f"{name}.nemo")
    same(found, EXPECTED["students"][name], computed(name, others))
    same_plan(out / "replayed" / f"{name}.plan.yaml", make.FIXTURE / "plans" / f"{name}.plan.yaml")


def test_a_plan_that_keeps_everything_changes_nothing(out):
    same(observe.nemo_tensors(out / "replayed" / "everything_cut.nemo"), observe.nemo_tensors(out / "llama.nemo"))


@pytest.mark.parametrize("name", make.EXPORTS)
def test_an_export_has_the_same_bytes(out, name):
    models = EXPECTED["models"]
    expected = {**models, "llama_shards": models["llama"], **EXPECTED["exports"]}[name]
    same(observe.hf_tensors(out / "exports" / name), expected)
    digests = observe.digests(out / "exports" / name).items()
    found = {f"{name}/{file}": digest for file, digest in digests if file != "README.md"}  # a text for people
    assert found == {file: digest for file, digest in EXPECTED["files"].items() if file.startswith(f"{name}/")}


@pytest.mark.parametrize("name", ["llama", "qwen2", "width_minitron_cut", "width_turned", "qwen2_turned"])
def test_config_and_other_members_of_a_nemo_are_the_same(out, name, others):
    if others:
        pytest.skip(f"NeMo's and torch's own versions are in these files; {others}")
    path = out / f"{name}.nemo" if name in ("llama", "qwen2") else out / "replayed" / f"{name}.nemo"
    assert observe.members(path, out) == EXPECTED["members"][name]


# --------------------------------------------------------------------------------------------------- what takes longer


@pytest.fixture(scope="module")
def run(out) -> make.Run:
    """Runs commands in the folder ``out``."""
    return make.subprocesses(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", make.SCORES)
def test_new_scores_hold_the_same_numbers(out, run, name, others):
    make.measure(run, [name])
    told, arrays = observe.scores(out / "scores" / name)
    expected = EXPECTED["scores_facts"][name]
    shape = told.pop("shape")
    assert shape == shape | expected["shape"]  # it may have got fields since
    told["calibration"].pop("own_samples", None)  # scores say it since plans hold samples back
    assert told == {key: value for key, value in expected.items() if key != "shape"}
    same({name: observe.describe(array) for name, array in arrays.items()}, EXPECTED["scores"][name], others)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in make.PRUNINGS if name not in REQUESTED])
def test_old_scores_make_the_same_plan_and_cut_student_here_too(out, run, name, others):
    scores: Path | str = make.FIXTURE / "scores"
    if make.PRUNINGS[name][1] not in make.KEPT_SCORES:
        make.measure(run, [str(make.PRUNINGS[name][1])])
        scores = "scores"
    make.prune(run, [name], scores)
    test_old_scores_make_the_same_plan_and_cut_student(out, name, others)
    if name not in REPLAYED:
        make.prune(run, [name], scores, make.FIXTURE / "plans", "replayed")
    test_an_old_plan_makes_the_same_student(out, name, others)


@pytest.mark.slow
@pytest.mark.parametrize("name", make.TRAININGS)
def test_a_training_logs_the_same_losses(out, run, name, others):
    make.train(run, [name])
    same_texts(observe.losses(out / "trained" / name), EXPECTED["losses"][name], others)


@pytest.mark.slow
@pytest.mark.parametrize("grid", make.EVALUATIONS)
def test_an_evaluation_tells_the_same_loss(out, run, grid, others):
    make.evaluate(run, [grid], "replayed/width_turned.nemo")
    same_texts(
        {grid: observe.evaluated(out / "evaluated" / f"{grid}.json")}, {grid: EXPECTED["evaluated"][grid]}, others
    )


@pytest.mark.slow
def test_a_search_predicts_the_same(out, run, others):
    make.search(run, make.FIXTURE / "scores")
    found = observe.searched(out / "searched")
    if others:
        pytest.skip(f"digits of predictions are compared as text; {others}")
    assert found == EXPECTED["searched"]


def same_texts(found: dict[str, Any], expected: dict[str, Any], others: str) -> None:
    """Numbers as text, in columns by name."""
    assert found.keys() == expected.keys()
    if not others:
        assert found == expected
        return
    for name, texts in expected.items():
        new, old = (text if isinstance(text, list) else [text] for text in (found[name], texts))
        assert [text == "" for text in new] == [text == "" for text in old], name
        numbers = [np.array([float(text) for text in column if text]) for column in (new, old)]
        np.testing.assert_allclose(*numbers, rtol=1e-5, err_msg=f"{name} (not bit by bit: {others})")
