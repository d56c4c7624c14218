"""Keys that would change nothing beside the others of a command: who sets one believes that it does something.

A key is unheeded where it has another value than its default and what would read it is not asked for. Where a key of
the user's own turns that off, as ``inference.greedy=true`` does the temperature, nothing is refused. Standard library
and OmegaConf only: said before torch or NeMo is imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig

from nemo_minitron.config.layer_selection import LAYER_SELECTIONS
from nemo_minitron.config.schema import COMMANDS
from nemo_minitron.config.sections import Distill
from nemo_minitron.errors import MinitronError

HEEDED_BY = {"jsd_beta": "jsd", "top_k": "topk", "teacher_samples": "sampled_kl"}
"""Keys of ``distill`` that one of our losses heeds; a loss of a user's may heed any."""
_DEAF = ("forward_kl", "reverse_kl", *HEEDED_BY.values())


class Needs(NamedTuple):
    """Keys of a section that only something else reads.

    Attributes:
        keys: of the section, a dot between it and one below.
        holds: whether the command's config asks for what reads them.
        said: what they are of, and what is found in its place.
        silent: values that ask for nothing, beside the default.
    """

    keys: tuple[str, ...]
    holds: Callable[[DictConfig], bool]
    said: Callable[[DictConfig], str]
    silent: tuple[Any, ...] = ()


def _by_loss(cfg: DictConfig) -> bool:
    name = cfg.layer_selection  # another is refused where layers are chosen
    return cfg.group_selection == "loss" or bool(name in LAYER_SELECTIONS and LAYER_SELECTIONS[name].by_loss)


def _in_words(text: str) -> Callable[[DictConfig], str]:
    return lambda cfg: text


_SPEED = ("batch_size", "prefill_tokens", "decode_tokens", "repeats")
_TASKS = tuple(f"lm_eval.{name}" for name in ("include_path", "num_fewshot", "limit", "batch_size", "log_samples"))
_WIDTHS = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
_LAYER_TOKENS = "a choice by loss, and layers and query groups are chosen by scores"

NEEDS: dict[str, dict[str, list[Needs]]] = {
    "importance": {
        "calibration": [
            Needs(
                ("on_bad_record", "split_special_tokens"),
                lambda cfg: cfg.calibration.path is not None,
                _in_words("calibration.path, which is null: calibration.data_prefix holds tokens"),
            ),
            Needs(
                ("reconstruction_tokens", "own_samples"),
                lambda cfg: bool(cfg.calibration.reconstruction or cfg.importance.metrics),
                _in_words("calibration.reconstruction, which is false"),
                silent=(0,),
            ),
        ]
    },
    "prune": {
        "prune": [
            Needs(
                ("layer_selection",),
                lambda cfg: bool(cfg.prune.plan or cfg.prune.num_layers is not None),
                _in_words("prune.num_layers, which is null"),
            ),
            Needs(
                ("layer_selection",),
                lambda cfg: bool(cfg.prune.plan or not cfg.prune.drop_layers),
                _in_words("prune.num_layers alone, and prune.drop_layers names the layers"),
            ),
            Needs(
                ("beam_width",),
                lambda cfg: cfg.prune.layer_selection == "beam",
                lambda cfg: f"prune.layer_selection=beam, found {cfg.prune.layer_selection}",
            ),
            Needs(("layer_tokens",), lambda cfg: _by_loss(cfg.prune), _in_words(_LAYER_TOKENS)),
            Needs(
                ("group_selection",),
                lambda cfg: bool(cfg.prune.plan or cfg.prune.num_query_groups is not None),
                _in_words("prune.num_query_groups, which is null"),
            ),
            Needs(
                ("ranking",),
                lambda cfg: bool(cfg.prune.plan or any(cfg.prune[name] is not None for name in _WIDTHS)),
                _in_words(f"sizes that it ranks units of (prune.{', prune.'.join(_WIDTHS)}), and all of them are null"),
            ),
            Needs(
                ("num_calib_size", "calib_seq_length", "calib_stream"),
                lambda cfg: cfg.prune.calib_dataset is not None,
                _in_words("prune.calib_dataset, which is null"),
            ),
        ]
    },
    "search": {
        "search": [Needs(("layer_tokens",), lambda cfg: _by_loss(cfg.search), _in_words(_LAYER_TOKENS))],
    },
    "evaluate": {
        "evaluate": [
            Needs(
                ("num_samples", "micro_batch_size"),
                lambda cfg: bool(cfg.evaluate.perplexity),
                _in_words("evaluate.perplexity, which is false"),
            ),
            Needs(
                ("seq_length", "energy"),
                lambda cfg: bool(cfg.evaluate.perplexity or cfg.evaluate.throughput),
                _in_words("evaluate.perplexity and evaluate.throughput, which are false"),
            ),
            Needs(
                _SPEED,
                lambda cfg: bool(cfg.evaluate.throughput),
                _in_words(
                    "evaluate.throughput, which is false (evaluate.micro_batch_size is of the loss, "
                    "evaluate.lm_eval.batch_size of tasks)"
                ),
            ),
            Needs(
                _TASKS,
                lambda cfg: bool(cfg.evaluate.lm_eval.tasks),
                _in_words("evaluate.lm_eval.tasks, which are none"),
            ),
        ]
    },
    "generate": {
        "inference": [
            Needs(
                ("add_BOS",),
                lambda cfg: not cfg.chat,
                _in_words("a text, and chat=true has the form of the chat template"),
            ),
        ],
        "": [
            Needs(("batch_size",), lambda cfg: cfg.prompts is not None, _in_words("prompts, of which there are none"))
        ],
    },
}
"""Rules by command and section; "" for keys of the command itself."""


def refuse_unheeded(command: str, cfg: DictConfig) -> None:
    """Refuse the first key of a composed config that would change nothing.

    Raises:
        MinitronError: naming it, its value, and what it is of.
    """
    for section, needs in NEEDS.get(command, {}).items():
        for one in needs:
            if one.holds(cfg):
                continue
            for key, value, default in _values(command, cfg, section, one.keys):
                if value != default and value not in one.silent:
                    raise MinitronError(f"{key}={value}: of {one.said(cfg)}")
    if "distill" in cfg:
        _refuse_of_other_losses(cfg.distill)


def _values(command: str, cfg: DictConfig, section: str, keys: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    """Full name, value and default of each key."""
    for name in keys:
        key = f"{section}.{name}" if section else name
        value, default = cfg, COMMANDS[command]
        for part in key.split("."):
            value, default = value[part], _default(default, part)
        yield key, value, default


def _default(cls: Any, name: str) -> Any:
    """Default of a field of a dataclass; the class itself of a section."""
    item = next(item for item in dataclasses.fields(cls) if item.name == name)
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory


def _refuse_of_other_losses(distill: Mapping[str, Any] | DictConfig) -> None:
    for name, loss in HEEDED_BY.items():
        if distill[name] != getattr(Distill, name) and distill["loss"] in _DEAF and distill["loss"] != loss:
            raise MinitronError(
                f"distill.{name}={distill[name]}: of distill.loss={loss} alone, found {distill['loss']}"
            )
    for name in ("hidden_loss", "hidden_weight"):
        if distill[name] != getattr(Distill, name) and not distill["hidden_pairs"]:
            raise MinitronError(f"distill.{name}={distill[name]}: of distill.hidden_pairs, which are none")
