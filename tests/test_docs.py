"""What the documents show is there and runs: every command of a ``console`` block, on a tiny model; every path and key.

The blocks of all files run in order in one folder, as a reader would type them, those of ``FIRST_FILES`` first. A
command is first composed as it stands, so that no key or value is out of date; then each of its words that is too large
for a test is replaced by what ``WORDS`` says, and it runs. What cannot run here (other programs, other machines) is
named in ``ELSEWHERE`` with the file that it is about. A command of which neither is known fails.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_minitron import recipe
from nemo_minitron.cli import main, parse
from nemo_minitron.config import check
from nemo_minitron.config.compose import compose
from nemo_minitron.config.keys import keys
from nemo_minitron.config.schema import COMMANDS
from nemo_minitron.config.sections import Cluster
from tests.llamas import GQA
from tests.zygote import Zygote, end_children

ROOT = Path(__file__).parents[1]
FIRST_FILES = [ROOT / "README.md", ROOT / "docs" / "llama_8b.md"]
"""Their commands make what those of the other pages read."""
FILES = [*dict.fromkeys([*FIRST_FILES, *sorted((ROOT / "docs").glob("*.md"))]), ROOT / "CONTRIBUTING.md"]

# -------------------------------------------------------------------------------------------- from 8B to a tiny model

WORDS: dict[str, list[str]] = {
    "input_name_or_path=/models/Meta-Llama-3.1-8B": ["input_name_or_path=models/tiny"],
    "recipe.settings.source=/models/Meta-Llama-3.1-8B": [
        "recipe.settings.source=models/tiny", "recipe.settings.text=text/wikitext", "recipe.settings.workers=1",
        "recipe.settings.seq_length=32", "recipe.settings.calibration_samples=8", "recipe.settings.finetune_steps=2",
        "recipe.settings.max_steps=2", "recipe.settings.val_check_interval=2", "recipe.settings.limit_val_batches=1",
        "recipe.settings.global_batch_size=2", "recipe.settings.devices=1", "recipe.settings.sequence_parallel=false",
        "recipe.settings.tensor_model_parallel_size=1", "recipe.settings.keep_checkpoints=false",
    ],
    "recipe=llama3_1_8b_width": [
        "recipe=llama3_1_8b_width", "recipe.stages.prune.overrides=[]", "recipe.settings.hidden_size=48",
        "recipe.settings.ffn_hidden_size=64",
    ],
    "recipe=llama3_1_8b_depth": [
        "recipe=llama3_1_8b_depth", "recipe.stages.prune.overrides=[]", "recipe.settings.drop_layers=[2]",
    ],
    "recipe=llama3_1_8b_width_1gpu": [
        "recipe=llama3_1_8b_width_1gpu", "recipe.stages.prune.overrides=[]", "recipe.settings.hidden_size=48",
        "recipe.settings.ffn_hidden_size=64", "recipe.stages.importance.config.calibration.seq_length=32",
    ],
    "prune=minitron_4b_width": ["prune.hidden_size=48", "prune.ffn_hidden_size=64"],
    "input=wikitext": ["input=text/wikitext"],
    "workers=32": ["workers=1"],
    "model.data.seq_length=8192": ["model.data.seq_length=32"],
    "calibration.seq_length=8192": ["calibration.seq_length=32", "calibration.num_samples=8"],
    "evaluate.seq_length=8192": ["evaluate.seq_length=32", "evaluate.num_samples=8"],
    "trainer.max_steps=30": ["trainer.max_steps=2"],
    "trainer.val_check_interval=10": ["trainer.val_check_interval=2"],
    "model.global_batch_size=128": ["model.global_batch_size=2"],
    "trainer.devices=8": ["trainer.devices=2"],
    "model.tensor_model_parallel_size=8": ["model.tensor_model_parallel_size=2"],
    "evaluate.prefill_tokens=2048": ["evaluate.prefill_tokens=16"],
    "evaluate.decode_tokens=128": ["evaluate.decode_tokens=4"],
    "evaluate.batch_size=8": ["evaluate.batch_size=2"],
    "evaluate.lm_eval.tasks=[arc_easy,hellaswag]": ["evaluate.lm_eval.tasks=[tests/tasks/everyday.yaml]"],
    "budget.num_parameters=100e6": [
        "budget.num_parameters=110e3", "search.probes=[]", "search.measure=1", "search.validate=0",
        "search.finalists=1", "search.distill_steps=2",
    ],
    "run_dir=runs/smollm2_135m": ["run_dir=runs/llama3_1_8b_width"],
    "--config-path=/results/distill": ["--config-path=results/distill"],
}  # fmt: skip
"""Word of a documented command → words on the tiny model; all others stay. Every entry must be used."""

PATHS = {"/shared/train_": "data/train_", "/shared/validation_": "data/validation_", "/shared/": ""}
"""Where the files of the documents' file server are in the folder in which the commands run."""

