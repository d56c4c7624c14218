"""Every output is flushed, file and folder, before and after it is renamed to its place: what docs/safety.md says."""

import ast
import os
from pathlib import Path

import pytest
import torch

import nemo_minitron
from nemo_minitron import recipe
from nemo_minitron.convert import convert
from nemo_minitron.data import preprocess
from nemo_minitron.distill.cache import Identity, TeacherCache
from nemo_minitron.distill.top_k import TopK
from nemo_minitron.files import staging
from nemo_minitron.jobs import slurm
from nemo_minitron.prune.plan import Plan
from nemo_minitron.report import page
from nemo_minitron.search import output
from nemo_minitron.search.rounds import _write_scores
from nemo_minitron.stages import evaluate
from nemo_minitron.synthetic import make_llama
from tests.fuzz.readers import TINY
from tests.importance.test_scores import make
from tests.llamas import GQA

PACKAGE = Path(nemo_minitron.__file__).parent


class Trace:
    """What was flushed and renamed, in order: ``("sync", inode, bytes then)`` and ``("rename", from, to)``."""

    def __init__(self, monkeypatch):
        self.events = []
        sync, replace, rename, exchange = os.fsync, os.replace, os.rename, staging._exchange

        def renamed(do):
            def wrapped(source, destination):
                self.events.append(("rename", os.fspath(source), os.fspath(destination), inodes(Path(source))))
                return do(source, destination)

            return wrapped

        def synced(descriptor):
            found = os.fstat(descriptor)
            self.events.append(("sync", found.st_ino, found.st_size))
            return sync(descriptor)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", renamed(replace))
        monkeypatch.setattr(os, "rename", renamed(rename))
        monkeypatch.setattr(staging, "_exchange", renamed(exchange))

    def check(self, path):
        """``path`` arrived by a rename, all of it flushed before, the name flushed after."""
        at = max(i for i, event in enumerate(self.events) if event[0] == "rename" and event[2] == str(path))
        held = self.events[at][3]
        assert held == inodes(path), f"{path.name}: changed after it was renamed"
        before = {event[1:] for event in self.events[:at] if event[0] == "sync"}
        for inode, (name, size) in held.items():
            assert (inode, size) in before, f"{path.name}: {name} was not flushed before the rename"
        after = {event[1] for event in self.events[at:] if event[0] == "sync"}
        assert path.parent.stat().st_ino in after, f"{path.name}: its folder was not flushed after the rename"


def inodes(root):
    """Name and size of everything below and including ``root``, by inode."""
    paths = [root, *root.rglob("*")] if root.is_dir() else [root]
    return {path.stat().st_ino: (str(path.relative_to(root)), path.stat().st_size) for path in paths}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    hf = make_llama(folder / "hf", TINY)
    for file in hf.glob("*token*"):
        file.unlink()
    make_llama(folder / "named", GQA)
    return folder


def write_cache(out, source):
    identity = Identity("t", "d", "k", seq_length=2, vocab_size=8, top_k=2, temperature=1.0)
    cache = TeacherCache(out / "cache", identity)
    cache.create()
    log = torch.full((1, 2, 2), -1.0)
    cache.write("train", 0, [(torch.zeros(1, 2, dtype=torch.long), TopK(log, torch.zeros(1, 2, 2), log[..., 0]))])
    return out / "cache" / "cache.json", out / "cache" / "train" / "00000000.npy"


def write_records(out, source):
    records = recipe.Records(out / ".stages")
    records.write("prune", {"state": "done"})
    records.content(str(source / "hf" / "config.json"))
    return out / ".stages" / "prune.json", out / ".stages" / "digests.json"


