"""Recipes: what runs, what is skipped, where a failed run resumes; and the tiny one, really walked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from nemo_minitron import recipe
from nemo_minitron.config.compose import compose, configure, group_options
from nemo_minitron.errors import MinitronError
from nemo_minitron.report.measures import ROLES, gap_closed

METRICS = {
    "num_parameters": 2_000_000,
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 192,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "perplexity": 20.0,
    "peak_memory_bytes": 2**30,
}

FILE = """
name: demo
order: [first, second, third]
settings: {precision: 32, steps: 3}
stages:
  first:
    command: convert
    config: {input_name_or_path: "${run_dir}/../source", output_path: "${run_dir}/a.nemo"}
    inputs: ["${run_dir}/../source"]
    outputs: ["${run_dir}/a.nemo"]
  second:
    command: convert
    config:
      input_name_or_path: ${run_dir}/a.nemo
      output_path: ${run_dir}/b.nemo
      precision: ${recipe.settings.precision}
    inputs: ["${run_dir}/*.nemo", "${run_dir}/a.nemo"]
    outputs: ["${run_dir}/b.nemo"]
    work: ${run_dir}/work
  third:
    command: convert
    config: {input_name_or_path: "${run_dir}/b.nemo", output_path: "${run_dir}/c.nemo"}
    inputs: ["${run_dir}/b.nemo"]
    outputs: ["${run_dir}/c.nemo"]
roles: {teacher: "${run_dir}/teacher.json"}
"""


class Demo:
    """A recipe of three stages whose commands copy their input; counts what really runs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        self.ran: list[str] = []
        self.fail: set[str] = set()
        self.silent: set[str] = set()
        self.launch = None
        folder.joinpath("source").mkdir()
        folder.joinpath("source", "weights").write_text("1")
        self.write(FILE.replace('"${run_dir}/*.nemo", ', ""))
        monkeypatch.setattr(recipe.walk, "_launch", self._launch)

    def write(self, text: str) -> None:
        (self.folder / "demo.yaml").write_text(text)

    def _launch(self, argv: list[str]) -> int:
        folder, name = argv[2], argv[4]
        cfg = OmegaConf.load(Path(folder) / name)
        stage = name.removesuffix(".yaml")
        self.ran.append(stage)
        if stage == "second":
            (self.run_dir / "work").mkdir(exist_ok=True)
            (self.run_dir / "work" / str(len(self.ran))).touch()
        if stage in self.fail:
            return 2
        if self.launch is not None:
            return self.launch(argv)
        if stage not in self.silent:
            source = Path(cfg.input_name_or_path)
            source = source / "weights" if source.is_dir() else source
            Path(cfg.output_path).write_text(source.read_text() + stage + str(cfg.precision))
        return 0

    def __call__(self, *overrides: str) -> list[str]:
        self.ran = []
        cfg = configure("run", [f"recipe={self.folder}/demo.yaml", f"run_dir={self.run_dir}", *overrides])
        recipe.run(cfg, compose)
        return self.ran


@pytest.fixture
def demo(tmp_path, monkeypatch):
    return Demo(tmp_path, monkeypatch)


ALL = ["first", "second", "third"]


def test_a_second_call_skips_everything_and_says_so(demo, capsys):
    assert demo() == ALL
    capsys.readouterr()
    assert demo() == []
    out = capsys.readouterr().out
    assert out.count("up to date, skipped") == 3 and "[2/3] second" in out


def test_dates_do_not_matter_but_content_does(demo):
    demo()
    weights = demo.folder / "source" / "weights"
    weights.touch()
    assert demo() == []
    weights.write_text("2")
    assert demo() == ALL
    assert (demo.run_dir / "c.nemo").read_text().startswith("2")


def test_content_under_the_same_size_and_dates_counts(demo):
    """As ``cp -p`` or ``rsync -t`` may leave it."""
    demo()
    weights = demo.folder / "source" / "weights"
    before = weights.stat()
    text = weights.read_text()
    weights.write_text("2" if text != "2" else "3")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size and weights.stat().st_ino == before.st_ino
    assert demo() == ALL


def test_a_new_file_in_an_input_folder_counts(demo):
    demo()
    (demo.folder / "source" / "config").touch()
    # the first stage writes the same bytes again, so that nothing after it has changed
    assert demo() == ["first"]