TRAINING = [
    "trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=1", "model.data.seq_length=32",
    "model.global_batch_size=2",
]  # fmt: skip
FIRST = {"finetune": TRAINING, "distill": TRAINING, "search": [*TRAINING[1:], "evaluate.seq_length=32"]}
"""Words put before those of a command, where it leaves what is large to its defaults."""

DISTILL = [
    "model.restore_from_path=pruned.nemo", "model.kd_teacher_restore_from_path=corrected.nemo",
    "model.nemo_path=again.nemo",
    "model.data.data_prefix={train:[1.0,data/train_text_document],validation:[data/validation_text_document]}",
]  # fmt: skip
REST = {
    "-m nemo_minitron distill …": ["-m", "nemo_minitron", "distill", *DISTILL],
    "minitron distill …": ["minitron", "distill", *DISTILL],
    "minitron search …": ["minitron", "search", "scores=scores", "output_path=search", "budget.num_parameters=100e6"],
    "… ": ["minitron", "distill", *DISTILL, "+cluster=slurm", "cluster.dry_run=true"],
}
"""What an ellipsis stands for; the first that is found counts."""

ELSEWHERE = {
    "llama-quantize student.gguf student-Q4_K_M.gguf Q4_K_M": "nemo_minitron/checkpoint/gguf_write.py",
    "git clone <this repository> nemo_minitron && cd nemo_minitron": "Makefile",
    "salloc --nodes=1 --gpus-per-node=8 --exclusive": "docs/running.md",
    "git clone https://github.com/NVIDIA/NeMo-Framework-Launcher": "integrations/nemo_launcher/minitron_launcher.py",
    "python3 -m venv launcher && launcher/bin/pip install hydra-core==1.3.2 requests tqdm zstandard hera pydantic "
    "kubeflow-training kubernetes": "tests/test_nemo_launcher.py",
    "NEMO_LAUNCHER_PATH=$PWD/NeMo-Framework-Launcher NEMO_LAUNCHER_PYTHON=$PWD/launcher/bin/python "
    "pytest tests/test_nemo_launcher.py": "tests/test_nemo_launcher.py",
}
"""Commands of the network and of other machines → the file here that they are about."""

LAUNCHERS_OWN = {
    "launcher_scripts_path", "cluster_type", "cluster.partition", "cluster.account", "container", "container_mounts",
    "data_dir", "base_results_dir", "stages",
}  # fmt: skip
"""Keys of the NeMo Framework Launcher itself."""


# ------------------------------------------------------------------------------------------------------- the commands


@dataclass(frozen=True)
class Shown:
    """A command of a ``console`` block: where it stands, its text in one line, and the output shown below it."""

    file: str
    line: int
    text: str
    output: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {' '.join(self.text.split()[:2])}"


