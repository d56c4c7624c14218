"""The page on a run: its numbers, what it leaves out, and that nothing of a run's own becomes markup."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from nemo_minitron.config.compose import configure
from nemo_minitron.errors import MinitronError
from nemo_minitron.importance.scores import Scores
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.choose import make_plan
from nemo_minitron.prune.measured import Measured
from nemo_minitron.prune.plan import Compensation
from nemo_minitron.report.curves import Curve, read_training, thinned
from nemo_minitron.report.maps import binned
from nemo_minitron.report.measures import duration, gap_closed, numbers, size, unlike
from nemo_minitron.report.page import code_block, markdown_escape, render
from nemo_minitron.report.removal import axes
from nemo_minitron.report.run_folder import read_run
from nemo_minitron.stages import report
from tests.importance.made import made

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=40,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=100,
    padded_vocab_size=128,
    share_embeddings_and_output_weights=True,
)
TEACHER = {
    "val_loss": 3.0,
    "perplexity": 20.0855,
    "num_parameters": 60_064,
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 40,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "peak_memory_bytes": 2**31,
}
PRUNED = TEACHER | {"val_loss": 5.0, "perplexity": 148.41, "num_parameters": 30_000}
DISTILLED = PRUNED | {"val_loss": 3.5, "perplexity": 33.115, "peak_memory_bytes": 2**30}
TARGET = {"hidden_size": 24, "ffn_hidden_size": 30, "num_query_groups": 2, "num_layers": 3}
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Tags with attributes, text, and whether every element was closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> in {self.open[-3:]}"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        (row,) = [row for row in self.rows if row[0] == first]
        return row

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def make_scores(ranks: bool = True, seed: int = 0) -> Scores:
    random = np.random.default_rng(seed)
    influence = np.array([0.4, 0.1, 0.05, 0.3])
    return made(SHAPE, lambda size: random.uniform(0.5, 2.0, size), reconstruction=ranks, block_influence=influence)


def make_plan_of(scores: Scores, target: dict[str, int] = TARGET, **more):
    worth = scores.ranked_by("minitron")
    return make_plan(SHAPE, worth, target, source_fingerprint="f" * 64, **{"ranking": "minitron", **more})


def log_events(folder: Path, values: dict[str, dict[int, float]]) -> None:
    with SummaryWriter(str(folder)) as writer:
        for name, points in values.items():
            for step, value in points.items():
                writer.add_scalar(name, value, step)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run with all parts and known numbers, to be changed."""
    return make_run(tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> SimpleNamespace:
    """The same, to be looked at: its folder and its pages."""
    folder = make_run(tmp_path_factory.mktemp("whole") / "run")
    page, html, markdown = pages(folder)
    return SimpleNamespace(folder=folder, page=page, html=html, markdown=markdown)


def make_run(run: Path) -> Path:
    (run / "evaluation").mkdir(parents=True)
    for role, metrics in (("teacher", TEACHER), ("pruned", PRUNED), ("distilled", DISTILLED)):
        (run / "evaluation" / f"{role}.json").write_text(json.dumps(metrics))
    scores = make_scores()
    (run / "scores").mkdir()
    scores.write(run / "scores")
    plan = make_plan_of(scores, compensation=Compensation("t" * 64, rotate=True, rescale=True))
    measured = {"calibration": Measured(511, 3.0, 4.105, 3.48), "own": Measured(1022, 2.5, 3.25, 2.75)}
    replace(plan, measured=measured).save(run / "pruned.plan.yaml")
    steps = range(10)
    log_events(
        run / "distill" / "distill" / "version_0",
        {
            "tokens": {step: 512.0 * (step + 1) for step in steps},
            "train_kd_loss": {step: 1.0 - 0.05 * step for step in steps},
            "train_lm_loss": {step: 4.0 - 0.05 * step for step in steps},
            "val_kd_loss": {4: 0.75, 9: 0.5},
            "val_lm_loss": {4: 3.75, 9: 3.5},
            "val_top1_agreement": {4: 0.5, 9: 0.625},
        },
    )
    log_events(run / "finetune" / "finetune" / "version_0", {"train_lm_loss": {0: 6.0, 1: 5.0}})
    (run / ".stages").mkdir()
    for name, record in (("prune", {"state": "done", "seconds": 125.0, "fingerprint": "abc123"}), ("export", {})):
        versions = {"versions": {"torch": "9.8.7"}} if record else {}
        (run / ".stages" / f"{name}.yaml").write_text(f"key: value of {name}\n")
        (run / ".stages" / f"{name}.json").write_text(json.dumps(record | versions))
    recipe = {"name": "demo", "description": "a demonstration", "order": ["prune", "export"]}
    recipe["stages"] = {"prune": {"command": "prune"}, "export": {"command": "convert"}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


def pages(folder: Path) -> tuple[Page, str, str]:
    html, markdown = render(read_run(folder))
    return Page(html), html, markdown


# -------------------------------------------------------------------------------------------------------- the numbers


def test_the_headline_and_tables_say_the_numbers_of_the_run(whole):
    page, markdown = whole.page, whole.markdown
    before, after = SHAPE.num_parameters(), SHAPE.replace(**TARGET, num_attention_heads=4).num_parameters()
    for sentence in (
        f"The model was made {1 - after / before:.1%} smaller: from {before:,} to {after:,} parameters",
        "from 3.000 to 3.500 nats per token, a change of +0.500",
        "among 20.1 equally likely continuations, the smaller model chooses among 33.1",
        "Removing parts alone cost 2.000; learning from the original on 5,120 tokens won back 75.0% of that.",
        "took 1.00 GiB of memory at most, the original's 2.00",
    ):
        assert sentence in page.text and sentence in markdown
    assert page.row("pruned") == ["pruned", "5.0000", "148.41", "30,000", "2.00 GiB"]
    assert page.row("layers") == ["layers", "4", "3", "75.0%"]
    assert page.row("hidden size") == ["hidden size", "32", "24", "75.0%"]
    assert page.row("parameters") == ["parameters", f"{before:,}", f"{after:,}", f"{after / before:.1%}"]
    assert "| pruned | 5.0000 | 148.41 | 30,000 | 2.00 GiB |" in markdown


def test_what_was_removed_and_whether_it_was_re_solved(whole):
    page, markdown = whole.page, whole.markdown
    assert "1 of 4 layers were removed whole (counted from 1): 3." in page.text  # the least Block Influence
    assert "FFN neurons: 30 of 40 stay in every layer that stays." in page.text
    assert "Yes: the weights that stay were adjusted" in page.text and "turned onto the directions" in page.text
    assert "The final norm was scaled as a whole" in page.text
    for said in ("511 tokens of calibration text", "1,022 tokens of the model's own text"):
        assert f"On {said}, held back from the adjusting, the original lost" in page.text
    assert "2.5000 nats/token, cut weights 3.2500 and adjusted ones 2.7500." in page.text
    assert "They are those of least influence." in page.text
    assert "Hidden channels" not in [title for title in re.findall(r"<h3>(.*?)</h3>", whole.html)]  # they were turned
    plan = read_run(whole.folder).plan
    worth = make_scores().published["ffn"][0]
    share = worth[list(plan.ffn[0])].sum() / worth.sum()
    assert page.row("1")[:5] == ["1", "0.4000", "yes", "30", f"{share:.1%}"]
    assert page.row("3")[:4] == ["3", "0.0500", "no", "0"]
    assert f"| 1 | 0.4000 | yes | 30 | {share:.1%} |" in markdown


def test_adjusted_weights_that_were_worse_are_told_of(folder):
    measured = {"own": Measured(1022, 2.5, 3.25, 3.5)}
    replace(make_plan_of(make_scores()), measured=measured).save(folder / "pruned.plan.yaml")
    page, _, _ = pages(folder)
    assert "No: the weights that stay are the teacher's own" in page.text
    assert "Adjusted ones were tried, and lost more on text that was held back" in page.text
    assert "cut weights 3.2500 and adjusted ones 3.5000." in page.text


def test_the_map_of_kept_units_is_the_plan(whole):
    """Pixels of the drawing, read back as a picture: blue where the plan keeps, orange elsewhere."""
    from PIL import Image

    plan = read_run(whole.folder).plan
    drawing = whole.html[whole.html.index('aria-label="Heat map of 40 FFN neurons') :]
    pictures = re.findall(r'href="data:image/png;base64,([^"]*)"', drawing)[:3]  # importance, its scale, kept
    found = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in pictures]
    (kept,) = [picture for picture in found if len(np.unique(picture.reshape(-1, 3), axis=0)) == 2]
    expected = np.zeros((4, 40), dtype=bool)
    for layer, row in zip(plan.layers, plan.ffn, strict=True):
        expected[layer, list(row)] = True
    blue = kept[..., 2] > kept[..., 0]
    assert (blue == expected).all() or (blue[::-1] == expected).all()


@pytest.mark.parametrize(
    ("ranking", "said"),
    [
        ("minitron", "The plan keeps the units of most importance."),
        ("reconstruction", "what would be lost after the best re-solving instead"),
        ("taylor", "how much the loss would change without their weights instead"),
        ("of_mine", "The plan ranks units by the metric 'of_mine' instead."),
        (None, "The plan does not say by what it ranks units."),
    ],
)
def test_the_ranking_is_the_one_that_the_plan_says(folder, ranking, said):
    target = TARGET | {"num_query_groups": 4, "num_attention_heads": 4}
    make_plan_of(make_scores(), target=target, ranking=ranking).save(folder / "pruned.plan.yaml")
    found = {axis.name: axis.ranking for axis in axes(read_run(folder)) if axis.is_cut}
    assert found == {"hidden": ranking, "ffn": ranking, "heads": ranking}
    assert said in pages(folder)[0].text


def test_groups_that_were_chosen_by_loss_are_not_said_to_be_ranked(folder):
    target = {"num_query_groups": 4, "num_attention_heads": 4}
    groups = {"num_query_groups": make_scores().shape.num_query_groups - 1}
    for sizes, how, said in ((target, "loss", False), (groups, "ranking", False), (groups, "loss", True)):
        plan = make_plan_of(make_scores(), target=sizes).chosen("greedy", how)
        plan.save(folder / "pruned.plan.yaml")
        assert ("without which the loss would rise most" in pages(folder)[0].text) is said, (sizes, how)


def test_commands_times_and_versions(whole):
    folder, page, markdown = whole.folder, whole.page, whole.markdown
    command = f"minitron convert --config-path {folder}/.stages --config-name export.yaml"
    walk = f"minitron run recipe={folder}/recipe.yaml run_dir={folder}"
    for text in (command, walk, "key: value of prune", "abc123"):
        assert text in page.text and text in markdown
    assert "1. prune: done, 2 min 5 s" in page.text and "2. export: not recorded" in page.text
    assert page.row("torch") == ["torch", "9.8.7"]
    assert "demo: what pruning did" in page.text and "a demonstration" in page.text


# ------------------------------------------------------------------------------------------------- form of the page


def test_the_page_stands_alone_and_reads_on_light_and_dark(whole):
    page, html = whole.page, whole.html
    assert len(html) < 3 * 2**20
    assert "://" not in html and "@import" not in html
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "img"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert max(ids.values()) == 1
    referred = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", html))
    assert referred and referred <= ids.keys()
    assert "prefers-color-scheme: dark" in html and "currentColor" in html and "#0a0b0" not in html
    assert all(a.get("aria-hidden") == "true" for tag, a in page.tags if tag == "svg")
    boxes = re.findall(r'<div class="scroll"[^>]*>\s*<(\w+)', html)
    assert Counter(boxes) == {"svg": page.count("svg"), "table": page.count("table")}, "what is wide scrolls by itself"


def test_every_drawing_has_a_text_for_those_who_cannot_see_it(whole):
    page = whole.page
    texts = [a["aria-label"] for _, a in page.tags if a.get("role") == "img"]
    assert len(texts) == page.count("svg") == page.count("figure") == 7
    assert "first choice was the teacher's at 62.5% of tokens" in page.text
    for part in (
        "teacher 60,064, loss 3.000; pruned 30,000, loss 5.000; distilled 30,000, loss 3.500",
        "4 layers, from 0.0500 (layer 3) to 0.4000 (layer 1); dropped: 3.",
        "over 10 optimizer steps and 5,120 tokens: train_kd_loss from 1.000 to 0.550 (10 values)",
        "Heat map of 40 FFN neurons, a row for each layer; 30 (75.0%) are kept",
    ):
        assert any(part in text for text in texts), part


def test_the_same_folder_gives_the_same_page(whole):
    assert render(read_run(whole.folder)) == (whole.html, whole.markdown)


def test_large_axes_stay_small(tmp_path):
    shape = SHAPE.replace(ffn_hidden_size=14336, num_layers=32)
    random = np.random.default_rng(0)
    scores = made(shape, lambda size: random.uniform(0.5, 2.0, size))
    (tmp_path / "scores").mkdir()
    scores.write(tmp_path / "scores")
    worth = scores.ranked_by("minitron")
    make_plan(shape, worth, {"ffn_hidden_size": 9216}, source_fingerprint="f" * 64).save(tmp_path / "a.plan.yaml")
    page, html, _ = pages(tmp_path)
    assert len(html) < 2**19 and "9,216 of 14,336 stay" in page.text


def test_neighbours_are_averaged():
    values = np.arange(12.0).reshape(2, 6)
    np.testing.assert_array_equal(binned(values, 3), [[0.5, 2.5, 4.5], [6.5, 8.5, 10.5]])
    np.testing.assert_array_equal(binned(values, 6), values)
    curve = thinned(Curve(np.arange(10.0), np.arange(10.0) ** 2), 5)
    np.testing.assert_allclose(curve.at, [0.5, 2.5, 4.5, 6.5, 8.5])
    np.testing.assert_allclose(curve.values, [0.5, 6.5, 20.5, 42.5, 72.5])


# ------------------------------------------------------------------------------------------------------ missing parts


def test_a_folder_with_one_part_gives_a_page_that_says_what_is_not_there(folder, tmp_path):
    for part, expected in (
        ("evaluation", "from 3.000 to 3.500"),
        ("scores", "Block Influence"),
        ("pruned.plan.yaml", "FFN neurons: 30 of 40 stay"),
        ("distill", "Distillation (distill)"),
        (".stages", "key: value of prune"),
    ):
        alone = tmp_path / f"only-{part.strip('.')}"
        alone.mkdir()
        (shutil.copytree if (folder / part).is_dir() else shutil.copy)(folder / part, alone / part)
        page, _, markdown = pages(alone)
        assert expected in page.text
        assert "What is not here" in page.text and len(read_run(alone).absent) >= 3
        for line in read_run(alone).absent:
            assert markdown_escape(line) in markdown


def test_without_distillation_the_pruned_model_stands_in(folder):
    (folder / "evaluation" / "distilled.json").unlink()
    page, _, _ = pages(folder)
    assert "from 3.000 to 5.000 nats per token" in page.text and "before any training" in page.text
    assert "The distilled model has no evaluation" in page.text and "won back" not in page.text


def test_a_run_in_depth_shows_its_layers_only(folder):
    scores = make_scores()
    plan = make_plan(SHAPE, None, {}, drop_layers=[1, 2], source_fingerprint="f" * 64)
    plan.save(folder / "pruned.plan.yaml")
    page, html, _ = pages(folder)
    assert "2 of 4 layers were removed whole (counted from 1): 1-2." in page.text
    assert "Within the layers nothing was removed." in page.text and "kept (blue)" not in html
    assert "They are not those of least influence" in page.text and scores.block_influence[0] == 0.4
    assert "No: the weights that stay are the teacher's own" in page.text
    for how, said in (
        ("drop_layers", "they were named."),
        ("greedy", "they were chosen by the loss without them."),
        ("contiguous", "they are one block"),
    ):
        plan.chosen(how, "ranking").save(folder / "pruned.plan.yaml")
        assert f"They are not those of least influence: {said}" in pages(folder)[0].text


def test_damaged_and_foreign_parts_are_named_and_left_out(folder):
    (folder / "pruned.plan.yaml").write_text("format: nemo_minitron.plan/1\n")
    with (folder / "scores" / "arrays.npz").open("r+b") as stream:
        stream.truncate(100)
    (folder / "evaluation" / "pruned.json").write_text("{")
    page, _, _ = pages(folder)
    for part in ("pruned.plan.yaml' lacks 'keep'", "arrays.npz: expected a zip", "pruned.json: expected JSON"):
        assert part in page.text


def test_scores_of_other_weights_are_left_out(folder):
    plan = make_plan_of(make_scores())
    text = plan.to_yaml().replace("f" * 64, "e" * 64)
    (folder / "pruned.plan.yaml").write_text(text)
    run = read_run(folder)
    assert run.scores is None and any("these scores are left out" in line for line in run.absent)


def test_an_earlier_metrics_json_serves_where_evaluations_are_gone(folder):
    evaluations = {path.stem: json.loads(path.read_text()) for path in (folder / "evaluation").iterdir()}
    (folder / "metrics.json").write_text(json.dumps(evaluations | {"teacher": TEACHER | {"val_loss": 1.0}}))
    (folder / "evaluation" / "pruned.json").unlink()
    metrics = read_run(folder).metrics
    assert metrics["pruned"]["val_loss"] == 5.0 and metrics["teacher"]["val_loss"] == 3.0, "the newer one wins"


def test_what_is_no_number_is_no_measurement():
    assert numbers(TEACHER | {"val_loss": float("nan"), "num_layers": "<b>", "hidden_size": -1, "more": 1.0}) == {
        name: value for name, value in TEACHER.items() if name not in ("val_loss", "num_layers", "hidden_size")
    }
    assert numbers({"val_loss": 10**400, "num_parameters": True, "peak_memory_bytes": float("inf")}) == {}
    assert numbers([1]) == {} and numbers({"val_loss": 2.0})["perplexity"] == pytest.approx(7.389, abs=1e-3)


# -------------------------------------------------------------------------------------------------------- hostile text

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'`|[a](javascript:b) ${x}\n# head\n```\n</pre>"


def test_nothing_of_a_run_becomes_markup(folder, tmp_path):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= {"name": HOSTILE.replace("${x}", ""), "description": HOSTILE.replace("${x}", "")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / ".stages" / "prune.yaml").write_text(HOSTILE)
    record = {"state": "done", "fingerprint": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    (folder / ".stages" / "prune.json").write_text(json.dumps(record))
    (folder / ".stages" / 'a"><script>b<!--.yaml').write_text("x: 1\n")
    (folder / "pruned.plan.yaml").write_text(HOSTILE)
    (folder / "distill").rename(folder / "<script>c<!--")
    hostile = tmp_path / "<script>d<!--"
    folder.rename(hostile)
    page, _, markdown = pages(hostile)
    assert page.count("script") == 0 and page.count("img") == 0
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script><img src=x onerror=alert(1)>") >= 4

    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = [one for token in parser.parse(markdown) for one in (token, *(token.children or ()))]
    kinds = Counter(token.type for token in tokens)
    assert not kinds.keys() & {"html_inline", "html_block", "link_open", "image"}
    assert kinds["fence"] == 6, "the walk, three configurations, and two commands: that of the third is not known"
    fences = [token.content for token in tokens if token.type == "fence"]
    assert any(HOSTILE in text for text in fences)
    assert sum(token.type == "heading_open" and token.tag == "h1" for token in tokens) == 1


@pytest.mark.parametrize(
    "text",
    [
        "# a",
        "- a",
        "+ a",
        "1. a",
        "2) a",
        "---",
        "===",
        "a#",
        "-1.5%",
        "a *b* _c_ `d` <i> &amp; ~~e~~ [f]",
        "http://a.b www.a.b",
    ],
)
def test_markdown_shows_text_as_it_is(text):
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark", {"html": True}).render(markdown_escape(text))
    page = Page(html)
    assert page.text.strip() == text and [tag for tag, _ in page.tags] == ["p"]
    assert not re.search(r"\w://|www\.", markdown_escape(text)), "some readers link these"


def test_a_code_block_cannot_be_closed_from_inside():
    assert code_block("a ```` b", "yaml") == "`````yaml\na ```` b\n`````"


# ---------------------------------------------------------------------------------------------------------- the curves


def test_a_resumed_training_replaces_the_steps_that_it_took_again(tmp_path):
    log_events(tmp_path, {"train_lm_loss": {0: 5.0, 1: 4.0, 2: 9.0, 3: 9.0}, "tokens": {0: 10, 1: 20, 2: 30, 3: 40}})
    (first,) = tmp_path.iterdir()
    first.rename(first.with_name("events.out.tfevents.1000000000.a"))
    log_events(tmp_path, {"train_lm_loss": {2: 3.0}, "tokens": {2: 30}})
    training = read_training(tmp_path)
    np.testing.assert_array_equal(training.curves["train_lm_loss"].values, [5.0, 4.0, 3.0])
    np.testing.assert_array_equal(training.curves["train_lm_loss"].at, [10, 20, 30])
    assert training.tokens == 30 and training.steps == 3


def test_the_csv_serves_where_there_are_no_event_files(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,tokens,train_kd_loss,val_kd_loss\n0,100,0.5,\n1,200,0.25,\n1,,,0.125\n2,300,nan,\n"
    )
    training = read_training(tmp_path)
    assert training.is_distillation and training.tokens == 300
    np.testing.assert_array_equal(training.curves["train_kd_loss"].values, [0.5, 0.25])
    assert (training.curves["val_kd_loss"].at, training.curves["val_kd_loss"].values) == ([200], [0.125])
    (tmp_path / "metrics.csv").write_text("step,train_kd_loss\n0,half\n")
    with pytest.raises(MinitronError, match=r"metrics\.csv: expected a training's metrics\.csv"):
        read_training(tmp_path)


def test_a_damaged_event_file_gives_what_it_holds(folder):
    (file,) = (folder / "distill").rglob("events.out.tfevents.*")
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 300)
    assert 0 < read_training(folder / "distill").steps <= 10
    file.write_bytes(b"\xff" * 1000)
    assert read_training(folder / "distill") is None


def test_without_tokens_steps_are_counted(folder):
    training = read_training(folder / "finetune")
    assert not training.by_tokens and training.tokens is None
    np.testing.assert_array_equal(training.curves["train_lm_loss"].at, [1, 2])
    assert "over 2 optimizer steps and 2 steps" not in pages(folder)[0].text


# --------------------------------------------------------------------------------------------------------- the command


def run_command(*overrides: str) -> None:
    report.run(configure("report", list(overrides)))


def test_the_command_writes_both_pages_into_the_run(folder, capsys):
    run_command(f"run_dir={folder}")
    html, markdown = (folder / f"report.{end}" for end in ("html", "md"))
    assert html.read_text().startswith("<!doctype html>") and markdown.read_text().startswith("# demo")
    assert f"report: {html}" in capsys.readouterr().out
    before = html.read_bytes()
    run_command(f"run_dir={folder}")
    assert html.read_bytes() == before, "the page is not about itself"
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_the_command_writes_elsewhere(folder, tmp_path):
    run_command(f"run_dir={folder}", f"output_path={tmp_path}/new/page.html")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"page.html", "page.md"}
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "found no folder"),
        (lambda path: path.mkdir(), "is no run folder: expected any of metrics.json"),
        (lambda path: (path.mkdir(), (path / "a.plan.yaml").write_text("x")), "is not a plan"),
    ],
)
def test_what_is_no_run_is_one_error_and_writes_nothing(tmp_path, make, expected):
    make(tmp_path / "x")
    with pytest.raises(MinitronError) as caught:
        run_command(f"run_dir={tmp_path}/x", f"output_path={tmp_path}/page.html")
    assert expected in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "page.html").exists()


