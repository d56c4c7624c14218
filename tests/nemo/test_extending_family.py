"""The Qwen3 of docs/extending.md, added by one file from outside of the package, against transformers' own."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.fuse import fuse
from nemo_minitron.convert import convert
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.errors import MinitronError
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import Rotary, read_head, read_layer, rms_norm
from nemo_minitron.registry import FAMILIES, load_extensions
from nemo_minitron.synthetic import make_llama
from tests.extending import example, lines_of_code
from tests.llamas import GQA
from tests.nemo.grid_jobs import LENGTH

JOBS = "tests.nemo.extending_jobs"
SIZES = {"hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
TOKENS = torch.arange(3 * 40).view(3, 40) * 7 % 320


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """Folder with the document's file, a random Qwen3 whose norms are far from one, and tokens of its vocabulary."""
    folder = tmp_path_factory.mktemp("qwen3")
    (folder / "mine.py").write_text(example("A model family"))
    config = Qwen3Config(
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
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.3, 3.0)
    model.save_pretrained(folder / "hf")
    llama = make_llama(folder / "llama", GQA)
    PreTrainedTokenizerFast.from_pretrained(llama).save_pretrained(folder / "hf")
    preprocess("pydoc_topics", folder / "data", tokenizer_type=str(folder / "hf"))
    return folder


@pytest.fixture
def known(qwen3):
    """This process knows the family for one test."""
    (path,) = load_extensions([str(qwen3 / "mine.py")])
    yield FAMILIES.get("qwen3")
    del FAMILIES._files["qwen3"], FAMILIES._loaded["qwen3"]
    for name in [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == str(path)]:
        del sys.modules[name]


def command(folder: Path, name: str, *keys: str) -> list[str]:
    return [name, *keys, f"extensions=[{folder / 'mine.py'}]"]


def transformers_logits(folder: Path) -> torch.Tensor:
    model, info = Qwen3ForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_the_file_is_short():
    assert lines_of_code(example("A model family")) <= 40


def test_without_the_file_the_family_is_named(qwen3, tmp_path):
    with pytest.raises(MinitronError, match=r"must be one of LlamaForCausalLM, .* found 'Qwen3ForCausalLM'"):
        convert(qwen3 / "hf", tmp_path / "none.nemo")
    assert not list(tmp_path.iterdir())


def test_the_plain_decoder_computes_what_transformers_does(known, qwen3, tmp_path):
    nemo = convert(qwen3 / "hf", tmp_path / "m.nemo", verify=True)
    with NemoReader(nemo) as reader:
        shape = reader.shape
        assert shape.family == "qwen3" and reader.config["qk_layernorm"] is True
        expected = Qwen3ForCausalLM.from_pretrained(qwen3 / "hf")
        assert shape.num_parameters() == expected.num_parameters()
        rotary = Rotary.of(shape, TOKENS.shape[1])
        x = reader.tensor(layout.EMBEDDING)[TOKENS]
        for layer in range(shape.num_layers):
            x = read_layer(reader, layer).forward(x, rotary)
        norm, head = read_head(reader)
    found = rms_norm(x, norm, shape.layernorm_epsilon) @ head.T
    torch.testing.assert_close(found, transformers_logits(qwen3 / "hf"), rtol=1e-4, atol=2e-4)
    back = convert(nemo, tmp_path / "back", verify=True)
    assert (back / "config.json").read_text() == (qwen3 / "hf" / "config.json").read_text()
    made = make_llama(tmp_path / "made", shape)  # a config that has no source
    assert transformers_logits(made).isfinite().all() and AutoConfig.from_pretrained(made).head_dim == 16


