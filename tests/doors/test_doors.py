"""Every family in every format: in, pruned, distilled, out. ``docs/doors.py`` makes a table of what passes here.

A cell is a test of its own. Models are random, with sizes in which confusions show. The measure is transformers'
logits of the folder that it saved, to 1e-4; where a ``.nemo`` of one source equals that of another bit by bit, it is
pruned and distilled once.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.formats import open_checkpoint
from nemo_minitron.config.schema import CONVERT_FORMATS
from nemo_minitron.convert import convert
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.errors import MinitronError
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import Rotary, read_head, read_layer, rms_norm
from tests.doors.models import CONFIGS, TOKENS, VOCAB, make, transformers_logits
from tests.doors.refused import WITHOUT_A_WINDOW, refusal
from tests.doors.sources import SOURCES

JOBS = "tests.nemo.extending_jobs"
OUTPUTS = {"nemo": "out.nemo", "hf": "out", "gguf": "out.gguf", "bridge": "out", "megatron": "out", "nemo2": "out"}
MORE = {"NeMo 2": {"model": {"vocab_size": VOCAB}}}
"""What a user adds: NeMo 2 leaves the vocabulary to its tokenizer, and the table has rows of padding."""
IN_CI = {(list(CONFIGS)[i % len(CONFIGS)], source) for i, source in enumerate(SOURCES)}
"""One family of each source; all the others are slow."""


def slow(model: str, source: str) -> list[pytest.MarkDecorator]:
    return [] if (model, source) in IN_CI else [pytest.mark.slow]


CELLS = [pytest.param(m, s, marks=slow(m, s), id=f"{m}|{s}") for m in CONFIGS for s in SOURCES]
TARGETS = [
    pytest.param(m, s, t, marks=slow(m, s), id=f"{m}|{s}|{t}")
    for m in CONFIGS
    for s in SOURCES
    for t in CONVERT_FORMATS
]


@pytest.fixture(scope="module")
def doors(tmp_path_factory):
    """Makes what a cell starts from, once: the folder that transformers saved, its logits, a source of it."""
    folder, made = tmp_path_factory.mktemp("doors"), {}

    def start(model: str, source: str) -> tuple[Path, torch.Tensor]:
        home = folder / model.replace(", ", "_").replace(" ", "_")  # a comma would end a value on a command line
        if model not in made:
            home.mkdir()
            hf = make(model, home / "hf")
            made[model] = hf, transformers_logits(hf)
        hf, logits = made[model]
        if (model, source) not in made:
            made[model, source] = SOURCES[source](hf, home)
        return made[model, source], logits

    return start


def logits_of(path: Path) -> torch.Tensor:
    """Logits by the plain decoder, of the true vocabulary, from a checkpoint of any format."""
    with open_checkpoint(path) as reader:
        shape = reader.shape
        x = reader.tensor(layout.EMBEDDING).float()[TOKENS]
        for layer in range(shape.num_layers):
            x = read_layer(reader, layer).forward(x, Rotary.of(shape, TOKENS.shape[1]))
        norm, head = read_head(reader)
        return (rms_norm(x, norm, shape.layernorm_epsilon) @ head.T)[..., :VOCAB]


@pytest.mark.parametrize(("model", "source"), CELLS)
def test_comes_in(doors, model, source, tmp_path):
    path, logits = doors(model, source)
    if (why := refusal(model, source)) is not None:
        with pytest.raises(MinitronError, match=re.escape(why)):
            convert(path, tmp_path / "in.nemo")
        return
    nemo = convert(path, tmp_path / "in.nemo", verify=True, **MORE.get(source, {}))
    torch.testing.assert_close(logits_of(nemo), logits, rtol=1e-4, atol=1e-4)
    plain, _ = doors(model, "`.nemo` of ours")
    with NemoReader(nemo) as found, NemoReader(plain) as expected:
        window = None if source in WITHOUT_A_WINDOW else expected.shape.sliding_window
        assert found.shape == expected.shape.replace(sliding_window=window)
        assert found.fingerprint() == expected.fingerprint()


@pytest.mark.parametrize(("model", "source", "target"), TARGETS)
def test_goes_out(doors, model, source, target, tmp_path):
    path, logits = doors(model, source)
    out = tmp_path / OUTPUTS[target]
    if (why := refusal(model, source, target)) is not None:
        with pytest.raises(MinitronError, match=re.escape(why)):
            convert(path, out, format=target)
        assert not list(tmp_path.iterdir())
        return
    convert(path, out, format=target, verify=True, **MORE.get(source, {}))
    torch.testing.assert_close(logits_of(out), logits, rtol=1e-4, atol=1e-4)
    if target == "hf":
        found = transformers_logits(out)
    elif target == "gguf":
        # transformers passes over RoPE's scaling in a GGUF, and over the width of a head in a Qwen2's
        config = {"config": AutoConfig.from_pretrained(make(model, tmp_path / "hf"))} if model != "Mistral" else {}
        found = transformers_logits(tmp_path, gguf_file=out.name, **config)
    else:
        return
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


JOURNEYS = [pytest.param(m, marks=[] if m == "Llama" else [pytest.mark.slow], id=m) for m in CONFIGS]


@pytest.fixture(scope="module")
def students(doors, zygote, tmp_path_factory):
    """Makes the student of a model once: scored, cut along every axis, its weights solved anew."""
    made: dict[str, Path] = {}

    def student(model: str) -> Path:
        if model not in made:
            teacher, _ = doors(model, "`.nemo` of ours")
            folder = tmp_path_factory.mktemp("student")
            preprocess("pydoc_topics", folder / "data", tokenizer_type=str(teacher))
            data = [f"calibration.data_prefix={folder}/data_text_document", "calibration.seq_length=32"]
            keys = [f"model.restore_from_path={teacher}"]
            sizes = [f"prune.{key}={size}" for key, size in SMALLER.items()]
            files = [f"prune.scores={folder}/scores", f"export.save_path={folder}/student.nemo"]
            lines = (
                ["importance", *keys, *data, "calibration.num_samples=16", f"output_path={folder}/scores"],
                ["prune", *keys, *sizes, *files],
            )
            assert zygote.run(f"{JOBS}:commands", 1, *lines) == [[0, 0]]
            made[model] = folder
        return made[model]

    return student


SMALLER = {"hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 2}


def exported(nemo: Path, folder: Path) -> None:
    """The export of a student has the student's logits in transformers."""
    convert(nemo, folder / "hf", verify=True)
    torch.testing.assert_close(transformers_logits(folder / "hf"), logits_of(nemo), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", JOURNEYS)
def test_is_pruned(students, model, tmp_path):
    nemo = students(model) / "student.nemo"
    with NemoReader(nemo) as reader:
        assert {key: getattr(reader.shape, key) for key in SMALLER} == SMALLER
    exported(nemo, tmp_path)


@pytest.mark.parametrize("model", JOURNEYS)
def test_is_distilled(doors, students, zygote, model, tmp_path):
    teacher, _ = doors(model, "`.nemo` of ours")
    folder = students(model)
    data = f"{{train:[1.0,{folder}/data_text_document],validation:[{folder}/data_text_document]}}"
    line = [
        "distill",
        f"model.restore_from_path={folder}/student.nemo",
        f"model.kd_teacher_restore_from_path={teacher}",
    ]
    line += [f"model.nemo_path={tmp_path}/distilled.nemo", f"model.data.data_prefix={data}"]
    line += ["model.data.seq_length=32", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    line += ["trainer.limit_val_batches=1", "model.micro_batch_size=2", "model.global_batch_size=2"]
    line += ["model.optim.lr=1e-2", f"exp_manager.explicit_log_dir={tmp_path}/log"]
    assert zygote.run(f"{JOBS}:commands", 1, line) == [[0]]
    exported(tmp_path / "distilled.nemo", tmp_path)
    before, after = logits_of(folder / "student.nemo"), logits_of(tmp_path / "distilled.nemo")
    assert (before - after).abs().max() > 1e-2  # it was trained
