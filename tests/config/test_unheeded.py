"""Keys that would change nothing beside the others: refused by name before anything is read, and else taken."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_minitron.config.compose import compose
from nemo_minitron.config.schema import COMMANDS
from nemo_minitron.config.unheeded import NEEDS
from nemo_minitron.errors import MinitronError

MODEL = "model.restore_from_path=a.nemo"
BASE = {
    "importance": [MODEL, "output_path=o", "calibration.data_prefix=d"],
    "prune": [MODEL, "export.save_path=o"],
    "search": [MODEL, "scores=s", "output_path=o", "budget.num_parameters=9"],
    "evaluate": [MODEL, "output_path=o"],
    "generate": [MODEL],
}
RULES = [
    ("importance", "", "calibration.on_bad_record=skip", ["~calibration.data_prefix", "calibration.path=t.txt"]),
    ("importance", "", "calibration.split_special_tokens=true", ["~calibration.data_prefix", "calibration.path=t.txt"]),
    ("importance", "calibration.reconstruction=false", "calibration.own_samples=2", ["importance.metrics=[taylor]"]),
    ("importance", "calibration.reconstruction=false", "calibration.reconstruction_tokens=9",
     ["calibration.reconstruction=true"]),
    ("prune", "prune.hidden_size=8", "prune.layer_selection=greedy", ["prune.num_layers=2"]),
    ("prune", "prune.drop_layers=[1]", "prune.layer_selection=contiguous",
     ["prune.num_layers=2", "prune.drop_layers=[]"]),
    ("prune", "prune.num_layers=2", "prune.beam_width=2", ["prune.layer_selection=beam"]),
    ("prune", "prune.num_layers=2", "prune.layer_tokens=64", ["prune.layer_selection=greedy"]),
    ("prune", "prune.num_query_groups=2", "prune.layer_tokens=64", ["prune.group_selection=loss"]),
    ("prune", "prune.hidden_size=8", "prune.group_selection=loss", ["prune.num_query_groups=2"]),
    ("prune", "prune.num_layers=2", "prune.ranking=minitron", ["prune.ffn_hidden_size=8"]),
    ("prune", "prune.num_layers=2", "prune.num_calib_size=8", ["prune.calib_dataset=d"]),
    ("prune", "prune.num_layers=2", "prune.calib_seq_length=8", ["prune.calib_dataset=d"]),
    ("prune", "prune.num_layers=2", "prune.calib_stream=true", ["prune.calib_dataset=d"]),
    ("search", "", "search.layer_tokens=64", ["search.group_selection=loss"]),
    ("search", "", "search.layer_tokens=64", ["search.layer_selection=greedy"]),
    ("evaluate", "evaluate.perplexity=false", "evaluate.num_samples=8", ["evaluate.perplexity=true"]),
    ("evaluate", "evaluate.perplexity=false", "evaluate.micro_batch_size=8", ["evaluate.perplexity=true"]),
    ("evaluate", "evaluate.perplexity=false", "evaluate.seq_length=8", ["evaluate.throughput=true"]),
    ("evaluate", "evaluate.perplexity=false", "evaluate.energy=true", ["evaluate.throughput=true"]),
    ("evaluate", "", "evaluate.batch_size=8", ["evaluate.throughput=true"]),
    ("evaluate", "", "evaluate.prefill_tokens=8", ["evaluate.throughput=true"]),
    ("evaluate", "", "evaluate.decode_tokens=8", ["evaluate.throughput=true"]),
    ("evaluate", "", "evaluate.repeats=8", ["evaluate.throughput=true"]),
    ("evaluate", "", "evaluate.lm_eval.include_path=d", ["evaluate.lm_eval.tasks=[t]"]),
    ("evaluate", "", "evaluate.lm_eval.num_fewshot=0", ["evaluate.lm_eval.tasks=[t]"]),
    ("evaluate", "", "evaluate.lm_eval.limit=8", ["evaluate.lm_eval.tasks=[t]"]),
    ("evaluate", "", "evaluate.lm_eval.batch_size=8", ["evaluate.lm_eval.tasks=[t]"]),
    ("evaluate", "", "evaluate.lm_eval.log_samples=true", ["evaluate.lm_eval.tasks=[t]"]),
    ("generate", "prompt=a", "batch_size=2", ["~prompt", "prompts=[a]"]),
    ("generate", "chat=true", "inference.add_BOS=false", ["chat=false", "prompt=a"]),
]  # fmt: skip
"""Command, what it is asked for, the key that does nothing then, and what it does something beside."""


@pytest.mark.parametrize(("command", "asked", "word", "heeded"), RULES)
def test_a_key_without_effect_is_refused(command, asked, word, heeded):
    words = [*BASE[command], *filter(None, [asked]), word]
    key = word.partition("=")[0]
    with pytest.raises(MinitronError, match=rf"^{key.replace('.', '[.]')}=\S+: of "):
        compose(command, words)
    compose(command, [*words, *heeded])


def test_every_rule_is_tried_and_names_keys_that_there_are():
    ruled = {
        (command, f"{section}.{name}".lstrip("."))
        for command, sections in NEEDS.items()
        for section, needs in sections.items()
        for one in needs
        for name in one.keys
    }
    assert ruled == {(command, word.partition("=")[0]) for command, _, word, _ in RULES}
    for command, key in ruled:
        cls = COMMANDS[command]
        for part in key.split("."):
            item = next(item for item in dataclasses.fields(cls) if item.name == part)
            cls = item.default_factory


def test_a_key_at_its_default_says_nothing():
    compose("evaluate", [*BASE["evaluate"], "evaluate.batch_size=1", "evaluate.lm_eval.num_fewshot=null"])
    compose("importance", [*BASE["importance"], "calibration.reconstruction=false", "calibration.own_samples=0"])
    compose("generate", [*BASE["generate"], "prompt=a", "inference.greedy=true", "inference.top_k=3"])
    compose("evaluate", [*BASE["evaluate"], "evaluate.data_prefix=d", "evaluate.perplexity=false"])
    with pytest.raises(MinitronError, match=r"^prune\.beam_width=2: of prune\.layer_selection=beam, found greedy"):
        compose("prune", [*BASE["prune"], "prune.num_layers=2", "prune.layer_selection=greedy", "prune.beam_width=2"])
