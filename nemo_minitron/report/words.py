"""A run in plain English, for someone who has to decide and has never pruned a model."""

from __future__ import annotations

import numpy as np

from nemo_minitron.config.layer_selection import LAYER_SELECTIONS
from nemo_minitron.prune.measured import KINDS
from nemo_minitron.prune.plan import Plan, format_ranges
from nemo_minitron.report.measures import gap_closed, measured_alike, size, unlike
from nemo_minitron.report.removal import Axis, dropped_layers
from nemo_minitron.report.run_folder import Run

GLOSSARY = {
    "Parameter": "One of the numbers that a model consists of. Fewer of them need less memory and less computing.",
    "Token": "A piece of text, about three quarters of an English word. Models read and write tokens.",
    "Loss": "How surprised the model is by the next token of a text, on average, in nats; lower is better. It is "
    "measured on text that was held out: neither trained nor calibrated on.",
    "Perplexity": "The loss said another way, e to its power: among how many equally likely tokens the model would "
    "be choosing. Lower is better; 1 would be certainty.",
    "Teacher, pruned, distilled": "The original model; what is left of it once parts are removed; and that remainder "
    "after it was trained to predict what the teacher predicts.",
    "Layer": "The model is a stack of layers of one shape, each of which has an attention part and an FFN part.",
    "Hidden size": "Channels of the stream of numbers that runs through all layers (the residual stream).",
    "FFN size": "Neurons in the FFN (feed-forward) part of a layer.",
    "Heads and query groups": "The units of attention, which looks back at earlier text. Heads of one query group "
    "share what they remember of it, the KV cache.",
    "Importance": "A score of how much a unit does on sample text (the calibration text).",
    "Block Influence": "How much a layer changes the stream that passes through it: 0 changes nothing.",
    "Re-solving (compensation)": "Adjusting the weights that stay, by a formula and without training, to make up for "
    "those that go.",
    "KD loss": "How far the smaller model's predictions are from the teacher's (Kullback-Leibler divergence); 0 is "
    "the same. KD is knowledge distillation.",
    "LM loss": "The loss above, of the plain task: the language model predicting the next token.",
}
_TITLES = {
    "hidden": "hidden channels",
    "ffn": "FFN neurons",
    "heads": "attention heads",
    "groups": "query groups",
}
_RANKED = {
    "minitron": "The plan keeps the units of most importance.",
    "reconstruction": "The plan ranks units by what would be lost after the best re-solving instead: others can stand "
    "in for some large ones, and for some small ones none can.",
    "taylor": "The plan ranks units by how much the loss would change without their weights instead, estimated from "
    "the loss's gradient.",
    None: "The plan does not say by what it ranks units.",
}
"""Words for the ranking by which a plan chose, where it is known; see :class:`nemo_minitron.report.removal.Axis`."""


_SELECTED: dict[str | None, str] = {
    "drop_layers": "they were named",
    **{name: "they were chosen by the loss without them" for name, how in LAYER_SELECTIONS.items() if how.by_loss},
    "contiguous": "they are one block, whose output is nearest to its input",
    None: "they were named, or chosen in another way",
}
"""Words for the plan's choice of layers (:attr:`nemo_minitron.prune.plan.Plan.selection`)."""


def title(axis: Axis) -> str:
    name = _TITLES[axis.name]
    return name[0].upper() + name[1:]


def headline(run: Run) -> list[str]:
    """What was made smaller, by how much, and what it cost in quality: a sentence or two for each."""
    before, after = parameters(run)
    sentences = []
    if before and after:
        share = 1 - after / before
        sentences.append(
            f"The model was made {share:.1%} smaller: from {size(before)} to {size(after)} parameters, "
            "the numbers that a model consists of."
        )
    teacher, pruned, distilled = (run.metrics.get(role) for role in ("teacher", "pruned", "distilled"))
    student, name = (distilled, "distilled") if distilled else (pruned, "pruned")
    if not measured_alike(run.metrics):
        sentences.append(f"{unlike(run.metrics)}.")
    elif teacher and student:
        more = student["val_loss"] - teacher["val_loss"]
        sentences.append(
            f"On text that was held out, its loss (average surprise at the next piece of text; lower is better) went "
            f"from {teacher['val_loss']:.3f} to {student['val_loss']:.3f} nats per token, a change of {more:+.3f}. "
            f"In other words: where the original chooses among {teacher['perplexity']:,.1f} equally likely "
            f"continuations, the smaller model chooses among {student['perplexity']:,.1f}."
        )
        if name == "pruned":
            sentences.append("This is before any training of the smaller model, or its evaluation is missing.")
    closed = gap_closed(run.metrics)
    if closed is not None and teacher and pruned and distilled:
        trained = run.distillation.tokens if run.distillation else None
        on = f" on {trained:,} tokens" if trained else ""
        cost = pruned["val_loss"] - teacher["val_loss"]
        effect = f"won back {closed:.1%} of that" if closed >= 0 else f"lost another {-closed:.1%} of that"
        sentences.append(f"Removing parts alone cost {cost:.3f}; learning from the original{on} {effect}.")
    sentences += _costs(teacher, student)
    if not sentences:
        sentences.append("This folder holds neither evaluations nor a plan: what was made smaller cannot be said.")
    return sentences


def _costs(teacher: dict[str, float] | None, student: dict[str, float] | None) -> list[str]:
    """Memory, of the machine that the models were evaluated on."""
    if not (teacher and student and "peak_memory_bytes" in teacher and "peak_memory_bytes" in student):
        return []
    old, new = (model["peak_memory_bytes"] / 2**30 for model in (teacher, student))
    return [f"When measured, its process took {new:.2f} GiB of memory at most, the original's {old:.2f}."]