def test_a_destination_that_cannot_be_written_leaves_nothing(folder, tmp_path):
    with pytest.raises(MinitronError, match=r"ends in \.html, found"):
        run_command(f"run_dir={folder}", f"output_path={tmp_path}/page.pdf")
    (tmp_path / "page.md").mkdir()
    with pytest.raises(MinitronError, match=r"page\.md: expected a file to write, found a folder"):
        run_command(f"run_dir={folder}", f"output_path={tmp_path}/page.html")
    assert not (tmp_path / "page.html").exists() and not list(tmp_path.glob(".page*"))


# ----------------------------------------------------------------------------------------------------------- measures


def test_words_for_sizes_and_times():
    assert [size(n) for n in (999, 134_515_008, 8_030_261_248)] == ["999", "134.5 million", "8.03 billion"]
    assert [duration(s) for s in (0.25, 59.6, 125.4, 7500)] == ["0.2 s", "59.6 s", "2 min 5 s", "2 h 5 min"]


def test_gap_needs_all_three_and_a_cost():
    metrics = {"teacher": TEACHER, "pruned": PRUNED, "distilled": DISTILLED}
    assert gap_closed(metrics) == 0.75
    assert gap_closed({"teacher": TEACHER}) is None
    assert gap_closed(metrics | {"pruned": TEACHER}) is None
    counted = {role: {**found, "tokens": 512} for role, found in metrics.items()}
    assert gap_closed(counted) == 0.75
    assert gap_closed(counted | {"pruned": {**PRUNED, "tokens": 256}}) is None, "measured on other text"


