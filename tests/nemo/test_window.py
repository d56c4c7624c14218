"""A Mistral whose sliding window is on: all that stays within the window, and nothing that reaches beyond it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import MistralForCausalLM

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.cli import main
from nemo_minitron.convert import convert
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.errors import MinitronError
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA

WINDOW = 48
JOBS = "tests.nemo.extending_jobs"


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    """Folder with ``hf``, ``model.nemo`` and tokens of their vocabulary."""
    folder = tmp_path_factory.mktemp("mistral")
    make_llama(folder / "hf", GQA.replace(hidden_size=48, sliding_window=WINDOW))
    convert(folder / "hf", folder / "model.nemo", verify=True)
    preprocess("pydoc_topics", folder / "text", tokenizer_type=str(folder / "hf"))
    return folder


def command(folder: Path, name: str, length: int, out: Path) -> list[str]:
    prefix = folder / "text_text_document"
    training = [
        f"model.nemo_path={out}/out.nemo",
        f"model.data.data_prefix={{train: [{prefix}], validation: [{prefix}]}}",
        f"model.data.seq_length={length}",
        f"exp_manager.exp_dir={out}/exp",
    ]
    speed = ["evaluate.perplexity=false", "evaluate.throughput=true", f"evaluate.prefill_tokens={length - 8}"]
    calibration = [f"calibration.data_prefix={prefix}", "calibration.num_samples=8", f"calibration.seq_length={length}"]
    keys = {
        "importance": [*calibration, f"output_path={out}/scores"],
        "prune": [
            f"prune.calib_dataset={prefix}",
            f"prune.calib_seq_length={length}",
            "prune.ffn_hidden_size=48",
            f"export.save_path={out}/out.nemo",
        ],
        "finetune": training,
        "distill": [*training, f"model.kd_teacher_restore_from_path={folder}/model.nemo"],
        "evaluate": [f"evaluate.data_prefix={prefix}", f"evaluate.seq_length={length}", f"output_path={out}/out.json"],
        "evaluate speed": [*speed, "evaluate.decode_tokens=8", f"output_path={out}/out.json"],
    }[name]
    return [name.split()[0], f"model.restore_from_path={folder}/model.nemo", *keys]


NAMES = ["importance", "prune", "finetune", "distill", "evaluate", "evaluate speed"]


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_longer_than_the_window_is_refused(mistral, name, tmp_path, capsys):
    assert main(command(mistral, name, WINDOW + 1, tmp_path / "out")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minitron:")]
    assert f"({WINDOW + 1}) is longer than the checkpoint's sliding_window ({WINDOW})" in line
    assert not list(tmp_path.iterdir())


def test_the_window_is_kept_and_limits_what_is_assumed(mistral, tmp_path):
    with NemoReader(mistral / "model.nemo") as reader:
        config = reader.config
        assert reader.shape.sliding_window == WINDOW and reader.shape.max_position_embeddings == 128
    lengths = (config["encoder_seq_length"], config["data"]["seq_length"], config["max_position_embeddings"])
    assert (config["window_size"], lengths) == ([WINDOW, 0], (WINDOW, WINDOW, 128))
    back = convert(mistral / "model.nemo", tmp_path / "back", verify=True)
    assert (back / "config.json").read_bytes() == (mistral / "hf" / "config.json").read_bytes()
    assert json.loads((back / "config.json").read_text())["sliding_window"] == WINDOW


def test_a_window_without_a_family_that_has_one_is_refused(mistral, tmp_path):
    config = json.loads((mistral / "hf" / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "model.safetensors").symlink_to(mistral / "hf" / "model.safetensors")
    with pytest.raises(MinitronError, match=f"sliding_window must be null, found {WINDOW}"):
        convert(tmp_path / "hf", tmp_path / "none.nemo")


@pytest.mark.slow
def test_a_student_within_the_window_has_the_logits_of_transformers(mistral, zygote, tmp_path):
    sizes = ["prune.hidden_size=32", "prune.num_layers=2", f"prune.scores={tmp_path}/scores"]
    prune = ["prune", f"model.restore_from_path={mistral}/model.nemo", *sizes]
    lines = (
        command(mistral, "importance", WINDOW, tmp_path),
        [*prune, f"export.save_path={tmp_path}/student.nemo"],
        ["convert", f"input_name_or_path={tmp_path}/student.nemo", f"output_path={tmp_path}/back"],
    )
    assert zygote.run(f"{JOBS}:commands", 1, *lines) == [[0, 0, 0]]
    model = MistralForCausalLM.from_pretrained(tmp_path / "back", torch_dtype=torch.float32).eval()
    assert model.config.sliding_window == WINDOW
    tokens = torch.arange(3 * WINDOW).view(3, WINDOW) * 7 % 320
    (found,) = zygote.run(f"{JOBS}:logits", 1, None, f"{tmp_path}/student.nemo", tokens)
    with torch.no_grad():
        torch.testing.assert_close(found, model(tokens).logits, rtol=1e-4, atol=1e-4)
    longer = torch.arange(WINDOW + 1)[None]  # the reference heeds its window, so that equality here means something
    with torch.no_grad():
        within = model(longer).logits
        model.model.config.sliding_window = model.config.sliding_window = None
        assert not torch.equal(within, model(longer).logits)
