"""Figures for notebooks show the figures that they were given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib import pyplot
from matplotlib.figure import Figure

import nemo_minitron as nm
from nemo_minitron import plots
from nemo_minitron.api import Evaluation, SearchResult

LOG = """epoch,step,train_kd_loss,train_lm_loss,val_kd_loss,val_lm_loss,val_top1_agreement,tokens
0,0,2.0,4.0,,,,64
0,1,1.0,3.5,1.5,3.8,0.25,128
0,2,0.5,3.0,0.9,3.4,0.75,192
"""
CANDIDATES = [
    {"name": "a", "role": "searched", "zero_shot": 3.2, "distilled": [3.1, 3.0], "num_layers": 3, "hidden_size": 48},
    {"name": "b", "role": "given", "zero_shot": 3.3, "distilled": [3.25], "num_layers": 4, "hidden_size": 32},
    {"name": "c", "role": "validation", "zero_shot": 3.4, "num_layers": 2, "hidden_size": 64},
    {"name": "d", "role": "probe", "zero_shot": 3.1, "num_layers": 4, "hidden_size": 48},
    {"name": "e", "role": "searched", "num_layers": 2, "hidden_size": 64},
]


def evaluation(loss: float, parameters: int) -> Evaluation:
    return Evaluation({"val_loss": loss, "num_parameters": parameters})


def texts(figure: Figure) -> list[str]:
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda one: hasattr(one, "get_text")) if text.get_text()]


@pytest.fixture
def log(tmp_path) -> Path:
    folder = tmp_path / "student.logs" / "csv" / "version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(LOG)
    return tmp_path / "student.logs"


def bars(figure: Figure) -> list[tuple[float, float]]:
    """Foot and head of each bar."""
    return [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in figure.axes[0].patches]


def test_losses_end_at_their_values_on_an_axis_that_says_that_it_is_cut():
    figure = plots.losses({"depth, pruned": 3.1, "distilled": 2.9}, teacher=2.7)
    assert [head for _, head in bars(figure)] == pytest.approx([3.1, 2.9])
    (foot,) = {foot for foot, _ in bars(figure)}
    assert 0 < foot < 2.7 and figure.axes[0].get_ylim()[0] == foot
    said = texts(figure)
    assert {"3.100", "2.900", "teacher, 2.700", "nats per token (axis is cut)"} <= set(said)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["depth,\npruned", "distilled"]


def test_an_axis_that_begins_at_0_is_not_called_cut():
    for values in ({"a": 0.1, "b": 2.0}, {"a": 0.0}):
        figure = plots.losses(values)
        assert figure.axes[0].get_ylim()[0] == 0 and "nats per token" in texts(figure)
    figure = plots.losses({"a": -0.5, "b": 0.5})
    assert figure.axes[0].get_ylim()[0] < -0.5


def test_losses_that_are_equal_have_room():
    low, high = plots.losses({"a": 3.0, "b": 3.0}).axes[0].get_ylim()
    assert low < 3 < high


def test_parts_have_their_shares_of_the_whole():
    figure = plots.parts({"FFN": 750_000, "attention": 250_000})
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.75, 0.25]
    assert {"75.0%", "25.0%", "million", "parameters: 1,000,000"} <= set(texts(figure))
    assert [bar.get_width() for bar in plots.parts({"a": 30, "b": 0}).axes[0].patches] == [0.03, 0]


def test_training_draws_what_was_logged(log):
    figure = plots.training(log, held_out={"before": 4.1, "after": 3.3})
    kd, lm, agreement = figure.axes
    curves = {line.get_label(): np.array(line.get_data()) for line in kd.lines}
    np.testing.assert_allclose(curves["training"], [[64, 128, 192], [2, 1, 0.5]])
    np.testing.assert_allclose(curves["validation"], [[128, 192], [1.5, 0.9]])
    assert [line.get_label() for line in lm.lines] == ["training", "validation", "before, 4.100", "after, 3.300"]
    np.testing.assert_allclose(agreement.lines[0].get_ydata(), [25, 75])


def test_training_without_a_teacher_has_one_panel(log):
    rows = [line.split(",") for line in LOG.splitlines()]
    text = "\n".join(",".join([row[1], row[3], row[7]]) for row in rows)
    (log / "csv" / "version_0" / "metrics.csv").write_text(text + "\n")
    (axes,) = plots.training(log).axes
    assert [line.get_label() for line in axes.lines] == ["training"]


def test_no_log_is_said(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(nm.MinitronError, match="expected a folder with a training's log"):
            plots.training(folder)


def test_layers_mark_what_each_choice_removes():
    figure = plots.layers(np.array([0.4, 0.1, 0.2]), {"by loss": [2], "by influence": [2, 3]})
    assert [head for _, head in bars(figure)] == pytest.approx([0.4, 0.1, 0.2])
    marks = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(marks["by loss"].get_xdata()) == [2] and list(marks["by influence"].get_xdata()) == [2, 3]
    heights = {line.get_ydata()[0] for name, line in marks.items() if name.startswith("by")}
    assert len(heights) == 2 and max(heights) < 0
    assert plots.layers([0.4, 0.1], {}).axes[0].get_legend() is None


def test_ranked_scores_descend_and_show_the_cut():
    scores = np.array([[1.0, 3.0, 2.0], [30.0, 10.0, 20.0]])
    figure = plots.ranked({"neurons": (scores, 2), "channels": (np.array([5.0, 6.0]), None)})
    neurons, channels = figure.axes
    assert [list(line.get_ydata()) for line in neurons.lines[:2]] == [[3, 2, 1], [30, 20, 10]]
    assert list(neurons.lines[2].get_xdata()) == [2.5, 2.5] and neurons.get_yscale() == "log"
    assert [line.get_label() for line in neurons.lines] == ["first layer", "last layer", "2 are kept"]
    assert list(channels.lines[0].get_ydata()) == [6, 5] and channels.get_yscale() == "linear"


def test_models_are_points_joined_by_student():
    found = {"teacher": evaluation(2.5, 2_000_000)}
    found |= {"depth, pruned": evaluation(3.0, 1_000_000), "depth, distilled": evaluation(2.8, 1_000_000)}
    figure = plots.size_against_loss(found | {"width, distilled": evaluation(2.7, 1_500_000)})
    lines = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert [[1.0, 3.0], [1.0, 2.8]] in lines and [[2.0, 2.5]] in lines and [[1.5, 2.7]] in lines
    assert {"teacher 2.500", "depth, pruned 3.000", "parameters, million"} <= set(texts(figure))
    alone = plots.size_against_loss({"pruned": evaluation(3.0, 900), "distilled": evaluation(2.0, 900)})
    assert [[0.9, 3.0], [0.9, 2.0]] in [line.get_xydata().tolist() for line in alone.axes[0].lines]


def search(folder: Path, candidates: list[dict]) -> SearchResult:
    sizes = {"ffn_hidden_size": 128, "num_parameters": 2_000_000}
    content = {"source": {"loss": 2.5}, "winner": None, "candidates": [one | sizes for one in candidates]}
    (folder / "candidates.yaml").write_text(yaml.safe_dump(content))
    return SearchResult(folder)


def test_candidates_are_rows_best_first(tmp_path):
    figure = plots.candidates(search(tmp_path, CANDIDATES))
    before, after = (dots.get_offsets().tolist() for dots in figure.axes[0].collections)
    assert before == [[3.2, 0], [3.3, 1], [3.4, 2]] and after == [[3.0, 0], [3.25, 1]]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == "3 layers, hidden 48, ffn 128 (2 million, searched)" and len(labels) == 3
    few = plots.candidates(SearchResult(tmp_path), most=1)
    assert len(few.axes[0].get_yticklabels()) == 1


def test_candidates_that_were_not_measured_are_said(tmp_path):
    with pytest.raises(nm.MinitronError, match="candidates that were measured, found none"):
        plots.candidates(search(tmp_path, CANDIDATES[3:]))


def test_pyplot_keeps_no_figure_and_settings_stay(monkeypatch):
    before = pyplot.get_fignums(), dict(pyplot.rcParams)
    monkeypatch.setitem(pyplot.rcParams, "font.size", 17)
    figure = plots.parts({"a": 1})
    assert (pyplot.get_fignums(), pyplot.rcParams["font.size"]) == (before[0], 17)
    assert figure.axes[0].title.get_fontsize() == 10


def test_without_matplotlib_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from nemo_minitron import MinitronError, plots\n"
        "try: plots.parts({'a': 1})\n"
        "except MinitronError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "plots need matplotlib, which is not installed: pip install matplotlib\n"