def commands(file: Path) -> Iterator[Shown]:
    """Commands of a file in order; shell variables set before are put in."""
    lines, variables = file.read_text().splitlines(), {"PWD": "$PWD"}
    starts = [i for i, line in enumerate(lines) if line == "```console"]
    for start in starts:
        end = lines.index("```", start)
        found: list[tuple[int, str, list[str]]] = []
        for number, line in enumerate(lines[start + 1 : end], start + 2):
            if line.startswith("$ "):
                found.append((number, line[2:], []))
            elif found and found[-1][1].endswith("\\"):
                number, text, _ = found[-1]
                found[-1] = (number, f"{text[:-1].strip()} {line.strip()}", [])
            elif line.strip():
                assert found, f"{file.name}:{number}: a console block begins with a command"
                found[-1][2].append(line)
        for number, text, output in found:
            text = re.sub(r"\$(\w+)", lambda match: variables[match[1]], text)
            if match := re.fullmatch(r"(\w+)=('[^']*'|\"[^\"]*\")", text):
                variables[match[1]] = match[2][1:-1]
            else:
                yield Shown(file.name, number, text, tuple(output))


SHOWN = [shown for file in FILES for shown in commands(file)]


def words_of(shown: Shown) -> list[str]:
    """The command's words as a shell would have them, ellipses filled in."""
    for ellipsis, instead in REST.items():
        head, found, tail = shown.text.partition(ellipsis)
        if found and (ellipsis != "… " or not head):
            return [*shlex.split(head), *instead, *shlex.split(tail, comments=True)]
    return shlex.split(shown.text, comments=True)


def minitron_words(words: list[str]) -> list[str] | None:
    """Arguments of ``minitron`` in a command that is ours; checks torchrun's own arguments."""
    if words[0] == "minitron":
        return words[1:]
    if words[:3] == ["python", "-m", "nemo_minitron"]:
        return words[3:]
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words[1:])
        assert parsed.module and parsed.training_script == "nemo_minitron"
        return parsed.training_script_args
    return None


def tiny(words: list[str]) -> list[str]:
    """The same command on the tiny model."""
    small = [part for word in words for part in WORDS.get(word, [word])]
    for shared, here in PATHS.items():
        small = [word.replace(shared, here) for word in small]
    return [small[0], *FIRST.get(small[0], []), *small[1:]]


def compose_as_shown(argv: list[str], complete: bool = True) -> None:
    """Every key, value and group choice is known, at the sizes that are shown."""
    arguments = parse(argv)
    assert arguments.command in COMMANDS
    if arguments.config_path is None:  # a file of the reader's; the tiny command reads one
        compose(arguments.command, arguments.overrides, complete=complete and arguments.cfg is None)


def run(argv: list[str], home: str) -> tuple[int, str]:
    """A rank's work: the command line in ``home``; its status and what it printed."""
    os.chdir(home)
    recipe.walk._launch = _forked
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main(argv)
    return status, printed.getvalue()


def _forked(argv: list[str], log: Path | None = None) -> int:
    """A stage of a recipe in a fork of this process, which has imported NeMo."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            sys.stdout = sys.stderr = open(log or 2, "w", closefd=log is not None)  # noqa: SIM115
            status = main(argv)
            sys.stdout.flush()
        finally:
            end_children()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        handle = Zygote()
    yield handle
    handle.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The reader's folder: a model, WikiText as the hub lays it out, and a config file of an earlier job."""
    from pydoc_data.topics import topics

    import pyarrow
    from pyarrow import parquet
    from transformers import AutoTokenizer

    from nemo_minitron.synthetic import make_llama
    from tests.data.chats import VICUNA

    folder = tmp_path_factory.mktemp("reader")
    make_llama(folder / "models" / "tiny", GQA)
    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "tiny")
    tokenizer.chat_template = VICUNA
    tokenizer.save_pretrained(folder / "models" / "tiny")
    chats = [
        [{"role": "user", "content": name}, {"role": "assistant", "content": topics[name][:99]}] for name in topics
    ]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    text = folder / "text" / "wikitext" / "wikitext-103-v1"
    text.mkdir(parents=True)
    articles = [[f" = {name} = \n", *body.splitlines(keepends=True)] for name, body in sorted(topics.items())]
    for split, part in (("train", articles[:25]), ("validation", articles[25:27])):
        rows = [row if row.strip() else "" for article in part for row in article]
        parquet.write_table(pyarrow.table({"text": rows}), text / f"{split}-00000-of-00001.parquet")
    (folder / "results" / "distill").mkdir(parents=True)
    shutil.copytree(ROOT / "tests" / "tasks", folder / "tests" / "tasks")
    cfg = compose("distill", [*TRAINING, *DISTILL])
    OmegaConf.save(cfg, folder / "results" / "distill" / "distill_hydra.yaml")
    return folder