def test_a_changed_setting_runs_its_stage_and_what_follows(demo):
    demo()
    assert demo("recipe.settings.precision=bf16") == ["second", "third"]
    assert demo("recipe.settings.precision=bf16") == []
    assert demo("recipe.settings.steps=4") == ["second", "third"], "back to 32; steps is used by nothing"


def test_an_output_that_went_or_changed_is_made_again(demo):
    demo()
    (demo.run_dir / "b.nemo").unlink()
    assert demo() == ["second"]
    (demo.run_dir / "b.nemo").write_text("other")
    assert demo() == ["second"]


def test_the_recipe_and_the_versions_are_kept(demo):
    demo("recipe.settings.precision=bf16")
    record = json.loads((demo.run_dir / ".stages" / "second.json").read_text())
    assert record["versions"]["torch"] == metadata.version("torch") and "nemo_minitron" in record["versions"]
    kept = demo.run_dir / "recipe.yaml"
    cfg = configure("run", [f"recipe={kept}", f"run_dir={demo.run_dir}"])
    demo.ran = []
    recipe.run(cfg, compose)
    assert demo.ran == [] and cfg.recipe["settings"]["precision"] == "bf16"


def test_another_version_of_the_package_runs_again(demo, monkeypatch):
    demo()
    monkeypatch.setattr(recipe.records, "__version__", "another")
    assert demo() == ALL


def test_force_and_stages(demo):
    demo()
    assert demo("force=true") == ALL
    assert demo("force=true", "stages=[second]") == ["second"]
    with pytest.raises(MinitronError, match=r"no stage 'secnd'\. Did you mean 'second'"):
        demo("stages=[secnd]")


def test_chosen_stages_run_in_the_order_of_the_recipe(demo):
    demo()
    (demo.folder / "source" / "weights").write_text("2")
    assert demo("stages=[third,second,first]") == ALL
    assert (demo.run_dir / "c.nemo").read_text().startswith("2")


def test_a_chosen_stage_says_that_what_it_reads_is_of_other_settings(demo, capsys):
    demo()
    capsys.readouterr()
    assert demo("recipe.settings.precision=bf16", "stages=[third]") == []
    said = "third: reads what stage 'second' wrote, and stage 'second' was another then"
    assert said in capsys.readouterr().out
    (demo.folder / "source" / "weights").write_text("2")
    assert demo("stages=[third]") == []
    assert "third: reads what stage 'second' wrote, and stage 'first' was another then" in capsys.readouterr().out
    assert demo() == ALL and demo("stages=[third]") == []
    assert "was another then" not in capsys.readouterr().out


def test_an_evaluation_of_other_settings_is_compared_with_nothing(demo, capsys):
    """It would say of the new model what was measured of the old one."""
    text = FILE.replace('"${run_dir}/*.nemo", ', "").replace("c.nemo", "teacher.json")
    demo.write(text)
    measured = json.dumps(METRICS | {"val_loss": 3.0})
    (demo.folder / "source" / "weights").write_text(measured)

    def launch(argv):
        cfg = OmegaConf.load(Path(argv[2]) / argv[4])
        Path(cfg.output_path).write_text(measured[:-1] + f', "precision": "{cfg.precision}"' + "}")
        return 0

    demo.launch = launch
    demo()
    first = capsys.readouterr().out
    assert "\nteacher" in first and "left out" not in first
    assert json.loads((demo.run_dir / "metrics.json").read_text())["teacher"]["val_loss"] == 3.0
    demo("recipe.settings.precision=bf16", "stages=[second]")
    out = capsys.readouterr().out
    path = demo.run_dir / "teacher.json"
    assert f"teacher: left out, as {path} is of stage 'third' as it was before" in out and "3.0000" not in out
    assert not (demo.run_dir / "metrics.json").exists()
    demo("recipe.settings.precision=bf16")
    assert "left out" not in (out := capsys.readouterr().out) and "3.0000" in out


@pytest.mark.parametrize("named", ["file", "folder"])
def test_what_a_configuration_names_decides_as_inputs_do(demo, named):
    """A text in a setting, a tokenizer of one's own: the recipe's author could not declare them."""
    given = demo.folder / "own"
    if named == "folder":
        given.mkdir()
    file = given / "tokenizer.json" if named == "folder" else given
    file.write_text("1")
    key = f"recipe.stages.second.config.tokenizer.type={given}"
    assert demo(key) == ALL and demo(key) == []
    file.write_text("2")
    assert demo(key) == ["second"] and demo(key) == []


