"""The family of docs/extending.md, added by one file from outside of the package, against a model in transformers."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.convert import convert
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.errors import MinitronError
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import Rotary, read_head, read_layer, rms_norm
from nemo_minitron.registry import FAMILIES, load_extensions
from nemo_minitron.synthetic import make_llama
from tests.extending import example, lines_of_code
from tests.llamas import GQA

JOBS = "tests.nemo.extending_jobs"
SIZES = {"hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
TOKENS = torch.arange(3 * 40).view(3, 40) * 7 % 320


class NormedQwen2Config(Qwen3Config):
    model_type = "normed_qwen2"


class NormedQwen2ForCausalLM(Qwen3ForCausalLM):
    """Transformers' Qwen3 with biases where its Qwen2 has them."""

    config_class = NormedQwen2Config

    def __init__(self, config: NormedQwen2Config) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                linear = getattr(layer.self_attn, name)
                setattr(layer.self_attn, name, torch.nn.Linear(linear.in_features, linear.out_features))


@pytest.fixture(scope="module")
def normed(tmp_path_factory):
    """Folder with the document's file, a random model of it with norms far from one, and tokens of its vocabulary."""
    folder = tmp_path_factory.mktemp("normed")
    (folder / "mine.py").write_text(example("A model family"))
    config = NormedQwen2Config(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=128,
        rope_theta=1e6,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = NormedQwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.3, 3.0)
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "hf")
    llama = make_llama(folder / "llama", GQA)
    PreTrainedTokenizerFast.from_pretrained(llama).save_pretrained(folder / "hf")
    preprocess("pydoc_topics", folder / "data", tokenizer_type=str(folder / "hf"))
    return folder


@pytest.fixture
def known(normed):
    """This process knows the family for one test."""
    (path,) = load_extensions([str(normed / "mine.py")])
    yield FAMILIES.get("normed_qwen2")
    del FAMILIES._files["normed_qwen2"], FAMILIES._loaded["normed_qwen2"]
    for name in [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == str(path)]:
        del sys.modules[name]


def command(folder: Path, name: str, *keys: str) -> list[str]:
    return [name, *keys, f"extensions=[{folder / 'mine.py'}]"]


def transformers_logits(folder: Path) -> torch.Tensor:
    model, info = NormedQwen2ForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_the_file_is_short():
    assert lines_of_code(example("A model family")) <= 40


def test_without_the_file_the_family_is_named(normed, tmp_path):
    with pytest.raises(MinitronError, match=r"must be one of LlamaForCausalLM, .* found 'NormedQwen2ForCausalLM'"):
        convert(normed / "hf", tmp_path / "none.nemo")
    assert not list(tmp_path.iterdir())


def test_the_plain_decoder_computes_what_transformers_does(known, normed, tmp_path):
    nemo = convert(normed / "hf", tmp_path / "m.nemo", verify=True)
    with NemoReader(nemo) as reader:
        shape = reader.shape
        assert (shape.family, shape.qkv_bias) == ("normed_qwen2", True) and reader.config["qk_layernorm"] is True
        expected = NormedQwen2ForCausalLM.from_pretrained(normed / "hf")
        assert shape.num_parameters() == expected.num_parameters()
        rotary = Rotary.of(shape, TOKENS.shape[1])
        x = reader.tensor(layout.EMBEDDING)[TOKENS]
        for layer in range(shape.num_layers):
            x = read_layer(reader, layer).forward(x, rotary)
        norm, head = read_head(reader)
    found = rms_norm(x, norm, shape.layernorm_epsilon) @ head.T
    torch.testing.assert_close(found, transformers_logits(normed / "hf"), rtol=1e-4, atol=2e-4)
    back = convert(nemo, tmp_path / "back", verify=True)
    config, source = (json.loads((folder / "config.json").read_text()) for folder in (back, normed / "hf"))
    assert config == source | {"torch_dtype": "float32", "dtype": "float32"}
    made = make_llama(tmp_path / "made", shape)  # a config that has no source
    assert transformers_logits(made).isfinite().all()


@pytest.fixture(scope="module")
def pruned(normed, zygote):
    """Teacher, scores and student of the commands, run where only the file knows the family."""
    keys = [f"model.restore_from_path={normed}/teacher.nemo"]
    calibration = [f"calibration.data_prefix={normed}/data_text_document", "calibration.num_samples=16"]
    calibration += ["calibration.seq_length=32", f"output_path={normed}/scores"]
    sizes = [f"prune.{name}={size}" for name, size in SIZES.items()]
    files = [f"prune.scores={normed}/scores", f"export.save_path={normed}/student.nemo"]
    (found,) = zygote.run(
        f"{JOBS}:commands",
        1,
        command(normed, "convert", f"input_name_or_path={normed}/hf", f"output_path={normed}/teacher.nemo"),
        command(normed, "importance", *keys, *calibration),
        command(normed, "prune", *keys, *sizes, *files),
    )
    assert found == [0, 0, 0]
    return normed