def parameters(run: Run) -> tuple[float | None, float | None]:
    """Parameters of the model before and after, by the plan or else by the evaluations."""
    if run.plan is not None:
        return run.plan.source.num_parameters(), run.plan.target.num_parameters()
    student = run.metrics.get("distilled") or run.metrics.get("pruned") or {}
    return run.metrics.get("teacher", {}).get("num_parameters"), student.get("num_parameters")


def removal(run: Run, axes: list[Axis]) -> list[str]:
    """What went, in words."""
    if run.plan is None:
        return []
    sentences = []
    dropped = dropped_layers(run.plan)
    if dropped:
        numbers = format_ranges(layer + 1 for layer in dropped)
        sentences.append(
            f"{len(dropped)} of {run.plan.source.num_layers} layers were removed whole (counted from 1): {numbers}."
        )
    for axis in axes:
        if axis.is_cut:
            where = "" if axis.name == "hidden" else " in every layer that stays"
            sentences.append(f"{title(axis)}: {axis.after:,} of {axis.before:,} stay{where}.")
    if not any(axis.is_cut for axis in axes):
        sentences.append("Within the layers nothing was removed.")
    return sentences


def compensation(plan: Plan | None) -> list[str]:
    """Whether kept weights were re-solved, as the plan says."""
    if plan is None:
        return ["Without a plan this is not known."]
    solved = plan.compensation
    if solved is None:
        cut = "No: the weights that stay are the teacher's own, cut out as they are."
        tried = ["Adjusted ones were tried, and lost more on text that was held back from the adjusting."]
        return [cut, *(tried if plan.measured else []), *_measured(plan)]
    sentences = [
        "Yes: the weights that stay were adjusted by a formula (ridge least squares on the calibration tokens) so that "
        "each layer's stream follows the teacher's. Its pull towards the cut weights was "
        f"{solved.ffn:g} for the FFN, {solved.attention:g} for attention and {solved.read:g} for what reads the stream."
    ]
    if solved.rotate:
        sentences.append(
            "Before hidden channels were removed, the stream as a whole was turned onto the directions in which the "
            "calibration tokens have most energy: the student's channels are mixtures of the teacher's."
        )
    else:
        sentences.append("The stream was not turned: each channel that stays is one of the teacher's.")
    if solved.rescale:
        sentences.append("The final norm was scaled as a whole, so that predictions are as sure as the text bears out.")
    if solved.regain:
        sentences.append("Then its channels were weighted anew, each so that the calibration tokens became likelier.")
    return sentences + _measured(plan)


def _measured(plan: Plan) -> list[str]:
    """What ``minitron prune`` measured of cut and of adjusted weights."""
    return [
        f"On {found.tokens:,} tokens of {KINDS[kind]}, held back from the adjusting, the original lost "
        f"{found.teacher:.4f} nats/token, cut weights {found.cut:.4f} and adjusted ones {found.resolved:.4f}."
        for kind, found in plan.measured.items()
    ]


def describe_map(axis: Axis) -> tuple[str, str]:
    """(text for those who cannot see the map, caption)."""
    alt = f"Heat map of {axis.before:,} {_TITLES[axis.name]}"
    alt += " in one row for all layers" if axis.name == "hidden" else ", a row for each layer"
    caption = []
    if axis.is_cut:
        alt += f"; {axis.after:,} ({axis.after / axis.before:.1%}) are kept"
        share = axis.worth_kept()
        if share is not None:
            stays = share[axis.kept.any(1)] if axis.kept is not None else share
            least, most = f"{stays.min():.1%}", f"{stays.max():.1%}"
            alt += f", with {least if least == most else f'{least} to {most}'} of a row's summed importance"
        if axis.worth is None:
            caption.append("Without scores, only what was kept is known.")
        else:
            caption.append("Importance is the published Minitron metric: average activation on the calibration text.")
            by_loss = "The plan keeps those without which the loss would rise most instead."
            other = f"The plan ranks units by the metric '{axis.ranking}' instead."
            caption.append(by_loss if axis.by_loss else _RANKED.get(axis.ranking, other))
    else:
        alt += "; all are kept"
    if axis.before > 256:
        order = "" if axis.worth is None else "Units stand in the order of their importance; "
        caption.append(f"{order}each cell is the mean of several.")
    return alt + ".", " ".join(caption)


def describe_influence(worth: np.ndarray, dropped: tuple[int, ...], how: str | None = None) -> tuple[str, str]:
    """(text for those who cannot see the bars, caption); ``how``: what the plan says of its choice of layers."""
    least, most = int(worth.argmin()), int(worth.argmax())
    alt = (
        f"Bars of Block Influence for {len(worth)} layers, from {worth[least]:.4f} (layer {least + 1}) "
        f"to {worth[most]:.4f} (layer {most + 1})"
    )
    if not dropped:
        return alt + ".", "No layer was dropped."
    alt += f"; dropped: {format_ranges(layer + 1 for layer in dropped)}."
    lowest = set(np.argsort(worth, kind="stable")[: len(dropped)].tolist())
    caption = "Hatched bars with a cross are layers that were dropped. " + (
        "They are those of least influence."
        if lowest == set(dropped)
        else f"They are not those of least influence: {_SELECTED.get(how, _SELECTED[None])}."
    )
    return alt, caption
