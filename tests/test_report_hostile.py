"""A run folder is another's: nothing in it becomes markup, runs, hangs the report, or leads it out of the folder."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from nemo_minitron.cli import main
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.plain import plain, short
from nemo_minitron.prune.plan import Compensation
from nemo_minitron.report import curves, inventory, run_folder
from nemo_minitron.report.page import render
from nemo_minitron.report.run_folder import read_run
from tests.importance.made import made
from tests.test_report import (
    DISTILLED,
    PRUNED,
    SHAPE,
    TEACHER,
    Page,
    log_events,
    make_plan_of,
    make_scores,
    pages,
    run_command,
)

RUN = "document.documentElement.setAttribute('data-ran',1)"
NAMES = (  # for names of files, which hold no slash
    f'"><img src=x onerror={RUN}>',
    f"'><svg onload={RUN}>",
    f"<script>{RUN}<!--",
    f'\\g<9>"><body onpageshow={RUN}>',
)
TEXTS = (
    f"</title></style></code></pre><script>{RUN}</script>",
    f'" autofocus tabindex=0 onfocus={RUN} x="',
    f"--></textarea></summary></details><iframe srcdoc='<script>top.{RUN}</script>'></iframe>",
    f"<a href=javascript:{RUN} id=x>[a](javascript:b)</a>|`~{{{{7*7}}}} \x1b]0;x\x07 \ud800 \u202e",
)


def make_hostile(folder: Path, names: tuple[str, ...] = NAMES, texts: tuple[str, ...] = TEXTS) -> Path:
    """A whole run in which every text and name that its maker could choose is one of these."""
    run = folder / f"run{names[0]}"
    (run / "evaluation").mkdir(parents=True)
    said = {f"{text} {n}": text for n, text in enumerate(texts)}
    for role, metrics in (("teacher", TEACHER), ("pruned", PRUNED), ("distilled", DISTILLED)):
        (run / "evaluation" / f"{role}.json").write_text(json.dumps(said | metrics | {"tasks": said}))
    (run / "metrics.json").write_text(json.dumps(said | {"teacher": said}))
    scores = make_scores()
    (run / f"scores{names[1]}").mkdir()
    fingerprint = texts[0][:16] + "f" * 48
    other = {"source_fingerprint": fingerprint, "data_fingerprint": texts[0], "calibration": said}
    dataclasses.replace(scores, **other).write(run / f"scores{names[1]}")
    plan = make_plan_of(scores, compensation=Compensation(texts[1].replace("$", "")))
    (run / f"{names[2]}.plan.yaml").write_text(plan.to_yaml())  # of other weights: a note shows both fingerprints
    log_events(run / f"distill{names[0]}" / names[1], {"train_kd_loss": {0: 2.0, 1: 1.0}, texts[0]: {0: 1.0}})
    log_events(run / f"finetune{names[3]}", {"train_lm_loss": {0: 2.0, 1: 1.0}})
    (run / f"damaged{names[1]}").mkdir()
    (run / f"damaged{names[1]}" / "metrics.csv").write_text(f"step,train_lm_loss,{texts[1]!a}\n0,{texts[0]}\n")
    (run / f"student{names[0]}.nemo").write_bytes(b"x")
    (run / f"link{names[0]}").symlink_to("/etc")
    (run / ".stages").mkdir()
    for number, name in enumerate(names):
        record = {"state": "done", "seconds": 1.5, "fingerprint": texts[number], "versions": said}
        (run / ".stages" / f"prune_{name}.yaml").write_bytes(texts[number].encode("utf-8", "surrogatepass"))
        (run / ".stages" / f"prune_{name}.json").write_text(json.dumps(record))
    stages = {f"prune_{name}": {"command": name} for name in names[:2]}
    visible = [plain(text).replace("${", "") for text in texts]
    recipe = {"name": visible[0], "description": visible[1], "order": [f"prune_{name}" for name in names]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"stages": stages, visible[2]: visible[3]}))
    return run


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[str, str]:
    return render(read_run(make_hostile(tmp_path_factory.mktemp("hostile"))))


@pytest.fixture
def hurry():
    """What waits for the other end of a pipe waits for ever."""

    def late(*_: object) -> None:
        raise TimeoutError("it waited")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def tags(html: str) -> Counter[tuple[str, tuple[str, ...]]]:
    """Elements with the names of their attributes."""
    return Counter((tag, tuple(attributes)) for tag, attributes in Page(html).tags)


# ---------------------------------------------------------------------------------------------------- text and names


def test_hostile_text_makes_the_elements_that_harmless_text_makes(hostile, tmp_path):
    """The same folder with ``a`` for every name and text has the same elements and attributes, and no other."""
    harmless = make_hostile(tmp_path, ("a", "b", "c", "d"), ("a", "b", "c", "d"))
    html, markdown = render(read_run(harmless))
    assert tags(hostile[0]) == tags(html)
    page = Page(hostile[0])
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "img", "a", "object", "embed", "form", "base", "link"), tag
        for name, value in attributes.items():
            assert not name.startswith("on") and "javascript:" not in (value or "") and name != "srcdoc"
            if name == "id":
                assert re.fullmatch(r"drawing-\d+-[\w.-]+", value), "ids are ours"
    for text in (f"distill{NAMES[0]}", f"finetune{NAMES[3]}", TEXTS[0], TEXTS[1], f"prune_{NAMES[2]}"):
        assert text in page.text, "it is shown as it is"
    assert "\x1b" not in page.text and "\\x1b]0;x\\x07 \\ud800 \\u202e" in page.text
    assert "these scores are left out" in page.text and TEXTS[0][:16] in page.text
    assert "could not convert string to float" in page.text and "Not looked at: 'link" in page.text

    from markdown_it import MarkdownIt

    kinds = []
    for text in (hostile[1], markdown):
        parsed = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
        kinds.append(Counter(one.type for token in parsed for one in (token, *(token.children or ()))))
    for kind in ("html_inline", "html_block", "link_open", "image", "em_open", "code_inline"):
        assert kinds[0][kind] == 0
    kinds = [{kind: n for kind, n in found.items() if kind not in ("softbreak", "hardbreak")} for found in kinds]
    assert kinds[0] == kinds[1]


def test_chromium_runs_nothing_of_a_run(hostile, tmp_path):
    """Without the page's policy, so that escaping alone is tried; with it, even what is not escaped does not run."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs one of {', '.join(names)} on the PATH; the test above reads the same page without one")
    policy = re.search(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", hostile[0])[0]
    shown = hostile[0].replace(policy, "")
    raw = shown.replace("</header>", f"{NAMES[0][2:]}{TEXTS[0]}</header>")

    def ran(html: str) -> bool:
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        flags = ["--headless", "--disable-gpu", "--no-sandbox", "--virtual-time-budget=2000", "--dump-dom"]
        call = [browser, *flags, f"--user-data-dir={tmp_path}/profile", file.as_uri()]
        done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=True)
        assert "what pruning did" in done.stdout
        return "data-ran" in re.search(r"<html[^>]*>", done.stdout)[0]

    assert ran(raw), "this browser shows what runs"
    assert not ran(shown)
    assert not ran(raw.replace("<title>", f"{policy}<title>"))