def test_a_failed_stage_is_named_and_the_run_resumes_there(demo):
    demo.fail = {"second"}
    with pytest.raises(MinitronError, match=r"stage 'second' failed .*exit status 2"):
        demo()
    demo.fail = set()
    assert demo() == ["second", "third"]


def test_checkpoints_are_kept_for_a_resumption_and_dropped_for_another_config(demo):
    demo.fail = {"second"}
    with pytest.raises(MinitronError):
        demo()
    left = set((demo.run_dir / "work").iterdir())
    with pytest.raises(MinitronError):
        demo()
    assert left < set((demo.run_dir / "work").iterdir()), "the same configuration resumes"
    demo.fail = set()
    demo("recipe.settings.precision=bf16")
    assert len(list((demo.run_dir / "work").iterdir())) == 1, "another one starts afresh"


def test_a_stage_must_write_what_it_declares(demo):
    demo.silent = {"third"}
    with pytest.raises(MinitronError, match=r"stage 'third' .*did not write .*c\.nemo"):
        demo()
    demo.silent = set()
    assert demo() == ["third"]


def test_an_absent_input_is_named_before_its_stage_starts(demo):
    (demo.folder / "source" / "weights").unlink()
    (demo.folder / "source").rmdir()
    with pytest.raises(MinitronError, match=r"stage 'first': input .*source does not exist"):
        demo()
    assert demo.ran == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("third]", "thrid]", "no stage 'thrid'. Did you mean 'third'"),
        ("command: convert", "command: convrt", "no command 'convrt'. Did you mean 'convert'"),
        ("outputs:", "output:", "Did you mean 'recipe.stages.first.outputs'"),
        ("output_path:", "output_pth:", "Did you mean 'recipe.stages.first.config.output_path'"),
        ("work: ${run_dir}/work", "work: /", "expected a folder inside"),
        ("roles: {teacher", "roles: {techer", "found 'techer'"),
        ("precision: 32", "precision: [1]", "stage 'second': precision"),
        ("order:", "ordr:", "Did you mean 'recipe.order'"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(demo, old, new, expected):
    demo.write((demo.folder / "demo.yaml").read_text().replace(old, new, 1))
    with pytest.raises(MinitronError) as caught:
        demo()
    assert expected in str(caught.value) and demo.ran == []


def test_unwritable_run_dir(demo):
    demo.run_dir.write_text("a file")
    with pytest.raises(MinitronError, match=r"run_dir .*cannot be written"):
        demo()


# -------------------------------------------------------------------------------------------------------- metrics


def test_metrics_table_and_gap(tmp_path, capsys):
    roles = {}
    for role, loss in (("teacher", 3.0), ("pruned", 5.0), ("distilled", 3.5)):
        roles[role] = str(tmp_path / f"{role}.json")
        Path(roles[role]).write_text(json.dumps(METRICS | {"val_loss": loss}))
    recipe.report(roles, {}, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics) == ["teacher", "pruned", "distilled"] and metrics["pruned"]["val_loss"] == 5.0
    out = capsys.readouterr().out
    assert "closed 75.0% of the loss that pruning cost" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(("teacher", "pruned", "distilled"))]
    assert rows[1][:7] == ["pruned", "2.0M", "4", "64", "192", "8/4", "5.0000"]


@pytest.mark.parametrize(
    "key", ["trainer.max_time", "exp_manager.max_time_per_run", "exp_manager.create_early_stopping_callback"]
)
def test_tokens_are_told_of_trainings_that_have_all_their_steps(tmp_path, capsys, key):
    roles = {}
    for role, loss in (("teacher", 3.0), ("pruned", 5.0), ("distilled", 3.5)):
        roles[role] = str(tmp_path / f"{role}.json")
        Path(roles[role]).write_text(json.dumps(METRICS | {"val_loss": loss}))
    sizes = {
        "trainer": {"max_steps": 10},
        "model": {"global_batch_size": 2, "data": {"seq_length": 8}},
        "exp_manager": {},
    }
    config = OmegaConf.create(sizes)
    stages = {"distill": SimpleNamespace(command="distill", config=config)}
    recipe.report(roles, stages, tmp_path)
    assert "distillation on 160 tokens closed 75.0%" in capsys.readouterr().out
    OmegaConf.update(config, key, "00:01:00:00", force_add=True)
    recipe.report(roles, stages, tmp_path)
    assert "\ndistillation closed 75.0%" in capsys.readouterr().out