@pytest.mark.parametrize(
    "shown",
    [pytest.param(shown, id=str(shown), marks=[pytest.mark.slow] * ("_1gpu" in shown.text)) for shown in SHOWN],
)
def test_command_runs(shown, home, zygote):
    if shown.text in ELSEWHERE:
        assert (ROOT / ELSEWHERE[shown.text]).exists()
        return
    words = words_of(shown)
    if words[0] in ("docker", "apptainer", "conda"):
        return  # read in tests/test_places.py
    if words[0] == "make":
        dry = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0 and dry.stdout, dry.stderr
        for line in dry.stdout.splitlines():
            if "/minitron " in line:
                compose_as_shown(shlex.split(line.partition("/minitron ")[2]), complete=False)
        return
    if words[0] == ".ci/run":
        subprocess.run(["bash", "-n", ROOT / words[0]], check=True)
        return
    if words[0] == "python3" and words[1].endswith("minitron_launcher.py"):
        check_launcher_stages(words[1:])
        return
    argv = minitron_words(words)
    assert argv is not None, f"{shown}: a command that this test does not know; see WORDS and ELSEWHERE"
    refused = any(line.startswith("minitron: ") for line in shown.output)
    if not refused:
        compose_as_shown(argv)
    small = argv if "--cfg" in argv else tiny(argv)  # a config is shown at its own size
    ranks = 2 if "trainer.devices=2" in small or words[0] == "torchrun" else 1
    if "+cluster=slurm" in small:  # submitted from one process
        ranks = 1
    if any("lm_eval" in word for word in argv):
        pytest.importorskip("lm_eval", reason="the extra [lm-eval] is not installed; the command was composed alone")
    (status, printed), *_ = zygote.run("tests.test_docs:run", ranks, small, str(home))
    assert status == (2 if refused else 0), printed
    for line in shown.output:
        assert line in printed


def check_launcher_stages(words: list[str]) -> None:
    """Stage files exist, and with the overrides that are shown our commands take them."""
    script, *overrides = words
    assert (ROOT / script).is_file()
    pairs = dict(word.split("=", 1) for word in overrides)
    stages = {name for name in pairs if name in COMMANDS}
    assert stages == set(yaml.safe_load(pairs["stages"])), "each stage is given its file"
    whole = OmegaConf.create({"base_results_dir": pairs["base_results_dir"], "data_dir": pairs["data_dir"]})
    for stage in stages:
        whole[stage] = OmegaConf.load((ROOT / script).parent / "conf" / stage / f"{pairs[stage]}.yaml")
    for name, value in pairs.items():
        stage, _, key = name.partition(".")
        if stage in stages and key:
            check.refuse_unknown_path(key, check.known_keys(stage), whole[stage])
            OmegaConf.update(whole[stage], key, value)
        else:
            assert name in stages or name in LAUNCHERS_OWN, f"{name}: neither ours nor the launcher's"
    OmegaConf.resolve(whole)  # the launcher does that before it writes a stage's file
    for stage in stages:
        compose(stage, config=OmegaConf.to_container(whole[stage]))


