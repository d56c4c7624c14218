"""Calls that do not train: one for each other stage, and for a recipe."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import overload

from nemo_minitron.api.arguments import Text, beside, data, machine
from nemo_minitron.api.process import Settings, call
from nemo_minitron.api.results import Checkpoint, Evaluation, PathLike, Run, Scores, Student, Tokens
from nemo_minitron.config.words import word
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import write_file


def synthesize(
    output: PathLike,
    model: str = "tiny",
    *,
    seed: int | None = None,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Checkpoint:
    """Write a random Llama with a tokenizer, to try things on.

    Args:
        output: HF folder.
        model: name of a shape, as ``minitron synthesize`` knows it (``tiny``, ``smollm2_135m``, …); ``settings`` change
            its sizes: ``{"model.num_layers": 2}``.
        seed: of the weights.
    """
    words = [word("model", model), *(word(key, value) for key, value in (settings or {}).items())]  # of that shape
    call("synthesize", {"output_path": output, "seed": seed}, words=words, verbose=verbose)
    return Checkpoint(Path(output))


def convert(
    source: PathLike,
    output: PathLike,
    *,
    format: str | None = None,
    precision: str | None = None,
    verify: bool = False,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Checkpoint:
    """Write a checkpoint of one format as another, one tensor at a time.

    Args:
        source: HF folder, GGUF, ``.nemo`` or Megatron folder; or ``ORG/NAME`` on the hub.
        output: ``.nemo`` or ``.gguf`` file, or a folder.
        format: of a folder: ``hf``, ``bridge``, ``megatron`` or ``nemo2``; HF when None.
        precision: ``32``, ``bf16`` or ``16``; the source's own when None.
        verify: read the result again and compare every tensor.

    Returns:
        The result; :attr:`Checkpoint.shape` reads that of a ``.nemo``.
    """
    config = {"input_name_or_path": source, "output_path": output, "format": format, "precision": precision}
    call("convert", {**config, "verify": verify}, settings, verbose=verbose)
    return Checkpoint(Path(output))


def preprocess(
    source: PathLike,
    output_prefix: PathLike,
    *,
    tokenizer: PathLike,
    json_key: str = "text",
    heldout_every: int | None = None,
    heldout_part: str | None = None,
    workers: int | None = None,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Tokens:
    """Make token files of a text.

    Args:
        source: jsonl, csv, txt, parquet, a folder, or a data set: ``wikitext``, ``pydoc_topics`` (comes with Python).
        output_prefix: of the files; the name of the record's field is added to it.
        tokenizer: ``.nemo`` that holds one, an HF folder, or a name on the hub.
        json_key: field of a record that holds text, or messages of a conversation.
        heldout_every: hold every n-th document out; ``heldout_part`` says which side is written, ``heldout`` or, when
            None, the rest.
    """
    config = {
        "input": source,
        "output_prefix": output_prefix,
        "tokenizer.type": tokenizer,
        "json_keys": [json_key],
        "heldout_every": heldout_every,
        "heldout_part": heldout_part,
        "workers": workers,
    }
    call("preprocess", config, settings, verbose=verbose)
    return Tokens(Path(f"{Path(output_prefix)}_{json_key}_document"))


def importance(
    model: PathLike,
    text: Text,
    output: PathLike | None = None,
    *,
    num_samples: int | None = None,
    seq_length: int | None = None,
    micro_batch_size: int | None = None,
    devices: int | str | None = None,
    precision: int | str | None = None,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Scores:
    """Score neurons, heads, query groups, channels and layers on calibration text.

    Args:
        model: ``.nemo`` file. text: token files.
        output: scores folder, ``NAME.scores`` beside the model when None.
        num_samples: blocks that are drawn. seq_length: tokens of each; the model's own length when None.
    """
    output = beside(model, "scores", "") if output is None else Path(output)
    config = {
        "model.restore_from_path": model,
        "output_path": output,
        "calibration.data_prefix": data(text),
        "calibration.num_samples": num_samples,
        "calibration.seq_length": seq_length,
        "calibration.micro_batch_size": micro_batch_size,
    }
    call("importance", config | machine(devices, precision), settings, verbose=verbose)
    return Scores(output)


def prune(
    model: PathLike,
    output: PathLike | None = None,
    *,
    hidden_size: int | None = None,
    ffn_hidden_size: int | None = None,
    num_attention_heads: int | None = None,
    num_query_groups: int | None = None,
    num_layers: int | None = None,
    drop_layers: Sequence[int] | None = None,
    scores: PathLike | None = None,
    plan: PathLike | None = None,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Student:
    """Make a smaller student; the weights that are kept are re-solved on the calibration tokens of the scores.

    Args:
        model: ``.nemo`` of the teacher.
        output: ``.nemo`` of the student, ``NAME.pruned.nemo`` when None; its plan is written beside it.
        hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, num_layers: sizes to keep; None keeps all.
        drop_layers: layers to remove, counted from 1.
        scores: as :func:`importance` returns them; not needed where only ``drop_layers`` is given.
        plan: apply this plan instead of making one.
    """
    output = beside(model, "pruned") if output is None else Path(output)
    plan_path = beside(output, "plan", ".yaml")
    config = {
        "model.restore_from_path": model,
        "export.save_path": output,
        "export.plan_path": plan_path,
        "prune.hidden_size": hidden_size,
        "prune.ffn_hidden_size": ffn_hidden_size,
        "prune.num_attention_heads": num_attention_heads,
        "prune.num_query_groups": num_query_groups,
        "prune.num_layers": num_layers,
        "prune.drop_layers": None if drop_layers is None else list(drop_layers),
        "prune.scores": scores,
        "prune.plan": plan,
    }
    call("prune", config, settings, verbose=verbose)
    return Student(output, plan_path)


def evaluate(
    model: PathLike,
    text: PathLike | None = None,
    output: PathLike | None = None,
    *,
    tasks: Sequence[str] = (),
    seq_length: int | None = None,
    micro_batch_size: int | None = None,
    devices: int | str | None = None,
    precision: int | str | None = None,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Evaluation:
    """Measure a model: loss and speed on text, and tasks of lm-evaluation-harness.

    Args:
        model: ``.nemo`` file; for tasks alone an HF folder does as well.
        text: token files that it was not trained on; None measures tasks alone.
        output: JSON file to keep; None keeps none.
        tasks: names of tasks.
    """
    config = {
        "model.restore_from_path": model,
        "evaluate.data_prefix": text,
        "evaluate.perplexity": text is not None,
        "evaluate.lm_eval.tasks": list(tasks),
        "evaluate.seq_length": seq_length,
        "evaluate.micro_batch_size": micro_batch_size,
    } | machine(devices, precision)
    with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
        path = Path(folder) / "evaluation.json" if output is None else Path(output)
        call("evaluate", config | {"output_path": path}, settings, verbose=verbose)
        return Evaluation.read(path)


@overload
def generate(
    model: PathLike,
    prompt: str,
    *,
    tokens_to_generate: int | None = None,
    greedy: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    precision: int | str | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    settings: Settings | None = None,
    verbose: bool = False,
) -> str: ...
@overload
def generate(
    model: PathLike,
    prompt: list[str],
    *,
    tokens_to_generate: int | None = None,
    greedy: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    precision: int | str | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    settings: Settings | None = None,
    verbose: bool = False,
) -> list[str]: ...
def generate(
    model: PathLike,
    prompt: str | list[str],
    *,
    tokens_to_generate: int | None = None,
    greedy: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    precision: int | str | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    settings: Settings | None = None,
    verbose: bool = False,
) -> str | list[str]:
    """Go on with a prompt, or with each of several.

    Args:
        model: ``.nemo`` file, HF folder or GGUF.
        prompt: a text, or a list of texts.
        tokens_to_generate: most tokens of the answer.
        greedy: take the likeliest token each time; else tokens are drawn: from the softmax at ``temperature``, of the
            ``top_k`` likeliest tokens, and of those that together have the probability ``top_p``.
        precision: what is computed in, 32 or ``bf16``. seed: of the drawing.
        batch_size: prompts that are answered at once.
        verbose: show the text as it is made.

    Returns:
        The answer, without the prompt; of a list of prompts a list, in their order.
    """
    config = {
        "model.restore_from_path": model,
        "inference.tokens_to_generate": tokens_to_generate,
        "inference.greedy": greedy,
        "inference.temperature": temperature,
        "inference.top_p": top_p,
        "inference.top_k": top_k,
        "precision": None if precision is None else str(precision),
        "seed": seed,
        "batch_size": batch_size,
    }
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not texts:
        raise MinitronError("prompt: expected a text or a list of texts, found an empty list")
    with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
        asked, path = Path(folder) / "prompts.jsonl", Path(folder) / "answers.jsonl"
        lines = [
            json.dumps({"text": text}) + "\n" for text in texts
        ]  # any text, which as a key's value ``${…}`` is not
        write_file(asked, "".join(lines))
        call("generate", config | {"prompts": asked, "output_path": path}, settings, verbose=verbose)
        answers = [str(json.loads(line)["answer"]) for line in path.read_text().split("\n") if line]
    return answers[0] if isinstance(prompt, str) else answers


def run(
    recipe: PathLike,
    folder: PathLike | None = None,
    *,
    stages: Sequence[str] | None = None,
    force: bool = False,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Run:
    """Walk a recipe, skipping the stages that are done and unchanged.

    Args:
        recipe: its name, as ``minitron run`` knows it (``tiny``, ``smollm2_135m``, …), or a YAML file.
        folder: of the run; ``runs/NAME`` when None.
        stages: run only these. force: run stages even if they are done.
        settings: the recipe's own, by name: ``{"max_steps": 100}``; a dotted key is one of the command's.
    """
    name = str(recipe)
    folder = Path("runs", Path(name).stem) if folder is None else Path(folder)
    chosen = {key if "." in key else f"recipe.settings.{key}": value for key, value in (settings or {}).items()}
    words = [word("recipe", name), *(word(key, value) for key, value in chosen.items())]
    stages = None if stages is None else list(stages)
    call("run", {"run_dir": folder, "stages": stages, "force": force}, words=words, verbose=verbose)
    metrics = folder / "metrics.json"
    found = json.loads(metrics.read_text()) if metrics.is_file() else {}
    return Run(folder, {role: Evaluation(values) for role, values in found.items()})


def report(
    folder: PathLike,
    output: PathLike | None = None,
    *,
    settings: Settings | None = None,
    verbose: bool = False,
) -> Path:
    """Write a page for people on a run: what was removed, what that cost and what training won back.

    Args:
        folder: of the run, with what there is of ``evaluation/{teacher,pruned,distilled}.json``, a plan, ``scores`` and
            logs of trainings.
        output: HTML page, ``report.html`` in the folder when None; the same as Markdown is written beside it.

    Returns:
        The HTML page.
    """
    call("report", {"run_dir": folder, "output_path": output}, settings, verbose=verbose)
    return Path(folder, "report.html") if output is None else Path(output)
