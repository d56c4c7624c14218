"""Help: narrow enough for a terminal, with examples that compose, and keys found by their last name."""

from __future__ import annotations

import shlex

import pytest

from nemo_minitron import cli
from nemo_minitron.config.compose import compose
from nemo_minitron.config.examples import EXAMPLES
from nemo_minitron.config.help_text import command_help, named, overview, settings
from nemo_minitron.config.keys import tree_of
from nemo_minitron.config.schema import COMMANDS, key_called

COMMAND_NAMES = list(COMMANDS)


@pytest.mark.parametrize("command", COMMAND_NAMES)
@pytest.mark.parametrize("cluster", [False, True])
def test_lines_fit_into_100_columns(command, cluster):
    wide = [line for line in command_help(command, cluster).splitlines() if len(line) > 100]
    assert [line for line in wide if "${multiply:" not in line] == []  # one word of YAML
    assert all(len(line) <= 100 for line in overview().splitlines())


@pytest.mark.parametrize("command", COMMAND_NAMES)
def test_examples_are_there_and_compose(command):
    assert EXAMPLES[command]
    for example in EXAMPLES[command]:
        program, named_command, *words = shlex.split(example)
        assert (program, named_command) == ("minitron", command)
        compose(command, words)


def test_a_folded_example_is_what_a_shell_takes():
    shown = command_help("distill").partition("examples:\n")[2].partition("\n\n")[0]
    assert shlex.split(shown.replace("\\\n", " ")) == shlex.split(EXAMPLES["distill"][0])


def test_cluster_keys_are_shown_when_asked_for(capsys):
    for command in COMMANDS:
        assert cli.main([command, "--help"]) == 0
        assert "cluster.partition" not in capsys.readouterr().out
        assert cli.main([command, "--help-cluster"]) == 0
        assert "cluster.partition" in capsys.readouterr().out


def test_help_is_a_command(capsys):
    assert cli.main(["help"]) == 0
    assert capsys.readouterr().out == overview()
    assert cli.main(["help", "run"]) == 0
    assert capsys.readouterr().out == command_help("run")


def test_run_lists_recipes_and_their_settings():
    text = command_help("run")
    assert "smollm2_135m" in dict(named("recipe")) and dict(named("prune"))["minitron_4b_width"].startswith("Llama-3.1")
    assert all(name in text for name, _ in named("recipe"))
    assert any(line.strip().startswith("global_batch_size:") for line in settings()) and "global_batch_size: 4" in text


@pytest.mark.parametrize(
    ("name", "command", "key"),
    [
        ("ffn_hidden_size", "prune", "prune.ffn_hidden_size"),
        ("ffn_hidden_size", "finetune", "model.ffn_hidden_size"),
        ("num_samples", "importance", "calibration.num_samples"),
        ("lr", "distill", "model.optim.lr"),
        ("nothing_like_it", "prune", None),
    ],
)
def test_a_key_by_its_last_name(name, command, key):
    assert key_called(name, tree_of(COMMANDS[command])) == key


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune", "--ffn_hidden_size", "9216"], "without dashes: prune.ffn_hidden_size=9216"),
        (["prune", "--ffn-hidden-size=9216"], "without dashes: prune.ffn_hidden_size=9216"),
        (["--num_samples", "3"], "without dashes: calibration.num_samples=3"),
        (["prune", "--hlep"], "Did you mean '--help'?"),
        (["run", "tiny"], "Did you mean 'recipe=tiny'?"),
        (["prune", "minitron_4b_width"], "Did you mean 'prune=minitron_4b_width'?"),
        (["prune", "ffn_hidden_size=9216"], "Did you mean 'prune.ffn_hidden_size'?"),
        (["distill", "lr=1"], "Did you mean 'model.optim.lr'?"),
        (["prune", "export.save_path=a=b"], """as plain text it is 'export.save_path="a=b"'"""),
        (["prune", "export.save_path=a(1)"], """as plain text it is 'export.save_path="a(1)"'"""),
        (["prune", "export.save_path=ü"], """as plain text it is 'export.save_path="ü"'"""),
    ],
)
def test_hints(words, said, capsys):
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err