def test_every_substitution_is_used():
    shown = {word for command in SHOWN for word in words_of(command)}
    assert set(WORDS) <= shown
    assert set(ELSEWHERE) <= {command.text for command in SHOWN}
    for ellipsis in REST:
        assert any(ellipsis in command.text for command in SHOWN), ellipsis


# ------------------------------------------------------------------------------------------------------ keys and paths

DOCUMENTS = [*FILES, *sorted((ROOT / "docs").glob("*/*.md")), ROOT / "CHANGELOG.md"]
READERS_OWN = {"conf/cluster/mine.yaml"}
"""Files that a document tells its reader to write."""


def prose(file: Path) -> str:
    return re.sub(r"```.*?```", "", file.read_text(), flags=re.S)


def anchors(file: Path) -> set[str]:
    """Where a link into a page can lead, by GitHub's rule: its headings in lower case, spaces as hyphens."""
    headings = re.findall(r"^#+ (.+)$", prose(file), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_linked_and_named_files_exist(file):
    text = prose(file)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if "://" not in target:
            there = file.parent / target if target else file
            assert there.exists(), f"{file.name} links to {target}"
            assert not anchor or anchor in anchors(there), f"{file.name} links to {target}#{anchor}"
    for name in re.findall(r"`([\w.][\w./-]*/[\w./-]*)`", text):
        is_placeholder = re.search(r"\b[A-Z]{2,}\b", name) or name in READERS_OWN
        homes = [home for home in (ROOT, ROOT / "nemo_minitron") if (home / name.split("/")[0]).exists()]
        assert not homes or is_placeholder or any((home / name).exists() for home in homes), f"{file.name}: {name}"


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_named_keys_and_commands_are_known(file):
    sections = {name for command in COMMANDS for name, below in check.known_keys(command).items() if below}
    for code in re.findall(r"`([^`\n]+)`", prose(file)):
        if match := re.match(r"(?:python -m nemo_)?minitron (\w+)", code):
            assert match[1] in COMMANDS or match[1].isupper(), code
        match = re.match(r"[+~]*([a-z_0-9]+(?:\.[a-z_0-9]+)+)(=|$)", code)
        if match and match[1].split(".")[0] in sections and not match[1].endswith((".py", ".md", ".json")):
            assert any(_knows(check.known_keys(command), match[1].split(".")) for command in COMMANDS), code


def _knows(tree: dict | None, names: list[str]) -> bool:
    for name in names:
        if tree is None:
            return True
        if name not in tree:
            return False
        tree = tree[name]
    return True


def test_messages_that_are_explained_are_ours():
    """Each message on the page of errors is one in the code, `…` standing for what is filled in."""
    page = (ROOT / "docs" / "faq.md").read_text()
    explained = [message.strip() for message in re.findall(r"^```text\n(.*?)^```", page, flags=re.M | re.S)]
    known = [re.sub("…+", "…", message) for message in messages()]
    assert len(explained) >= 10
    assert [message for message in explained if not any(one.startswith(message) for one in known)] == []


def messages() -> Iterator[str]:
    """What every ``MinitronError`` of the package says."""
    for file in (ROOT / "nemo_minitron").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "MinitronError" and node.args:
                yield text_of(node.args[0])


def text_of(node: ast.expr) -> str:
    """An expression's text, with ``…`` for what is not known before it runs."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


def test_the_cluster_file_that_is_shown_is_one():
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "running.md").read_text(), flags=re.S)
    assert set(yaml.safe_load(text)) <= {name for name, *_ in keys(Cluster)}


def test_pages_of_commands_are_what_the_schemas_say():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    written = {file.name: file.read_text() for file in (ROOT / "docs" / "commands").glob("*.md")}
    assert written == generate.pages(), "run: python docs/generate.py"
    for command in COMMANDS:
        for name, _, _, metadata in keys(COMMANDS[command]):
            assert f"`{name}`" in written[f"{command}.md"] and (
                metadata["help"].split("|")[0] in written[f"{command}.md"]
            )
