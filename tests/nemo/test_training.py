"""What a training refuses: before it starts where it can, and with nothing of what was there replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nemo_minitron.cli import main
from nemo_minitron.convert import convert
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """``model.nemo``, others that do not go with it, and token files of each one's tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    convert(make_llama(folder / "hf", GQA), folder / "model.nemo")
    larger = GQA.replace(vocab_size=400, padded_vocab_size=400)
    convert(make_llama(folder / "larger_hf", larger), folder / "larger.nemo")
    shutil.copytree(folder / "hf", folder / "permuted_hf")
    content = json.loads((folder / "hf" / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]  # equal sizes, two tokens exchanged
    (folder / "permuted_hf" / "tokenizer.json").write_text(json.dumps(content))
    convert(folder / "permuted_hf", folder / "permuted.nemo")
    short = GQA.replace(max_position_embeddings=16)
    convert(make_llama(folder / "short_hf", short), folder / "short.nemo")
    bare = convert(folder / "hf", folder / "bare")
    shutil.rmtree(bare / "model_weights")
    (folder / "cut.nemo").write_bytes((folder / "model.nemo").read_bytes()[:-20_000])
    for name, tokenizer in (("own", "hf"), ("foreign", "larger_hf")):
        preprocess("pydoc_topics", folder / name, tokenizer_type=str(folder / tokenizer))
    return folder


CASES = {
    "missing checkpoint": (["model.restore_from_path=DIR/absent.nemo"], "absent.nemo: expected a .nemo"),
    "no model_weights": (["model.restore_from_path=DIR/bare"], "expected the member model_weights/"),
    "truncated": (["model.restore_from_path=DIR/cut.nemo"], "unexpected end of data"),
    "missing tokens": (["PREFIX=DIR/absent"], "absent"),
    "tokens of another vocabulary": (["PREFIX=DIR/foreign_text_document"], "another vocabulary"),
    "sequence too long": (["model.data.seq_length=1000"], "max_position_embeddings=128"),
    "batch does not divide": (["model.global_batch_size=3", "model.micro_batch_size=2"], "model.global_batch_size (3)"),
    "unwritable": (["model.nemo_path=OUT/file/out.nemo"], "expected a writable destination"),
    "output is the input": (["model.nemo_path=DIR/model.nemo"], "choose another name"),
}
TEACHERS = {
    "missing teacher": ("absent.nemo", "absent.nemo: expected a .nemo"),
    "teacher without model_weights": ("bare", "expected the member model_weights/"),
    "teacher of another vocabulary": ("larger.nemo", "the teacher's vocabulary has 400 tokens, the student's 320"),
    "teacher of a permuted vocabulary": ("permuted.nemo", "teacher and student tokenizers differ: token 'a'"),
    "teacher of fewer positions": ("short.nemo", "max_position_embeddings=16"),
}
LATE = ("tokens of another vocabulary", "teacher of a permuted vocabulary")  # known once a tokenizer is loaded


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in ("finetune", "distill") for case in CASES] + [("distill", case) for case in TEACHERS],
)
def test_bad_input_leaves_the_destination_untouched(name, case, models, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "out.nemo").write_text("an earlier model")
    (out / "file").write_text("in the way")
    teacher, message = TEACHERS.get(case, ("model.nemo", ""))
    changes, message = CASES.get(case, ([], message))
    replace = {"DIR": str(models), "OUT": str(out)}
    changes = [key.replace("DIR", replace["DIR"]).replace("OUT", replace["OUT"]) for key in changes]
    prefix = next((key[7:] for key in changes if key.startswith("PREFIX=")), f"{models}/own_text_document")
    keys = [
        f"model.restore_from_path={models}/model.nemo",
        f"model.nemo_path={out}/out.nemo",
        f"model.data.data_prefix={{train: [{prefix}], validation: [{prefix}]}}",
        "model.data.seq_length=32",
        f"exp_manager.exp_dir={tmp_path}/exp",
        *([f"model.kd_teacher_restore_from_path={models}/{teacher}"] if name == "distill" else []),
        *(key for key in changes if not key.startswith("PREFIX=")),
    ]
    before = (models / "model.nemo").read_bytes()
    assert main([name, *keys]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minitron:")]
    assert message in line
    assert {p.name: p.read_text() for p in out.iterdir()} == {"out.nemo": "an earlier model", "file": "in the way"}
    assert (models / "model.nemo").read_bytes() == before
    assert (tmp_path / "exp").exists() == (case in LATE)