@pytest.mark.parametrize("name", ["a" * 12, "A" * 12, "a" * 11, 5])
def test_losses_of_as_many_tokens_of_another_text_are_not_compared(folder, name):
    """What is no name of a text, as no evaluation writes it, says nothing."""
    metrics = {"teacher": TEACHER, "pruned": PRUNED, "distilled": DISTILLED}
    metrics = {role: {**found, "tokens": 512, "text": "b" * 12} for role, found in metrics.items()}
    assert gap_closed(metrics) == 0.75
    metrics["distilled"]["text"] = name
    for role, found in metrics.items():
        (folder / "evaluation" / f"{role}.json").write_text(json.dumps(found))
    said = "The evaluations are of different texts: their losses cannot be compared"
    differ = name == "a" * 12
    assert (said in pages(folder)[0].text) == differ
    if differ:
        assert gap_closed(metrics) is None and unlike(metrics) == said


def test_losses_that_were_not_measured_alike_are_not_compared(folder):
    for role, found, tokens in (("teacher", TEACHER, 4096), ("pruned", PRUNED, 4096), ("distilled", DISTILLED, 2048)):
        (folder / "evaluation" / f"{role}.json").write_text(json.dumps({**found, "tokens": tokens}))
    page = pages(folder)[0]
    counts = "(teacher 4,096, pruned 4,096, distilled 2,048)"
    assert f"different numbers of tokens {counts}: their losses cannot be compared." in page.text
    for compared in ("nats per token, a change of", "won back", "equally likely continuations, the smaller"):
        assert compared not in page.text
    assert page.row("distilled")[1] == "3.5000" and "took 1.00 GiB of memory" in page.text