@pytest.mark.parametrize(
    ("said", "instead", "message"),
    [
        ("qk_layernorm: true\n", "qk_layernorm: false\n", "qk_layernorm must be true, found false"),
        ("qk_layernorm: true\n", "", "qk_layernorm must be true, found null"),
        ("qkv_bias: false\n", "qkv_bias: true\n", "qkv_bias must be false"),
        ("  family: qwen3\n", "  family: [qwen3]\n", "family must be one of llama, mistral, qwen2, qwen3, found"),
    ],
)
def test_a_config_that_says_other_layers_is_refused(known, qwen3, tmp_path, said, instead, message):
    config = convert(qwen3 / "hf", tmp_path / "folder") / "model_config.yaml"
    text = config.read_text()
    assert said in text
    config.write_text(text.replace(said, instead))
    with pytest.raises(MinitronError, match=message):
        NemoReader(tmp_path / "folder")


def test_a_model_of_nemos_own_is_recognised_by_its_keys(known, qwen3, tmp_path):
    config = convert(qwen3 / "hf", tmp_path / "folder") / "model_config.yaml"
    config.write_text(config.read_text().replace("  family: qwen3\n", ""))
    with NemoReader(tmp_path / "folder") as reader:
        assert reader.shape.family == "qwen3"


@pytest.fixture(scope="module")
def pruned(qwen3, zygote):
    """Teacher, scores and student of the commands, run where only the file knows the family."""
    keys = [f"model.restore_from_path={qwen3}/teacher.nemo"]
    calibration = [f"calibration.data_prefix={qwen3}/data_text_document", "calibration.num_samples=16"]
    calibration += ["calibration.seq_length=32", f"output_path={qwen3}/scores"]
    sizes = [f"prune.{name}={size}" for name, size in SIZES.items()]
    files = [f"prune.scores={qwen3}/scores", f"export.save_path={qwen3}/student.nemo"]
    (found,) = zygote.run(
        f"{JOBS}:commands",
        1,
        command(qwen3, "convert", f"input_name_or_path={qwen3}/hf", f"output_path={qwen3}/teacher.nemo"),
        command(qwen3, "importance", *keys, *calibration),
        command(qwen3, "prune", *keys, *sizes, *files),
    )
    assert found == [0, 0, 0]
    return qwen3


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
    assert (config["architectures"], config["head_dim"], config["hidden_size"]) == (["Qwen3ForCausalLM"], 16, 32)
    expected = transformers_logits(pruned / "distilled_hf")
    (found,) = zygote.run(f"{JOBS}:logits", 1, f"{pruned}/mine.py", f"{pruned}/distilled.nemo", TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    (before,) = zygote.run(f"{JOBS}:logits", 1, f"{pruned}/mine.py", f"{pruned}/student.nemo", TOKENS)
    assert (before - found).abs().max() > 1e-2  # it was trained


def test_gradients_at_every_tensor_parallel_size(known, pruned, zygote):
    """The weight of a norm is one for all heads: its gradient is the sum over the ranks that hold them."""
    generator = torch.Generator().manual_seed(5)
    blocks = torch.randint(0, 320, (8, LENGTH + 1), generator=generator)
    model = Qwen3ForCausalLM.from_pretrained(pruned / "hf", torch_dtype=torch.float32, attn_implementation="eager")
    F.cross_entropy(model(blocks[:, :-1]).logits.flatten(0, 1), blocks[:, 1:].flatten()).backward()
    named = dict(model.named_parameters())
    step = (blocks, torch.ones(8, LENGTH), {"kd_weight": 0.0, "lm_weight": 1.0})
    with NemoReader(pruned / "teacher.nemo") as reader:
        shape = reader.shape
    for grid in ((1, 1, False), (2, 1, False), (2, 1, True)):
        found = zygote.run(f"{JOBS}:gradients", grid[0], f"{pruned}/mine.py", f"{pruned}/teacher.nemo", grid, *step)[0]
        for row, layer in layout.slots(shape):
            expected = fuse(row, [named[name.format(l=layer)].grad for name in row.hf], shape)
            torch.testing.assert_close(found[row.key, layer][: len(expected)], expected, rtol=1e-3, atol=1e-5)


def test_a_model_of_it_is_refused_without_the_file(pruned, tmp_path):
    with pytest.raises(MinitronError, match=r"family must be one of llama, .* found 'qwen3'; extensions=\[./FILE.py\]"):
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
