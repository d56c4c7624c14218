"""Completion, asked as bash asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nemo_minitron.config.completion import completions


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("minitron pr", ["preprocess ", "prune "]),
        ("minitron prune prune.ffn", ["prune.ffn_hidden_size="]),
        ("minitron prune prune=minitron_4b_d", ["minitron_4b_depth "]),
        ("minitron run recipe=smol", ["smollm2_135m "]),
        ("minitron prune prune.layer_selection=gr", ["greedy "]),
        ("minitron prune prune.compensate=t", ["true "]),
        ("minitron prune export.save_path=", []),
        ("minitron help pru", ["prune "]),
        ("minitron --vers", ["--version"]),
        ("minitron nothing x", []),
    ],
)
def test_what_a_word_may_become(line, found):
    assert completions({"COMP_LINE": line, "COMP_POINT": str(len(line))}) == found


def test_only_what_stands_before_the_cursor_counts():
    assert completions({"COMP_LINE": "minitron pru recipe=tiny", "COMP_POINT": "12"}) == ["prune "]


def test_the_program_answers_the_shell():
    environment = os.environ | {"COMP_LINE": "minitron conv", "COMP_POINT": "13"}
    argv = [sys.executable, "-m", "nemo_minitron", "--complete", "minitron", "conv", "minitron"]
    result = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "convert \n", "")