def write_metrics(out, source):
    sizes = ("num_parameters", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    values = ("num_query_groups", "val_loss", "perplexity", "peak_memory_bytes")
    metrics = dict.fromkeys((*sizes, *values), 1)
    evaluate.write_json(out / "teacher.json", metrics)
    recipe.report({"teacher": str(out / "teacher.json")}, {}, out)
    return out / "teacher.json", out / "metrics.json"


def write_tokens(out, source):
    (source / "text.jsonl").write_text('{"text": "a b c"}\n')
    preprocess.preprocess(source / "text.jsonl", out / "tokens", tokenizer_type=str(source / "named"))
    return [out / f"tokens_text_document{suffix}" for suffix in (".bin", ".idx", ".json")]


def write_job(out, source):
    texts = {".yaml": "a: 1\n", ".sh": "#!/bin/bash\n"}
    base = slurm.write_scripts(out, "job", lambda base: {Path(f"{base}{end}"): text for end, text in texts.items()})
    script = Path(f"{base}.sh")
    return script, script.with_suffix(".yaml")


def one(path, write):
    write(path)
    return [path]


WRITERS = {
    "small file": lambda out, _: one(out / "new" / "folder" / "a.json", lambda path: staging.write_file(path, "{}")),
    "plan": lambda out, _: one(out / "plan.yaml", Plan.identity(TINY, "f").save),
    "scores": lambda out, _: one(out / "scores", lambda path: _write_scores(make(), path)),
    "records": write_records,
    "metrics": write_metrics,
    "job": write_job,
    "report": lambda out, _: [out / "r.html", page.write("<p>", "text", out / "r.html")],
    "plots": lambda out, _: one(out / "p.png", lambda path: output._save(_figure(), path)),
    "teacher cache": write_cache,
    "token files": write_tokens,
    ".nemo": lambda out, source: one(out / "m.nemo", lambda path: convert(source / "hf", path)),
    ".nemo as a folder": lambda out, source: one(out / "m", lambda path: convert(source / "hf", path)),
    **{
        name: lambda out, source, name=name: one(out / name, lambda path: convert(source / "hf", path, format=name))
        for name in ("bridge", "megatron", "nemo2")
    },
    "HF folder": lambda out, source: one(out / "h", lambda path: convert(convert(source / "hf", out / "m.nemo"), path)),
    "GGUF": lambda out, source: one(out / "m.gguf", lambda path: convert(source / "hf", path)),
}


def _figure():
    from matplotlib import pyplot

    return pyplot.figure()


REPLACED = ("plan", "report", "token files", ".nemo", ".nemo as a folder", "HF folder", "bridge")


@pytest.mark.parametrize(
    ("writer", "earlier"), [*((name, False) for name in WRITERS), *((name, True) for name in REPLACED)]
)
def test_flushed(writer, earlier, source, tmp_path, monkeypatch):
    if earlier:
        WRITERS[writer](tmp_path, source)
    trace = Trace(monkeypatch)
    for path in WRITERS[writer](tmp_path, source):
        trace.check(path)
    assert not list(tmp_path.rglob("*.tmp"))


def test_parents_that_were_made_are_flushed_too(tmp_path, monkeypatch):
    trace = Trace(monkeypatch)
    staging.write_file(tmp_path / "a" / "b" / "c.json", "{}")
    flushed = {event[1] for event in trace.events if event[0] == "sync"}
    assert {path.stat().st_ino for path in (tmp_path, tmp_path / "a", tmp_path / "a" / "b")} <= flushed


def test_a_small_file_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    staging.write_file(tmp_path / "a", "before")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(nemo_minitron.errors.MinitronError, match=r"a: expected room to write, found: .*No space"):
        staging.write_file(tmp_path / "a", "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "before")]


INSIDE_A_STAGING = {
    "files/staging.py",  # the idiom itself
    "checkpoint/archive.py",  # ArchiveWriter: all below one Staging, as the next five
    "checkpoint/hf_write.py",
    "checkpoint/distcp.py",
    "checkpoint/tokenizer_files.py",
    "checkpoint/gguf_tokenizer.py",
    "checkpoint/gguf_write.py",
    "data/token_writer.py",
    "report/page.py",
    "importance/scores.py",  # into the folder that its caller stages
    "prune/student.py",
    "synthetic.py",
}
NO_OUTPUT = {
    "jobs/launch.py",  # a rank's error, for the agent that started it
    "recipe/walk.py",  # what a stage says, as it says it
    "nemo/metrics_log.py",  # a log, row by row, flushed before a checkpoint counts as finished
    "nemo/resume.py",  # earlier checkpoints are set aside
    "api/training.py",  # logs of an earlier call are set aside
    "importance/streams.py",  # temporary files of one process
    "distill/cache.py",  # into memory
    "checkpoint/bridge_config.py",  # into memory
}
WRITES = {"write_text", "write_bytes", "rename", "savez", "savez_compressed", "savetxt", "tofile", "save_pretrained"}


def writes(tree):
    """Calls that write or rename a file."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = node.func.value.id if isinstance(getattr(node.func, "value", None), ast.Name) else ""
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        opened = name == "open" and any(set(mode) <= set("rwxabt+") and set(mode) & set("wxa") for mode in modes)
        if opened or name in WRITES or f"{owner}.{name}" in ("os.replace", "np.save", "torch.save"):
            yield node.lineno


def test_no_module_writes_beside_this_table():
    sources = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    unknown = {name for name, tree in sources.items() if any(writes(tree))} - INSIDE_A_STAGING - NO_OUTPUT
    assert not unknown, "write through nemo_minitron.files.staging, and add the writer to WRITERS"
