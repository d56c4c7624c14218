"""The page, as HTML and as Markdown, from what a run folder holds.

Every value goes through the template's escaping: names and texts of a run are another's, and none of them may become
markup. Only drawings, in which there is no text or name of a run's, and escaped code blocks are marked as safe.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from nemo_minitron import __version__
from nemo_minitron.files.plain import plain
from nemo_minitron.report import figures, maps, tasks, words
from nemo_minitron.report.curves import Training
from nemo_minitron.report.measures import ROLES, duration, gap_closed, measured_alike, size
from nemo_minitron.report.outlook import outlook
from nemo_minitron.report.removal import Axis, axes, dropped_layers
from nemo_minitron.report.run_folder import Run
from nemo_minitron.report.svg import numbered
from nemo_minitron.report.use import use


def render(run: Run) -> tuple[str, str]:
    """(HTML, Markdown); the same folder gives the same text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("nemo_minitron.report", "")
    options: dict[str, Any] = {"loader": loader, "undefined": StrictUndefined, "trim_blocks": True}
    html = Environment(autoescape=True, finalize=_visible, lstrip_blocks=True, **options)
    markdown = Environment(autoescape=False, finalize=markdown_escape, keep_trailing_newline=True, **options)
    content = contents(run)
    drawings = [figure for part in content["figures"].values() for figure in part]
    for number, figure in enumerate(drawings, 1):
        figure["svg"] = Markup(numbered(figure["svg"], number))
    return (
        html.get_template("page.html.j2").render(content),
        markdown.get_template("page.md.j2").render(content, code=code_block),
    )


def contents(run: Run) -> dict[str, Any]:
    """What both templates show: plain text and numbers, and drawings with a text that stands in for them."""
    parts = axes(run)
    turned = run.plan is not None and run.plan.compensation is not None and run.plan.compensation.rotate
    # of a stream that was turned no channel was kept or removed: there is nothing to map
    shown = [
        axis
        for axis in parts
        if (axis.worth is not None or axis.is_cut) and not (turned and axis.is_cut and axis.name == "hidden")
    ]
    dropped = dropped_layers(run.plan)
    student, ways = use(run)
    return {
        "name": run.recipe or run.name,
        "description": run.description,
        "version": __version__,
        "headline": words.headline(run),
        "tiles": _tiles(run),
        "student": student,
        "ways": ways,
        "glossary": words.GLOSSARY,
        "shapes": _shapes(run),
        "results": _results(run),
        "tasks": tasks.rows(run.tasks),
        "answers": _answers(run),
        "removal": words.removal(run, parts),
        "compensation": words.compensation(run.plan),
        "layers": _layers(run, parts),
        "figures": {
            "cut": [_map(axis, run) for axis in shown if axis.is_cut],
            "whole": [_map(axis, run) for axis in shown if not axis.is_cut],
            "influence": _influence(run, dropped),
            "losses": [_losses(training) for training in run.trainings if _drawable(training)],
            "quality": _quality(run),
        },
        "outlook": [] if run.distillation is None else outlook(run.distillation),
        "stages": _stages(run),
        "versions": _versions(run),
        "walk": _walk(run),
        "absent": run.absent,
    }


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """(what, figure, beside it) of the few numbers that matter."""
    before, after = words.parameters(run)
    tiles = []
    if before and after:
        tiles.append(("parameters", f"{after / before - 1:+.1%}", f"{size(before)} → {size(after)}"))
    teacher = run.metrics.get("teacher")
    student = run.metrics.get("distilled") or run.metrics.get("pruned")
    alike = measured_alike(run.metrics)
    if teacher and student and alike:
        change = student["val_loss"] - teacher["val_loss"]
        tiles.append(("loss", f"{change:+.3f}", f"{teacher['val_loss']:.3f} → {student['val_loss']:.3f} nats/token"))
    if teacher and student:
        for key, what, scale, unit in (
            ("perplexity", "perplexity", 1, ""),
            ("peak_memory_bytes", "memory", 2**30, " GiB"),
        ):
            if key in teacher and key in student and (alike or key != "perplexity"):
                old, new = teacher[key] / scale, student[key] / scale
                tiles.append((what, f"{new / old - 1:+.1%}", f"{old:,.2f} → {new:,.2f}{unit}"))
    closed = gap_closed(run.metrics)
    if closed is not None:
        tiles.append(("won back", f"{closed:.1%}", "of the loss that pruning cost, by training"))
    return [(what, figure.replace("-", "−"), beside) for what, figure, beside in tiles]


