"""Hostile checkpoints through every command: nothing that they name is run, opened, fetched or asked about."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import socket
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from nemo_minitron.cli import main
from nemo_minitron.convert import convert
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.synthetic import make_llama
from tests.checkpoint.test_hostile import header, patched
from tests.checkpoint.test_hostile_names import ELSEWHERE
from tests.llamas import GQA

TRAP = Path(f"/tmp/minitron_trap_{os.getpid()}")
"""Everything hostile names lies in here; nothing may look inside, and code that runs leaves ``ran`` there."""

_watched: list[tuple[str, object]] | None = None


def _audit(event: str, args: tuple) -> None:
    if _watched is None:
        return
    if event == "socket.connect" and args[0].family == socket.AF_UNIX:
        return  # the C library asks the machine's own name service
    if event in ("os.system", "socket.connect", "pty.spawn") or (
        event in ("open", "os.listdir", "os.scandir", "import") and str(TRAP) in repr(args[:1])
    ):
        _watched.append((event, args[:1]))


sys.addaudithook(_audit)


class Code:
    def __reduce__(self):
        return os.system, (f"touch {TRAP}/ran",)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """``hf``, ``m.nemo``, the same as a folder ``nemo``, tokens ``text_text_document``, ``scores``; and the trap."""
    folder = tmp_path_factory.mktemp("good")
    convert(make_llama(folder / "hf", GQA), folder / "m.nemo")
    with tarfile.open(folder / "m.nemo") as tar:
        tar.extractall(folder / "nemo", filter="data")
    (folder / "text.txt").write_text("A few words of text, over and over. " * 400)
    preprocess(folder / "text.txt", folder / "text", tokenizer_type=str(folder / "hf"))
    prefix = folder / "text_text_document"
    scores = ["importance.stream=true", "calibration.num_samples=4", "calibration.seq_length=32"]
    source = [f"model.restore_from_path={folder}/m.nemo", f"calibration.data_prefix={prefix}"]
    assert main(["importance", *source, *scores, f"output_path={folder}/scores"]) == 0
    shutil.copytree(folder / "hf", TRAP)
    (TRAP / "columns.pkl").write_bytes(pickle.dumps(Code()))
    (TRAP / "evil.py").write_text(f"import os\nos.system('touch {TRAP}/ran')\nclass Evil: pass\n")
    yield folder
    shutil.rmtree(TRAP)


def changed(folder: Path, out: Path, keep_packed: bool = False, tokenizer: dict | None = None, **keys) -> Path:
    shutil.copytree(folder / "nemo", out)
    path = out / "model_config.yaml"
    config = yaml.safe_load(path.read_text()) | keys
    if tokenizer is not None:
        config["tokenizer"] = {"type": "any", "model": None, **tokenizer}
    path.write_text(yaml.safe_dump(config))
    if not keep_packed:
        shutil.rmtree(out / "minitron" / "tokenizer")
    return out


def packed(folder: Path, out: Path, lead: bytes = b"", compress: bool = False) -> Path:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                tar.add(file, file.relative_to(folder).as_posix())
    data = lead + made.getvalue()
    out.write_bytes(gzip.compress(data, 1) if compress else data)
    return out


def self_pickle(folder: Path, out: Path) -> Path:
    """One tar that is a pickle as well, read by its own descriptor."""
    script = f"cposix\nsystem\n(S'touch {TRAP}/ran'\ntR.".encode()
    record = b"20 comment=xxxxxxxx\n"
    lead = patched(header("x", len(record), tarfile.XHDTYPE), 0, script.ljust(100, b"\0")) + record.ljust(512, b"\0")
    source = changed(folder, out / "f", tokenizer={"library": "tabular", "vocab_file": "/proc/self/fd/3"})
    return packed(source, out / "bad.nemo", lead)


TABULAR = {"library": "tabular", "vocab_file": f"{TRAP}/columns.pkl", "delimiter": ","}
FORMS = {
    "a tar that is a pickle": self_pickle,
    "tabular": lambda f, out: changed(f, out / "bad", tokenizer=TABULAR),
    "tabular beside packed files": lambda f, out: changed(f, out / "bad", True, tokenizer=TABULAR),
    "tabular, gzipped": lambda f, out: packed(
        changed(f, out / "f", tokenizer=TABULAR), out / "bad.nemo", compress=True
    ),
    "huggingface with a vocabulary": lambda f, out: changed(
        f, out / "bad", tokenizer={"library": "huggingface", "type": str(TRAP), "vocab_file": f"{TRAP}/columns.pkl"}
    ),
    "sentencepiece elsewhere": lambda f, out: changed(
        f, out / "bad", tokenizer={"library": "sentencepiece", "model": f"{TRAP}/columns.pkl"}
    ),
    "megatron with a vocabulary": lambda f, out: changed(
        f,
        out / "bad",
        tokenizer={"library": "megatron", "type": "GPT2BPETokenizer", "vocab_file": f"{TRAP}/vocab.json"},
    ),
    "instantiated": lambda f, out: changed(f, out / "bad", True, optim={"_target_": "os.system", "command": "true"}),
}
DEFAULT = ("a tar that is a pickle", "tabular beside packed files")


def commands(good: Path, bad: Path, out: Path) -> dict[str, list[str]]:
    prefix = good / "text_text_document"
    model, ok = f"model.restore_from_path={bad}", f"model.restore_from_path={good}/m.nemo"
    training = [
        f"model.nemo_path={out}/out.nemo",
        f"model.data.data_prefix={{train: [{prefix}], validation: [{prefix}]}}",
        "model.data.seq_length=32",
        "trainer.max_steps=1",
        "trainer.val_check_interval=1",
        "trainer.limit_val_batches=1",
        "model.global_batch_size=1",
        f"exp_manager.exp_dir={out}/exp",
    ]
    (out / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "mine",
                "description": "one stage",
                "order": ["measure"],
                "settings": {},
                "stages": {
                    "measure": {
                        "command": "evaluate",
                        "inputs": [str(bad)],
                        "outputs": [f"{out}/m.json"],
                        "config": {
                            "model": {"restore_from_path": str(bad)},
                            "evaluate": {"data_prefix": str(prefix), "seq_length": 32},
                            "output_path": f"{out}/m.json",
                        },
                    }
                },
            }
        )
    )
    return {
        "convert": [f"input_name_or_path={bad}", f"output_path={out}/hf"],
        "evaluate": [model, f"evaluate.data_prefix={prefix}", "evaluate.seq_length=32", f"output_path={out}/o.json"],
        "importance": [
            model,
            f"calibration.data_prefix={prefix}",
            "calibration.num_samples=2",
            "calibration.seq_length=32",
            f"output_path={out}/scores",
        ],
        "prune": [model, f"prune.scores={good}/scores", "prune.ffn_hidden_size=48", f"export.save_path={out}/p.nemo"],
        "finetune": [model, *training],
        "distill": [model, f"model.kd_teacher_restore_from_path={good}/m.nemo", *training],
        "distill teacher": [ok, f"model.kd_teacher_restore_from_path={bad}", *training],
        "search": [
            model,
            f"scores={good}/scores",
            "budget.num_parameters=100000",
            "search.until=zero_shot",
            "search.measure=1",
            f"evaluate.data_prefix={prefix}",
            "evaluate.seq_length=32",
            f"output_path={out}/search",
        ],
        "preprocess": ["input=pydoc_topics", f"tokenizer.type={bad}", f"output_prefix={out}/data"],
        "run": [f"recipe={out}/mine.yaml", f"run_dir={out}/run"],
        "report": [f"run_dir={out}/run"],
    }


NAMES = list(commands(Path("/"), Path("/"), Path("/tmp")))
CASES = [
    pytest.param(form, name, marks=() if form in DEFAULT and name != "run" else pytest.mark.slow)
    for form in FORMS
    for name in NAMES
]


@pytest.mark.parametrize(("form", "name"), CASES)
def test_no_command_runs_or_opens_what_a_checkpoint_names(form, name, good, tmp_path, capsys, monkeypatch):
    global _watched
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    bad = FORMS[form](good, tmp_path)
    run = tmp_path / "run"
    if name == "report":  # a run folder that holds the file under the names that runs have
        run.mkdir()
        for place in ("teacher.nemo", "student.nemo", "model.nemo"):
            (shutil.copytree if bad.is_dir() else shutil.copy)(bad, run / place)
    _watched = []
    try:
        status = main([name.split()[0], *commands(good, bad, tmp_path)[name]])
    finally:
        seen, _watched = _watched, None
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minitron:")]
    assert seen == [] and not (TRAP / "ran").exists()
    assert status == 2 and len(said) == 1, said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convert", "evaluate", "importance", "prune", "finetune", "distill"])
def test_a_config_full_of_names_does_what_a_clean_one_does(name, good, tmp_path, capsys):
    global _watched
    keys = yaml.safe_load(yaml.safe_dump(ELSEWHERE).replace("/x", str(TRAP)))
    bad = changed(good, tmp_path / "bad", True, tokenizer={"library": "huggingface", "type": str(TRAP)}, **keys)
    _watched = []
    try:
        status = main([name, *commands(good, bad, tmp_path)[name]])
    finally:
        seen, _watched = _watched, None
    assert status == 0, capsys.readouterr().err
    remote = [event for event in seen if event[0] != "socket.connect"]  # ranks of one machine meet over a socket
    assert remote == [] and not (TRAP / "ran").exists()
    if name == "evaluate":
        (tmp_path / "clean").mkdir()
        assert main([name, *commands(good, good / "m.nemo", tmp_path / "clean")[name]]) == 0
        losses = [
            yaml.safe_load((where / "o.json").read_text())["val_loss"] for where in (tmp_path, tmp_path / "clean")
        ]
        assert losses[0] == losses[1]


def test_the_trap_would_be_seen(good):
    global _watched
    _watched = []
    try:
        pickle.loads((TRAP / "columns.pkl").read_bytes())
    finally:
        seen, _watched = _watched, None
    assert {event for event, _ in seen} == {"open", "os.system"} and (TRAP / "ran").exists()
    (TRAP / "ran").unlink()