def test_gap_needs_all_three_and_a_cost():
    assert gap_closed({"teacher": {"val_loss": 1.0}}) is None
    assert gap_closed({role: {"val_loss": 1.0} for role in ROLES}) is None


def test_an_incomplete_evaluation_is_named():
    with pytest.raises(MinitronError, match="evaluation of 'teacher' lacks 'val_loss'"):
        recipe.table({"teacher": METRICS})


# -------------------------------------------------------------------------------------------------- shipped recipes


@pytest.mark.parametrize("name", group_options("recipe"))
def test_shipped_recipes_fit_together(name, tmp_path):
    """Every stage's config is valid, and what a stage reads is given or written by an earlier one."""
    source = tmp_path / "given"
    overrides = [] if name == "tiny" else [f"recipe.settings.source={source}"]
    cfg = configure("run", [f"recipe={name}", f"run_dir={tmp_path}/run", *overrides])
    assert cfg.recipe["name"] == name and cfg.recipe["description"]
    written = {str(source), f"{tmp_path}/run/recipe.yaml"}
    for stage in recipe.load_stages(cfg, compose).values():
        for pattern in stage.inputs:
            prefix = pattern.partition("*")[0]
            assert any(path.startswith(prefix) for path in written), f"{stage.name} reads {pattern}"
        written |= set(stage.outputs)
    assert set(cfg.recipe["roles"].values()) <= written


def test_smollm2_keeps_71_percent():
    from nemo_minitron.model.shape import shape_of

    settings = compose("run", ["recipe=smollm2_135m", "recipe.settings.source=x"]).recipe.settings
    teacher = shape_of(compose("synthesize", ["model=smollm2_135m", "output_path=x"]).model)
    student = teacher.replace(hidden_size=settings.hidden_size, ffn_hidden_size=settings.ffn_hidden_size)
    assert student.num_parameters() / teacher.num_parameters() == pytest.approx(0.71, abs=0.01)


def test_tiny_recipe_from_nothing_to_an_hf_folder(tmp_path):
    """The real thing, every stage in its own process; a second call skips all."""
    command = [sys.executable, "-m", "nemo_minitron", "run", "recipe=tiny", f"run_dir={tmp_path / 'run'}"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics) == {"teacher", "pruned", "distilled"}
    for values in metrics.values():
        assert {"val_loss", *METRICS} <= set(values)
    losses = [metrics[role]["val_loss"] for role in ("teacher", "distilled", "pruned")]
    assert losses == sorted(losses)
    assert metrics["pruned"]["hidden_size"] == 32 and metrics["teacher"]["hidden_size"] == 64

    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    assert student.num_parameters() == metrics["distilled"]["num_parameters"]

    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0 and second.stdout.count("up to date, skipped") == 16

    page = (tmp_path / "run" / "report.html").read_text()
    assert f"{metrics['distilled']['val_loss']:.4f}" in page and "What is not here" not in page
    for run in (first, second):
        assert f"report: {(tmp_path / 'run' / 'report.html').as_uri()}" in run.stdout


def test_sigterm_is_passed_on_to_the_stage(monkeypatch):
    """It leaves ``join`` as SystemExit; at exit multiprocessing would wait for the stage to end by itself."""
    done = []

    class Forked:
        exitcode = -15

        def join(self):
            done.append("join")
            if len(done) == 2:
                raise SystemExit(143)

    for name in ("start", "terminate"):
        setattr(Forked, name, lambda _, name=name: done.append(name))
    context = SimpleNamespace(Process=lambda **_: Forked())
    monkeypatch.setattr(recipe.walk.lifeline, "fork_server", lambda preload: context)
    monkeypatch.setattr(recipe.walk.Path, "exists", lambda self: False)
    with pytest.raises(SystemExit):
        recipe.walk._launch(["convert"])
    assert done == ["start", "join", "terminate", "join"]
