"""Which files of a folder are read: by names, by a README.md as datasets itself understands it, and what is refused."""

from __future__ import annotations

import json
import os

import pytest

from nemo_minitron.data.sources import Source
from nemo_minitron.errors import MinitronError


def texts(path, **options) -> list[str]:
    return [row[0] for row, _ in Source(str(path), **options).documents()]


def refused(path, **options) -> str:
    with pytest.raises(MinitronError) as error:
        texts(path, **options)
    return str(error.value)


def fill(folder, *names: str):
    """A jsonl file of one record, its own name, at every path."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    return folder


def readme(folder, head: str):
    (folder / "README.md").write_text(f"---\nlicense: mit\n{head}---\n# About\n")
    return folder


CONFIGS = """configs:
- config_name: en
  data_files:
  - split: train
    path: data/en-*.jsonl
  - split: validation
    path: [data/held.jsonl, data/more/held.jsonl]
- config_name: de
  default: true
  data_files: "data/de-*.jsonl"
"""


@pytest.fixture
def repository(tmp_path):
    fill(tmp_path, "data/en-0.jsonl", "data/en-1.jsonl", "data/held.jsonl", "data/more/held.jsonl", "data/de-0.jsonl")
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    return readme(tmp_path, CONFIGS)


def test_a_repository_is_read_as_datasets_reads_it(repository, tmp_path_factory):
    import datasets

    cache = str(tmp_path_factory.mktemp("cache"))
    for config, split in ((None, "train"), ("de", "train"), ("en", "train"), ("en", "validation")):
        expected = datasets.load_dataset(str(repository), config, split=split, cache_dir=cache)["text"][:]
        assert texts(repository, config=config, split=split) == expected, (config, split)
    assert texts(repository, config="en", split="dev") == ["data/held.jsonl", "data/more/held.jsonl"]


@pytest.mark.parametrize(
    ("head", "options", "said"),
    [
        (CONFIGS.replace("default: true", "default: false"), {}, "several configurations ['en', 'de']"),
        (CONFIGS, {"config": "dee"}, "no configuration 'dee' in"),
        (CONFIGS, {"config": "en", "split": "test"}, "no 'test' of configuration 'en'"),
        (CONFIGS.replace("de-*", "fr-*"), {}, "names 'data/fr-*.jsonl', of which there is no file"),
        (CONFIGS.replace('"data/de-*.jsonl"', "../*.jsonl"), {}, "expected paths inside of its own folder"),
        (CONFIGS.replace('"data/de-*.jsonl"', "https://a.b/c.jsonl"), {}, "expected paths inside of its own folder"),
        (CONFIGS.replace('"data/de-*.jsonl"', "hf://datasets/a/b"), {}, "expected paths inside of its own folder"),
        (CONFIGS.replace('"data/de-*.jsonl"', "/etc/*"), {}, "expected paths inside of its own folder"),
        (CONFIGS.replace('"data/de-*.jsonl"', "README.md"), {}, "whose extension is unknown"),
        (CONFIGS.replace('"data/de-*.jsonl"', "[{path: 1}]"), {}, "data_files must be paths"),
        (CONFIGS + "  field: data\n", {}, "configuration 'de' is to be read with ['field'], which is not supported"),
        ("configs: 5\n", {}, "configs must be a list of configurations"),
        ("configs: [\n", {}, "expected YAML"),
        ("a: &a [1]\nconfigs: *a\n", {}, "expected YAML of plain values, found: an alias"),
    ],
)
def test_readmes_that_cannot_be_followed(repository, head, options, said):
    message = refused(readme(repository, head), **options)
    assert (said in message and "README.md" in message) or "several configurations" in said


def test_other_readmes_say_nothing(repository):
    for text in ("# About\n", "---\nlicense: mit\n---\n", "--- no yaml\n", "---\na rule: [\n---\n"):
        (repository / "README.md").write_text(text)
        assert len(texts(repository)) == 5


def test_data_dir_of_a_configuration(tmp_path):
    fill(tmp_path, "a/train.jsonl", "a/test.jsonl", "b/train.jsonl")
    readme(tmp_path, "configs:\n- config_name: x\n  data_dir: a\n")
    assert texts(tmp_path) == ["a/train.jsonl"] and texts(tmp_path, split="test") == ["a/test.jsonl"]


def test_folders_named_by_split(tmp_path):
    fill(tmp_path, "train/a.jsonl", "train/deep/b.jsonl", "test/a.jsonl", "val.jsonl")
    assert texts(tmp_path) == ["train/a.jsonl", "train/deep/b.jsonl"]
    assert texts(tmp_path, split="test") == ["test/a.jsonl"] and texts(tmp_path, split="validation") == ["val.jsonl"]
    fill(tmp_path, "more/train/a.jsonl")
    assert "several configurations ['.', 'more']" in refused(tmp_path)
    assert texts(tmp_path, config="more") == ["more/train/a.jsonl"]


def test_scripts_are_named_and_never_run(tmp_path):
    canary = tmp_path / "canary"
    for name, text in {"set.py": "", "other.py": "class A(datasets.GeneratorBasedBuilder):\n    pass\n"}.items():
        folder = fill(tmp_path / name / "set", "data/train.jsonl")
        (folder / name).write_text(f"open({str(canary)!r}, 'w')\n{text}")
        assert f"{name}' is a data set's script, which is not run" in refused(folder)
        assert texts(folder / "data") == ["data/train.jsonl"]
    (folder / "other.py").write_text("print('a tool beside the data')")
    assert texts(folder) == ["data/train.jsonl"]
    assert not canary.exists()


def test_kinds_side_by_side(tmp_path):
    fill(tmp_path, "a.jsonl", "c/d.jsonl")
    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / "c" / "c.csv").write_text("id,text\n1,column\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / ".hidden.jsonl").write_text("not read")
    assert texts(tmp_path) == ["a.jsonl", "plain", "column", "c/d.jsonl"]


def test_links_are_followed_once(tmp_path):
    fill(tmp_path / "real", "a.jsonl")
    fill(tmp_path / "data", "b.jsonl")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "data" / "round").symlink_to(tmp_path / "data")
    assert texts(tmp_path / "data") == ["b.jsonl", "a.jsonl"]
    (tmp_path / "data" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    assert "gone.jsonl: cannot be read: No such file" in refused(tmp_path / "data")


def test_pipes_are_refused(tmp_path):
    fill(tmp_path, "a.jsonl")
    for name in ("b.jsonl", "c.tgz", "d"):
        os.mkfifo(tmp_path / name)
        assert f"{name}: expected a regular file, found a pipe" in refused(tmp_path / name)
    assert "b.jsonl: expected a regular file, found a pipe" in refused(tmp_path)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    fill(tmp_path, "a.jsonl", "locked/b.jsonl")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may list everything
    assert "locked: cannot be read: Permission denied" in refused(tmp_path)
