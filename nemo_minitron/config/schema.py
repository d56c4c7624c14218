"""What every command takes: one dataclass per command, its keys typed, defaulted and explained in a line.

Imports nothing heavy: ``minitron COMMAND --help`` is made from here. Sections of our own (``prune``, ``distill``, …)
are dataclasses too (``sections``); ``model``, ``trainer`` and ``exp_manager`` are NeMo's, known by name
(``nemo_keys``), with their defaults in ``conf/COMMAND.yaml``. A default of ``???`` marks a key that must be given.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_minitron.config.keys import REQUIRED, SEED, key, known, section
from nemo_minitron.config.nemo_keys import EXP_MANAGER, INFERENCE, MODEL, S3_CHECKPOINTING, TRAINER, Tree
from nemo_minitron.config.sections import (
    DOCUMENTS,
    HELDOUT_PARTS,
    ON_BAD_RECORD,
    Budget,
    Calibration,
    Chat,
    Dataset,
    Distill,
    Evaluate,
    EvaluateData,
    Export,
    Importance,
    Inference,
    Prune,
    Search,
    Tokenizer,
)


def _extensions() -> Any:
    return key([], "Python files of yours with a model family, an importance metric or a distillation loss")


def _nemo() -> Any:
    return known(MODEL, "NeMo's model section; its architecture keys are checked against the checkpoint")


VOCAB = ("refuse", "grow")
CONVERT_FORMATS = ("nemo", "hf", "gguf", "bridge", "megatron", "nemo2")


@dataclass
class ConvertConfig:
    """A checkpoint of any format that is read to any that is written: HF folder, GGUF and .nemo, each way.

    Folders of NeMo 2, Megatron-Bridge and Megatron-LM (torch_dist) are read as well. The input's format is told from
    its files, the output's from its name or from format=.

    A .nemo holds config, weights and tokenizer in one file. Towards HF, config.json, generation_config.json, the
    tokenizer's files and safetensors shards are written; nothing else is needed to load them. One tensor is in memory
    at a time. bridge, megatron and nemo2 are the folders of Megatron-Bridge, Megatron-LM and NeMo 2.
    """

    input_name_or_path: str = key(REQUIRED, "checkpoint to read, or a name on the hub, ORG/NAME[@REVISION]")
    output_path: str = key(REQUIRED, ".nemo file, HF folder or .gguf file to write")
    format: str | None = key(
        None, "format to write; by the output's name when null, else HF of a .nemo and .nemo of others", CONVERT_FORMATS
    )
    precision: str | None = key(None, "dtype to write: 32, bf16 or 16; the input's own when null")
    quantization: str | None = key(None, "q8_0 for the matrices of a GGUF, instead of precision")
    make_vocab_size_divisible_by: int | None = key(None, "pad the vocabulary to a multiple; NeMo's rule when null")
    max_shard_size: str = key("5GB", "largest safetensors file of an HF folder")
    transformer_engine: bool = key(False, "for bridge, megatron and nemo2: the empty states its modules ask for, too")
    verify: Any = key(False, "true reads the result back and compares every tensor; logits compares transformers' too")
    vocab: str = key("refuse", "what a tokenizer with tokens beyond the table does: refuse, or grow the table", VOCAB)
    untie: bool = key(False, "use the output head that the file of a tied model has beside its table")
    tokenizer: Tokenizer = section(Tokenizer, "tokenizer for an input that carries none of its own")
    model: dict[str, Any] = known(MODEL, "shape of a Megatron checkpoint that says none; choose one with model=NAME")
    extensions: list[str] = _extensions()


@dataclass
class PreprocessConfig:
    """Text or conversations to token files (.bin/.idx) that Megatron and NeMo read.

    Writes PREFIX_KEY_document.bin and .idx, and a .json that tells which tokenizer made them, so that later commands
    can refuse tokens of another vocabulary. Where a key holds a list of messages, each with role and content, they are
    written in the form of the tokenizer's chat template, and PREFIX_KEY_mask.bin and .idx say which tokens the
    assistant says: finetune and distill learn from those alone.
    """

    input: str | None = key(
        None, "jsonl, csv, txt, parquet or arrow, a folder, an HF dataset, or pydoc_topics (built in)"
    )
    output_prefix: str = key(REQUIRED, "prefix of the files to write; PREFIX_KEY_document.bin and .idx")
    json_keys: list[str] = key(["text"], "fields that hold text, or messages; meta.text is text inside of meta")
    on_bad_record: str = key("stop", "what a record that cannot be read or tokenized does", ON_BAD_RECORD)
    tokenizer: Tokenizer = section(Tokenizer, "tokenizer to use")
    chat: Chat = section(Chat, "what is done with conversations")
    dataset: Dataset = section(Dataset, "which part of a data set")
    document: str = key("article", "what becomes one document", DOCUMENTS)
    append_eod: bool = key(True, "end every document with the end-of-text token")
    heldout_every: int | None = key(None, "hold every n-th document out")
    heldout_part: str = key("train", "which side of it to write", HELDOUT_PARTS)
    workers: int = key(1, "tokenizing processes")
    apply_ftfy: bool = key(False, "repair broken unicode first")


@dataclass
class SynthesizeConfig:
    """Random Llama of any shape, with a tokenizer, as an HF folder: for tests and dry runs."""

    output_path: str = key(REQUIRED, "HF folder to write")
    model: dict[str, Any] = known(MODEL, "shape of the model; choose one with model=NAME")
    precision: str = key("32", "dtype to write: 32, bf16 or 16")
    seed: int = key(SEED, "seed of the weights")


@dataclass
class FinetuneConfig:
    """Train a checkpoint on text by next-token prediction: teacher correction. The checkpoint decides the shape.

    Where the text to come differs from what the teacher was trained on, a short training on it first makes a better
    teacher (arXiv 2408.11796). The best model by validation loss is written to model.nemo_path, the last to
    NAME.last.nemo beside it; logs and checkpoints for resuming go to exp_manager's folder.
    """

    model: dict[str, Any] = _nemo()
    trainer: dict[str, Any] = known(TRAINER, "Lightning's Trainer arguments")
    exp_manager: dict[str, Any] = known(EXP_MANAGER, "NeMo's exp_manager: logging, checkpoints, resuming")
    seed: int = key(SEED, "seed of everything random")
    extensions: list[str] = _extensions()


@dataclass
class ImportanceConfig:
    """What each neuron, head, query group, channel and layer is worth, from forward passes on calibration data.

    Statistics of arXiv 2407.14679 and what compensated pruning needs, in a folder that `minitron prune` reads. It is
    the same from any number of processes.
    """

    model: dict[str, Any] = _nemo()
    output_path: str = key(REQUIRED, "scores folder to write")
    calibration: Calibration = section(Calibration, "calibration data")
    importance: Importance = section(Importance, "how it is measured")
    trainer: dict[str, Any] = known(TRAINER, "Lightning's Trainer arguments")
    extensions: list[str] = _extensions()


@dataclass
class SearchConfig:
    """Best shape for a budget, chosen by evidence: predicted from scores, measured zero-shot, distilled."""

    scores: str = key(REQUIRED, "scores folder of `minitron importance`")
    output_path: str = key(REQUIRED, "folder to write candidates.yaml, plans and students to; an earlier run resumes")
    budget: Budget = section(Budget, "what a student may cost; all that are given must hold")
    search: Search = section(Search, "space and stages")
    model: dict[str, Any] = known(MODEL, "restore_from_path, and for distillation what `distill` takes")
    evaluate: EvaluateData = section(EvaluateData, "held-out data that losses are measured on")
    distill: Distill = section(Distill, "the loss of the distillation")
    trainer: dict[str, Any] = known(TRAINER, "Lightning's Trainer arguments, of every stage")
    exp_manager: dict[str, Any] = known(EXP_MANAGER, "NeMo's exp_manager, of the distillations")
    seed: int = key(SEED, "seed of everything random")
    extensions: list[str] = _extensions()


@dataclass
class PruneConfig:
    """Make a smaller student from a teacher: a plan of what to keep, and the student .nemo.

    The plan, with the same scores and source, gives the same student again, bit for bit. Where prune.scores is null and
    the plan needs scores, they are computed first. Nothing but sizes need be given: `prune.ffn_hidden_size=9216`, or a
    target by name.
    """

    model: dict[str, Any] = _nemo()
    prune: Prune = section(Prune, "what to keep; choose a target with prune=NAME or by size")
    export: Export = section(Export, "what to write")
    trainer: dict[str, Any] = known(TRAINER, "Lightning's Trainer arguments, for computing scores")
    inference: dict[str, Any] = known(INFERENCE, "of NeMo's own pruning config; accepted and not used")
    seed: int = key(SEED, "seed of the calibration data")
    extensions: list[str] = _extensions()


@dataclass
class DistillConfig:
    """Train a student to follow a teacher's predictions.

    Both are .nemo files of one vocabulary. The best student by distill.monitor is written to model.nemo_path, the last
    to NAME.last.nemo beside it; logs and checkpoints for resuming go to exp_manager's folder.
    """

    model: dict[str, Any] = _nemo()
    plan_only: bool = key(
        False, "print memory per rank by item, what fits on GPUs of several sizes, and how long it takes; train nothing"
    )
    distill: Distill = section(Distill, "the loss")
    trainer: dict[str, Any] = known(TRAINER, "Lightning's Trainer arguments")
    exp_manager: dict[str, Any] = known(EXP_MANAGER, "NeMo's exp_manager: logging, checkpoints, resuming")
    seed: int = key(SEED, "seed of everything random")
    extensions: list[str] = _extensions()


@dataclass
class EvaluateConfig:
    """Loss, size, speed and energy of a model and its accuracy on lm-evaluation-harness tasks, as JSON.

    Of itself it writes val_loss (nats per token), perplexity, sizes, tokens, text and peak_memory_bytes. Sections
    `throughput`, `energy` and `lm_eval` are added where they are asked for. The harness (pip install
    'nemo_minitron[lm-eval]') runs in one process on the HF folder that `minitron convert` would make, or on one that
    model.restore_from_path names; a path of data in a task's YAML is from the folder where the command runs.
    """

    model: dict[str, Any] = _nemo()
    evaluate: Evaluate = section(Evaluate, "what to measure")
    output_path: str = key(REQUIRED, "JSON file to write")
    trainer: dict[str, Any] = known(TRAINER, "Lightning's Trainer arguments")
    seed: int = key(SEED, "seed of everything random")
    extensions: list[str] = _extensions()


ACCELERATORS = ("auto", "gpu", "cpu")
COMPUTED_IN = ("32", "bf16")


@dataclass
class GenerateConfig:
    """Talk to a model: it goes on with a prompt, answers a file of them, or chats in the terminal.

    One of prompt, prompts and chat is to be given. Text appears on stdout as it is made, that of several prompts as
    batch_size of them are answered, by transformers' own model with its key-value cache, in one process. A .nemo is
    first exported as `minitron convert` would, to a folder below TMPDIR that is removed again; an HF folder is read as
    it is. A chat takes a line of stdin at a time, up to the end or a line that says /quit, in the form of the
    tokenizer's chat template.
    """

    model: dict[str, Any] = known({"restore_from_path": None}, "the model to talk to")
    prompt: str | None = key(None, "text to go on with; taken as it is typed, commas and all", prose=True)
    prompts: Any = key(None, "file with a prompt per line, or .jsonl with text or messages; or a list of prompts")
    chat: bool = key(False, "talk with the model, a line each")
    system: str | None = key(None, "of chat: what the model is told first; the template's own when null", prose=True)
    output_path: str | None = key(None, "jsonl file to write prompts and answers to, at the end")
    batch_size: int = key(8, "prompts that are answered at once; fewer take less memory")
    inference: Inference = section(Inference, "how tokens are chosen, with NeMo's names")
    tokenizer: Tokenizer = section(Tokenizer, "tokenizer for a model that carries none of its own")
    precision: str | None = key(None, "what is computed in; bf16 on a GPU and 32 on a CPU when null", COMPUTED_IN)
    accelerator: str = key("auto", "where; auto is a GPU where there is one", ACCELERATORS)
    seed: int = key(SEED, "seed of the drawing, of which each prompt has its own by its number")
    extensions: list[str] = _extensions()


@dataclass
class ReportConfig:
    """One page on a run, for people: what was made smaller, by how much, what it cost; HTML and Markdown."""

    run_dir: str = key(REQUIRED, "folder of a run, as `minitron run` leaves it")
    output_path: str | None = key(None, "HTML page to write, its .md beside it; RUN_DIR/report.html when null")


@dataclass
class RunConfig:
    """Walk a whole recipe, skipping the stages that are done and unchanged.

    Every stage is one of the other commands. `recipe.settings.KEY=…` changes what several of them share,
    `recipe.stages.NAME.config.KEY=…` one of them. What each ran with is left in RUN_DIR/.stages, the comparison of
    teacher, pruned and distilled in RUN_DIR/metrics.json. `recipe=./FILE.yaml` is one of your own. With +cluster=slurm
    each stage that is to run becomes a job of its own, which waits for those whose outputs it reads.
    """

    recipe: Any = key(REQUIRED, "name of a recipe (conf/recipe/NAME.yaml); recipe.settings.KEY=… changes one")
    run_dir: str = key("runs/${recipe.name}", "folder of the run")
    stages: list[str] | None = key(None, "run only these stages")
    force: bool = key(False, "run stages even if they are done and unchanged")
    extensions: list[str] = _extensions()


@dataclass
class DoctorConfig:
    """Say whether the commands work on this machine, and what each absence costs.

    Each line begins with ok, note or problem. A note costs something; a problem stops every command, and the exit
    status is then 2. Nothing is sent anywhere.
    """

    output_path: str | None = key(
        None, "JSON file to write the same to, for a bug report; it has no paths or user names"
    )


COMMANDS: dict[str, type] = {
    "convert": ConvertConfig,
    "preprocess": PreprocessConfig,
    "synthesize": SynthesizeConfig,
    "finetune": FinetuneConfig,
    "importance": ImportanceConfig,
    "search": SearchConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "report": ReportConfig,
    "run": RunConfig,
    "doctor": DoctorConfig,
}
"""Commands with their schemas, in the order of the journey; last the one that looks at the machine."""


COMPOSITE = ("search", "run")
"""Commands that run others: in one process themselves, the stages in as many as their configuration says."""

GROUPS = {"synthesize": "model", "prune": "prune", "run": "recipe"}
"""Command → the config group from which it takes a file by name: ``conf/GROUP/NAME.yaml``."""


STRAY: dict[str, Tree | None] = {"name": None, "run": None, "s3_checkpointing": S3_CHECKPOINTING}
"""Top-level names of NeMo's and the NeMo launcher's files that every command but ``run`` accepts and ignores."""


FOREIGN = ("model", "trainer", "exp_manager", "inference", *STRAY)
"""Sections of NeMo and Lightning; a hint names a key of ours before one of theirs."""


def key_called(name: str, tree: Tree) -> str | None:
    """The key of a command's ``tree`` that is ``name`` or ends in it, one of ours first; None where there is none."""
    found = [full for full in _paths(tree) if name in (full, full.rpartition(".")[2])]
    return min(found, key=lambda full: full.partition(".")[0] in FOREIGN, default=None)


def _paths(tree: Tree, prefix: str = "") -> Iterator[str]:
    for name, below in tree.items():
        yield prefix + name
        yield from _paths(below or {}, f"{prefix}{name}.")


def summary(command: str) -> str:
    """A command in a line."""
    return description(command).partition("\n")[0]


def description(command: str) -> str:
    """What a command does, for its help and its page in ``docs/commands``."""
    return inspect.cleandoc(COMMANDS[command].__doc__ or "")