def _shapes(run: Run) -> list[tuple[str, str, str, str]]:
    """(what, before, after, kept) by the plan, or else by the evaluations."""
    rows: list[tuple[str, float, float]] = []
    names = {
        "layers": "num_layers",
        "hidden size": "hidden_size",
        "FFN size": "ffn_hidden_size",
        "attention heads": "num_attention_heads",
        "query groups": "num_query_groups",
    }
    if run.plan is not None:
        old, new = run.plan.source, run.plan.target
        names |= {"size of a head": "kv_channels", "vocabulary": "vocab_size"}
        rows = [(what, getattr(old, key), getattr(new, key)) for what, key in names.items()]
        rows.append(("parameters", old.num_parameters(), new.num_parameters()))
        cached = "KV cache, bytes per token in 16 bits"
        rows.append((cached, old.kv_cache_bytes_per_token(), new.kv_cache_bytes_per_token()))
    else:
        teacher = run.metrics.get("teacher", {})
        student = run.metrics.get("distilled") or run.metrics.get("pruned") or {}
        names |= {"parameters": "num_parameters"}
        rows = [(what, teacher[k], student[k]) for what, k in names.items() if k in teacher and k in student]
    return [(what, f"{old:,}", f"{new:,}", f"{new / old:.1%}") for what, old, new in rows]


def _results(run: Run) -> list[tuple[str, ...]]:
    """One row per model that was evaluated."""
    shows = (
        ("val_loss", lambda value: f"{value:.4f}"),
        ("perplexity", lambda value: f"{value:,.2f}"),
        ("num_parameters", lambda value: f"{value:,.0f}"),
        ("peak_memory_bytes", lambda value: f"{value / 2**30:.2f} GiB"),
    )
    return [
        (role, *(show(run.metrics[role][key]) if key in run.metrics[role] else "–" for key, show in shows))
        for role in ROLES
        if role in run.metrics
    ]