def distillation(folder: Path, student: str, output: str) -> list[str]:
    """Keys of two steps of ``output``, named ``student`` before, with the files of ``pruned``."""
    data = f"{{train:[1.0,{folder}/data_text_document],validation:[{folder}/data_text_document]}}"
    return [
        f"model.restore_from_path={folder}/{student}.nemo",
        f"model.kd_teacher_restore_from_path={folder}/teacher.nemo",
        f"model.nemo_path={folder}/{output}.nemo",
        f"model.data.data_prefix={data}",
        "model.data.seq_length=32",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "trainer.limit_val_batches=1",
        "model.micro_batch_size=2",
        "model.global_batch_size=2",
        "model.optim.lr=1e-2",
        f"exp_manager.explicit_log_dir={folder}/log_{output}",
    ]


def test_a_student_is_distilled_and_exported(pruned, zygote):
    distill = distillation(pruned, "student", "distilled")
    (found,) = zygote.run(f"{JOBS}:commands", 1, command(pruned, "distill", *distill))
    assert found == [0]
    back = [f"input_name_or_path={pruned}/distilled.nemo", f"output_path={pruned}/distilled_hf"]
    (found,) = zygote.run(f"{JOBS}:commands", 1, command(pruned, "convert", *back))
    assert found == [0]
    config = json.loads((pruned / "distilled_hf" / "config.json").read_text())
    assert (config["architectures"], config["head_dim"], config["hidden_size"]) == (["NormedQwen2ForCausalLM"], 16, 32)
    expected = transformers_logits(pruned / "distilled_hf")
    (found,) = zygote.run(f"{JOBS}:logits", 1, f"{pruned}/mine.py", f"{pruned}/distilled.nemo", TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    (before,) = zygote.run(f"{JOBS}:logits", 1, f"{pruned}/mine.py", f"{pruned}/student.nemo", TOKENS)
    assert (before - found).abs().max() > 1e-2  # it was trained


def test_a_model_of_it_is_refused_without_the_file(pruned, tmp_path):
    with pytest.raises(
        MinitronError, match=r"family must be one of llama, .* found 'normed_qwen2'; extensions=\[./FILE.py\]"
    ):
        convert(pruned / "teacher.nemo", tmp_path / "none")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_three_examples_work_together(pruned, zygote):
    """A family, a metric and a loss, each of a file: scored, pruned, distilled, exported."""
    files = {"mine": "A model family", "metric": "An importance metric", "loss": "A distillation loss"}
    for name, section in files.items():
        (pruned / f"{name}.py").write_text(example(section))
    extensions = f"extensions=[{','.join(str(pruned / f'{name}.py') for name in files)}]"
    teacher = f"model.restore_from_path={pruned}/teacher.nemo"
    measured = ["calibration.num_samples=8", "calibration.seq_length=32", "importance.metrics=[written]"]
    measured += [f"calibration.data_prefix={pruned}/data_text_document", f"output_path={pruned}/all_scores"]
    cut = ["prune.ffn_hidden_size=64", "prune.ranking=written", "prune.compensate=false"]
    cut += [f"prune.scores={pruned}/all_scores", f"export.save_path={pruned}/all_student.nemo"]
    distill = distillation(pruned, "all_student", "all_distilled")
    export = [f"input_name_or_path={pruned}/all_distilled.nemo", f"output_path={pruned}/all_hf"]
    lines = (
        ["importance", teacher, *measured, extensions],
        ["prune", teacher, *cut, extensions],
        ["distill", *distill, "distill.loss=hellinger", extensions],
        ["convert", *export, extensions],
    )
    for line in lines:
        assert zygote.run(f"{JOBS}:commands", 1, line) == [[0]]
    assert "ranking: written\n" in (pruned / "all_student.plan.yaml").read_text()
    (log,) = (pruned / "log_all_distilled").rglob("metrics.csv")
    losses = [float(row["val_kd_loss"]) for row in csv.DictReader(log.open()) if row.get("val_kd_loss")]
    assert losses and all(0 < loss < 1 for loss in losses)  # the distance is bounded by 1
    assert transformers_logits(pruned / "all_hf").isfinite().all()