def test_what_cannot_be_seen_is_shown_as_its_escape():
    assert plain("a\tb\r\nc é 中 \u200d") == "a\tb\nc é 中 \u200d"
    assert plain("\0\x1b\x7f\x85\r\u2028\u202e\ud800") == "\\x00\\x1b\\x7f\\x85\\r\\u2028\\u202e\\ud800"
    assert short(["a"]) is None and short(" \n") is None and short("a\n b") == "a b"
    assert len(short("x" * 10**6)) == 200


# ------------------------------------------------------------------------------------------------------ kinds of file

READ = (
    "recipe.yaml",
    "metrics.json",
    "evaluation/teacher.json",
    "pruned.plan.yaml",
    "scores/scores.json",
    "scores/arrays.npz",
    "distill/events.out.tfevents.1",
    "finetune/metrics.csv",
    ".stages/prune.yaml",
    ".stages/prune.json",
)


def kept_out(folder: Path, name: str, kind: str, elsewhere: Path) -> None:
    """Put a ``kind`` of file at ``name``."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # its path may be 107 bytes long
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(here)
    else:
        path.symlink_to(elsewhere)


@pytest.mark.parametrize("kind", ["pipe", "socket", "link"])
def test_links_pipes_and_sockets_are_neither_followed_nor_opened(tmp_path, kind, hurry, capsys):
    secret = tmp_path / "secret"
    secret.write_text('{"val_loss": 9.8765, "name": "SECRET"}')
    run = tmp_path / "run"
    for name in READ:
        kept_out(run, name, kind, secret)
    with pytest.raises(MinitronError, match=r"is no run folder.*Not looked at: '\.stages/prune\.json' \(a"):
        run_command(f"run_dir={run}")
    (run / "evaluation" / "pruned.json").write_text(json.dumps(PRUNED))
    run_command(f"run_dir={run}")
    text = (run / "report.html").read_text()
    assert "SECRET" not in text and "9.8765" not in text and "9.877" not in text
    assert f"&#39;.stages/prune.json&#39; (a {kind})" in text and "and 5 more." in text


def test_linked_folders_are_not_entered(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    (other / "evaluation").mkdir(parents=True)
    (other / "evaluation" / "teacher.json").write_text(json.dumps(TEACHER))
    make_scores().write(other)
    log_events(other, {"train_lm_loss": {0: 2.0}})
    (other / "prune.yaml").write_text("SECRET: 1\n")
    run.mkdir()
    (run / "metrics.json").write_text(json.dumps({"pruned": PRUNED}))
    for name in ("scores", "distill", ".stages"):
        (run / name).symlink_to(other)
    (run / "evaluation").symlink_to(other / "evaluation")
    (run / "loop").symlink_to(".")
    found = read_run(run)
    assert set(found.metrics) == {"pruned"} and not found.trainings and not found.stages and found.scores is None
    assert "'.stages' (a link), 'distill' (a link), 'evaluation' (a link), 'loop' (a link)" in found.absent[-1]


def test_the_run_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"pruned": PRUNED}))
    (tmp_path / "latest").symlink_to("run")
    assert read_run(tmp_path / "latest").name == "run"


def test_names_that_are_not_utf8(tmp_path, capsys):
    run = tmp_path / os.fsdecode(b"run\xff\n\x1b[2J")
    (run / os.fsdecode(b"distill\xfe")).mkdir(parents=True)
    (run / os.fsdecode(b"distill\xfe") / "metrics.csv").write_text("step,train_kd_loss\n0,1.0\n")
    (run / os.fsdecode(b"bad\xfe\x1b[2J")).mkdir()
    (run / os.fsdecode(b"bad\xfe\x1b[2J") / "metrics.csv").write_text("step,train_kd_loss\n0,x\n")
    from omegaconf import OmegaConf

    from nemo_minitron.stages import report

    report.run(OmegaConf.create({"run_dir": str(run), "output_path": None}))
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "distill\\udcfe" in text and "run\\udcff" in text and "\x1b" not in text
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "bad\\udcfe\\x1b[2J" in printed


def test_a_mistake_is_one_line_whatever_a_name_holds(tmp_path, capsys):
    (tmp_path / "\x1b]0;x\x07\n\x1b[2Jminitron: done.plan.yaml").symlink_to("/etc/passwd")
    assert main(["report", f"run_dir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and said.startswith("minitron: run_dir: ") and "\x1b" not in said
    assert "\\x1b[2Jminitron: done.plan.yaml' (a link)" in said


# -------------------------------------------------------------------------------------------------------- the outputs


def test_the_pages_are_not_written_through_links(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir(), outside.mkdir()
    (run / "metrics.json").write_text(json.dumps({"pruned": PRUNED}))
    for name in ("report.html", "report.md"):
        (outside / name).write_text("precious")
        (run / name).symlink_to(outside / name)
    run_command(f"run_dir={run}")
    assert (run / "report.html").read_text().startswith("<!doctype html>") and not (run / "report.md").is_symlink()
    assert {file.read_text() for file in outside.iterdir()} == {"precious"}
    (run / "pages").symlink_to(outside)
    for way in (f"{run}/pages/page.html", f"{run}/pages/new/page.html"):
        with pytest.raises(MinitronError, match=r"output_path: expected no links within run_dir, found '.*/run/pages'"):
            run_command(f"run_dir={run}", f"output_path={way}")
    assert {file.name for file in outside.iterdir()} == {"report.html", "report.md"}


def test_what_looks_like_a_leftover_of_ours_is_not_waited_for(tmp_path, hurry):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text(json.dumps({"pruned": PRUNED}))
    os.mkfifo(run / ".report.html.01234567-89abcdef.tmp")
    os.mkfifo(run / "report.md")
    run_command(f"run_dir={run}")
    assert (run / "report.md").is_file()


# --------------------------------------------------------------------------------------------------- values and sizes

DEEP = "[" * 100_000
PLAN = make_plan_of(make_scores(), compensation=Compensation("t")).to_yaml()
VALUES = (
    "<b>",
    None,
    True,
    [],
    {},
    [[1]],
    -1,
    0,
    5e-324,
    1e308,
    10**400,
    float("nan"),
    float("inf"),
    -float("inf"),
    0.5,
)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:12])
def test_any_value_anywhere_gives_a_page(tmp_path, value):
    """Each JSON and YAML of a run with ``value`` for every value it has, then for all but the losses."""
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    (run / ".stages").mkdir()
    everything = dict.fromkeys(TEACHER, value)
    (run / "evaluation" / "teacher.json").write_text(json.dumps(everything | {"val_loss": 2.0}))
    (run / "evaluation" / "pruned.json").write_text(json.dumps(everything))
    (run / "metrics.json").write_text(json.dumps({"pruned": value, "distilled": PRUNED | {"val_loss": 2.5}}))
    (run / ".stages" / "prune.yaml").write_text("a: 1\n")
    record = dict.fromkeys(("state", "seconds", "fingerprint", "versions"), value)
    (run / ".stages" / "prune.json").write_text(json.dumps(record))
    if not isinstance(value, float):
        recipe = dict.fromkeys(("name", "description", "stages"), value) | {"order": [value, [value], {"a": value}]}
        (run / "recipe.yaml").write_text(json.dumps(recipe))
    rows = "".join(f"{step},{shown},{shown}\n" for step, shown in ((0, 1.5), (value, 2.5), (1, value)))
    (run / "finetune").mkdir()
    (run / "finetune" / "metrics.csv").write_text(f"step,train_lm_loss,tokens\n{rows}")
    page, _, _ = pages(run)
    assert "from 2.000 to 2.500 nats per token" in page.text and not re.search(r"nan(?!')|inf\b(?!')", page.text)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("metrics.json", DEEP, "metrics.json: expected JSON"),
        ("metrics.json", "[1]", "expected a JSON object, found list"),
        ("metrics.json", '{"a": 1' + "0" * 5000 + "}", "metrics.json: expected JSON"),
        ("evaluation/teacher.json", b"\xff\xfe", "teacher.json: expected JSON"),
        ("recipe.yaml", DEEP, "recipe.yaml: expected YAML"),
        ("recipe.yaml", "a: &a [1]\nb: *a\n", "an alias"),
        ("recipe.yaml", "a: !!python/object/apply:os.system [x]\n", "the tag"),
        (".stages/prune.json", "{", "prune.json: expected JSON"),
        ("pruned.plan.yaml", DEEP[:2000], "pruned.plan.yaml"),
        ("pruned.plan.yaml", PLAN.replace("hidden_size: 32", "hidden_size: 1000000000"), "pruned.plan.yaml"),
        ("pruned.plan.yaml", PLAN.replace("layers: 0-1 3", "layers: &a 0-1 3\n  x: *a"), "alias"),
        ("pruned.plan.yaml", PLAN.replace("ffn: 0.17", "ffn: 9" + "9" * 5000), "pruned.plan.yaml"),
        ("distill/metrics.csv", b"step,train_lm_loss\n\xff,1\n", "expected a training's metrics.csv"),
        ("distill/metrics.csv", "step,train_lm_loss\n0," + "9" * 200_000, "expected a training's metrics.csv"),
        ("distill/metrics.csv", "step,train_lm_loss\n0,<b>\n", "could not convert string to float: '<b>'"),
        ("distill/metrics.csv", "step,train_lm_loss\n" + "9" * 5000 + ",1\n", "expected a training's metrics.csv"),
    ],
)
def test_a_file_that_is_none_is_left_out_and_named(tmp_path, name, content, expected):
    run = tmp_path / "run"
    (run / ".stages").mkdir(parents=True)
    (run / ".stages" / "prune.yaml").write_text("a: 1\n")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (line,) = [line for line in read_run(run).absent if expected in line]
    assert len(line.splitlines()) == 1 and len(line) < 400


@pytest.mark.parametrize(
    "content", ["", "\n", "step\n", "train_lm_loss\n1\n", "step,train_lm_loss\n\n,\n0\n" + "9" * 300 + ",1\n"]
)
def test_a_csv_without_a_value_is_no_log(tmp_path, content):
    (tmp_path / "metrics.csv").write_text(content)
    assert curves.read_training(tmp_path) is None


def test_event_files_of_any_content(tmp_path):
    """Records that are longer than the file, no events, not of this kind, or of impossible values."""
    from tensorboard.compat.proto.event_pb2 import Event

    def record(data: bytes) -> bytes:
        return len(data).to_bytes(8, "little") + b"\0" * 4 + data + b"\0" * 4

    def scalar(step: int, value: float, tag: str = "train_lm_loss") -> bytes:
        event = Event(step=step)
        event.summary.value.add(tag=tag, simple_value=value)
        return record(event.SerializeToString())

    file = tmp_path / "events.out.tfevents.1"
    impossible = (
        scalar(-1, 1.0) + scalar(2**60, 1.0) + scalar(3, float("nan")) + scalar(4, 3e38) + scalar(5, 1.0, "<b>")
    )
    tensor = Event(step=6)
    shape = tensor.summary.value.add(tag="train_lm_loss").tensor
    shape.tensor_shape.dim.add(size=10**12)
    shape.float_val.append(1.0)
    many = Event(step=7)
    for _ in range(20_000):
        many.summary.value.add(tag="train_lm_loss", simple_value=9.0)
    long = record(b"\0" * (2 << 20))
    good = scalar(0, 5.0)
    middle = impossible + record(tensor.SerializeToString()) + long + scalar(1, 4.0)
    for end in (
        b"",
        b"\xff" * 8,
        (2**63).to_bytes(8, "little") + b"\0" * 99,
        record(b"\xff" * 9) + scalar(8, 1.0),
        good[:-1],
    ):
        file.write_bytes(good + middle + end)
        np.testing.assert_array_equal(curves.read_training(tmp_path).curves["train_lm_loss"].values, [5.0, 4.0])
    file.write_bytes(record(many.SerializeToString()))
    assert len(curves.read_training(tmp_path).curves["train_lm_loss"].values) == 1


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "metrics.json", "distill/events.out.tfevents.1", "distill/metrics.csv"]
)
def test_what_is_too_large_is_not_read(tmp_path, name):
    run = tmp_path / "run"
    (run / "distill").mkdir(parents=True)
    (run / ".stages").mkdir()
    for path in (run / name, run / ".stages" / "prune.yaml"):
        path.write_bytes(b"a: 1\n")
        os.truncate(path, 1 << 40)  # a hole: no such disk is needed
    found = read_run(run)
    assert [line for line in found.absent if name in line and "bytes, found 1,099,511,627,776" in line]
    assert len(found.stages[0].config) == 1 << 16, "of a config, the beginning is shown"


def test_numbers_of_files_are_bounded(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / ".stages").mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump({"order": ["prune_000"] * 5000}))
    for number in range(102):
        (run / ".stages" / f"prune_{number:03}.yaml").write_text("a: 1\n")
        (run / f"training_{number:03}").mkdir()
        (run / f"training_{number:03}" / "metrics.csv").write_text("step,train_lm_loss\n0,1.0\n")
    found = read_run(run)
    assert len(found.stages) == 100 and len({stage.name for stage in found.stages}) == 100
    assert [training.name for training in found.trainings] == [f"training_{n:03}" for n in range(16)]
    assert "Records of 102 stages are there: the first 100 are shown." in found.absent
    assert "Logs of 102 trainings are there: the first 16 are shown." in found.absent
    monkeypatch.setattr(inventory, "MOST_ENTRIES", 300)
    with pytest.raises(MinitronError, match="run': expected at most 300 files, found more"):
        read_run(run)
    for number in range(257):
        (run / "training_000" / f"events.out.tfevents.{number}").touch()
    with pytest.raises(MinitronError, match="expected at most 256 files of a log, found 257"):
        curves.read_training(run / "training_000")


def test_all_that_is_read_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(inventory, "MOST_BYTES", 100)
    (tmp_path / ".stages").mkdir()
    (tmp_path / "metrics.json").write_text(json.dumps({"pruned": PRUNED}))
    (tmp_path / ".stages" / "prune.yaml").write_text("a: 1\n")
    (line,) = [line for line in read_run(tmp_path).absent if "metrics.json" in line]
    assert line.endswith("metrics.json': expected at most 100 bytes to read in a folder, found more")


def test_folders_in_folders_without_end(tmp_path):
    deep = tmp_path / "run"
    (tmp_path / "run" / ".stages").mkdir(parents=True)
    (tmp_path / "run" / ".stages" / "prune.yaml").write_text("a: 1\n")
    for _ in range(200):
        deep = deep / "a"
    deep.mkdir(parents=True)
    assert "(32 folders deep)" in read_run(tmp_path / "run").absent[-1]


def test_shapes_and_scores_that_cannot_be_drawn_are_left_out(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "scores").mkdir(parents=True)
    (run / "metrics.json").write_text(json.dumps({"pruned": PRUNED}))
    scores = make_scores()
    published = scores.published | {"ffn": scores.published["ffn"] * 1e300}
    dataclasses.replace(scores, rankings={"minitron": published}).write(run / "scores")
    make_plan_of(scores).save(run / "pruned.plan.yaml")
    found = read_run(run)
    assert found.plan is not None and found.scores is None
    assert any("expected scores of at most 1e+30, found larger ones" in line for line in found.absent)
    monkeypatch.setattr(run_folder, "_MOST_LAYERS", 3)
    found = read_run(run)
    assert found.plan is None and any("expected at most 3 layers" in line for line in found.absent)


@pytest.mark.parametrize("low", [0.0, 5e-324, -1e30])
def test_scores_of_any_size_are_drawn(tmp_path, low):
    run = tmp_path / "run"
    (run / "scores").mkdir(parents=True)

    def draw(size: tuple[int, ...]) -> np.ndarray:
        array = np.full(size, 1e30)
        array.flat[:1] = low
        return array

    made(SHAPE, draw).write(run / "scores")
    page, html, _ = pages(run)
    assert page.count("svg") == 5 and "nan" not in html.lower()