def _answers(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """(prompt, what each model wrote) in the order of the models."""
    return [(prompt, list(answers.items())) for prompt, answers in run.answers.items()]


def _layers(run: Run, parts: list[Axis]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table that says per layer what the maps show."""
    by_layer = [axis for axis in parts if axis.name != "hidden" and axis.is_cut and axis.kept is not None]
    influence = None if run.scores is None else run.scores.block_influence
    dropped = dropped_layers(run.plan)
    if influence is None and not dropped and not by_layer:
        return [], []
    head = ["layer", *(["Block Influence"] if influence is not None else []), *(["stays"] if dropped else [])]
    shares = [axis.worth_kept() for axis in by_layer]
    for axis, share in zip(by_layer, shares, strict=True):
        head += [f"{words.title(axis)} kept", *(["of importance"] if share is not None else [])]
    count = run.plan.source.num_layers if run.plan is not None else len(influence if influence is not None else ())
    rows = []
    for layer in range(count):
        row = [str(layer + 1)]
        row += [f"{influence[layer]:.4f}"] if influence is not None else []
        row += ["no" if layer in dropped else "yes"] if dropped else []
        for axis, share in zip(by_layer, shares, strict=True):
            row.append(f"{axis.kept[layer].sum():,}" if axis.kept is not None else "")
            row += [f"{share[layer]:.1%}"] if share is not None else []
        rows.append(row)
    return head, rows


def _map(axis: Axis, run: Run) -> dict[str, str]:
    alt, caption = words.describe_map(axis)
    return _figure(words.title(axis), alt, caption, maps.unit_map(axis, dropped_layers(run.plan)))


def _influence(run: Run, dropped: tuple[int, ...]) -> list[dict[str, str]]:
    if run.scores is None:
        return []
    how = None if run.plan is None else run.plan.selection.get("layers")
    alt, caption = words.describe_influence(run.scores.block_influence, dropped, how)
    return [_figure("Block Influence", alt, caption, figures.block_influence(run.scores.block_influence, dropped))]


def _drawable(training: Training) -> bool:
    return bool(training.curves.keys() & {"train_kd_loss", "val_kd_loss", "train_lm_loss", "val_lm_loss"})


def _losses(training: Training) -> dict[str, str]:
    """Curves of one training; no evaluation of a whole model, which reads other text than validation does."""
    unit = "tokens" if training.by_tokens else "steps"
    parts = []
    for name in ("train_kd_loss", "val_kd_loss", "train_lm_loss", "val_lm_loss"):
        curve = training.curves.get(name)
        if curve is not None:
            first, last = curve.values[0], curve.values[-1]
            parts.append(f"{name} from {first:.3f} to {last:.3f} ({len(curve.at):,} value{'s' * (len(curve.at) != 1)})")
    spent = f"{training.tokens:,} tokens" if training.tokens else f"{training.steps:,} steps"
    alt = f"Losses against {unit}, over {training.steps:,} optimizer steps and {spent}: {'; '.join(parts)}."
    caption = "Lower is better. Validation during training reads part of the held-out text, so that its level is not "
    caption += "that of the results above."
    agreement = training.curves.get("val_top1_agreement")
    if agreement is not None:
        caption += f" At the end the student's first choice was the teacher's at {agreement.values[-1]:.1%} of tokens."
    what = "Distillation" if training.is_distillation else "Teacher correction"
    return _figure(f"{what} ({training.name})", alt, caption, figures.losses(training))


def _quality(run: Run) -> list[dict[str, str]]:
    known = {role: values for role, values in run.metrics.items() if "num_parameters" in values}
    if len(known) < 2:
        return []
    points = [f"{role} {size(m['num_parameters'])}, loss {m['val_loss']:.3f}" for role, m in known.items()]
    alt = f"Loss on held-out text against parameters: {'; '.join(points)}."
    caption = "Lower is better. Arrows: what pruning took, and what distillation gave back."
    return [_figure("Quality against size", alt, caption, figures.quality(run.metrics, run.distillation))]


def _figure(title: str, alt: str, caption: str, svg: str) -> dict[str, str]:
    return {"title": title, "alt": alt, "caption": caption, "svg": svg}


def _stages(run: Run) -> list[dict[str, str]]:
    """Each stage with the command that runs it again on what its record says."""
    folder = run.folder / ".stages"
    found = []
    for stage in run.stages:
        command = ""
        if stage.command is not None:
            flags = ["--config-path", str(folder), "--config-name", f"{stage.name}.yaml"]
            command = shlex.join(["minitron", stage.command, *flags])
        state = {"done": "done", "started": "not finished"}.get(stage.state or "", "not recorded")
        found.append(
            {
                "name": stage.name,
                "command": command,
                "state": state,
                "time": "" if stage.seconds is None else duration(stage.seconds),
                "fingerprint": stage.fingerprint or "–",
                "config": stage.config,
            }
        )
    return found


def _versions(run: Run) -> list[tuple[str, str]]:
    """(package, version, or versions where stages differ)."""
    found: dict[str, list[str]] = {}
    for stage in run.stages:
        for package, version in stage.versions.items():
            versions = found.setdefault(package, [])
            if version not in versions:
                versions.append(version)
    return [(package, ", ".join(versions)) for package, versions in found.items()]


def _walk(run: Run) -> str:
    """The one command for all stages; empty for a folder that no recipe made."""
    recipe = run.folder / "recipe.yaml"
    if run.recipe is None:
        return ""
    path = str(recipe) if "/" in str(recipe) else f"./{recipe}"
    return shlex.join(["minitron", "run", f"recipe={path}", f"run_dir={run.folder}"])


def _visible(value: object) -> object:
    """What the HTML escapes: a text without marks that cannot be seen."""
    return plain(value) if type(value) is str else value  # drawings are a kind of str


class _Safe(str):
    """Markdown that is escaped already."""


def markdown_escape(value: object) -> str:
    """One line of text whose every mark is literal, in a paragraph as in a table."""
    if isinstance(value, _Safe):
        return value
    text = re.sub(r"\s+", " ", plain(str(value))).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]|~$]|:(?=//)|(?<=www)\.)", r"\\\1", text.strip())  # an address is no link
    return re.sub(r"^(\d*)([#+=.)-])(?=[#=-]*( |$))", r"\1\\\2", text)  # heading, list, or the line under a heading


def code_block(text: str, language: str = "") -> _Safe:
    """A fenced block that nothing in ``text`` can close."""
    text = plain(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return _Safe(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def write(html: str, markdown: str, path: Path) -> Path:
    """Write the HTML to ``path`` and the Markdown beside it; both appear whole, or neither. Return the latter's path.

    Raises:
        MinitronError: a destination cannot be written.
    """
    from nemo_minitron.files.staging import Staging

    other = path.with_suffix(".md")
    with Staging(path) as first, Staging(other) as second:
        first.path.write_text(html, encoding="utf-8")
        second.path.write_text(markdown, encoding="utf-8")
    return other
