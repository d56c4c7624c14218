import filecmp
import json

import pytest
import torch
from safetensors.torch import load_file

from nemo_minitron.cli import main
from nemo_minitron.model.shape import shape_of
from nemo_minitron.synthetic import EOS, make_llama
from tests.llamas import DTYPES, GQA, SHAPES


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_loads_it_whole(name, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shape = SHAPES[name]
    folder = make_llama(tmp_path / "m", shape, dtype=DTYPES[name])
    model, info = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == DTYPES[name]
    assert model.num_parameters() == shape.num_parameters()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == shape.vocab_size
    assert tokenizer.eos_token == EOS and tokenizer.eos_token_id == model.config.eos_token_id
    ids = tokenizer("The assert statement.", return_tensors="pt").input_ids
    logits = model.float()(ids).logits
    assert torch.isfinite(logits).all() and 0.2 < logits.std() < 10
    assert tokenizer.decode(ids[0]) == "The assert statement."


def test_same_seed_same_bytes(tmp_path):
    a, b = make_llama(tmp_path / "a", GQA, seed=3), make_llama(tmp_path / "b", GQA, seed=3)
    c = make_llama(tmp_path / "c", GQA, seed=4)
    names = sorted(p.name for p in a.iterdir())
    assert filecmp.cmpfiles(a, b, names, shallow=False)[0] == names
    assert not filecmp.cmp(a / "model.safetensors", c / "model.safetensors", shallow=False)


def test_few_texts_still_fill_the_vocabulary(tmp_path):
    from transformers import AutoTokenizer

    folder = make_llama(tmp_path / "m", GQA, tokenizer_texts=["abc abc"])
    assert len(AutoTokenizer.from_pretrained(folder)) == GQA.vocab_size


def test_bias_is_nemos_of_every_linear_layer():
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8, "vocab_size": 320}
    plain, biased = shape_of({**sizes, "bias": False}), shape_of({**sizes, "bias": True})
    assert biased == plain.replace(qkv_bias=True, proj_bias=True, mlp_bias=True)


def test_command_replaces_its_own_output_and_nothing_else(tmp_path, capsys):
    command = ["synthesize", "model=tiny", f"output_path={tmp_path}/m"]
    assert main(command) == 0
    first = (tmp_path / "m" / "model.safetensors").read_bytes()
    assert main([*command, "seed=5"]) == 0
    assert (tmp_path / "m" / "model.safetensors").read_bytes() != first
    (tmp_path / "m" / "thesis.tex").write_text("years")
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    assert main(command) == 2 and "thesis.tex" in capsys.readouterr().err
    assert main([*command, f"output_path={tmp_path}/m/thesis.tex/m"]) == 2
    assert "writable destination" in capsys.readouterr().err
    assert main([*command, "model.num_query_groups=3"]) == 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("16", torch.float16)])
def test_command_writes_half_of_the_bytes_of_the_same_weights(precision, dtype, tmp_path, capsys):
    command = ["synthesize", "model=tiny"]
    assert main([*command, f"output_path={tmp_path}/whole"]) == 0
    assert main([*command, f"output_path={tmp_path}/half", f"precision={precision}"]) == 0
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert whole.keys() == half.keys()
    assert all(torch.equal(half[name], whole[name].to(dtype)) and half[name].dtype == dtype for name in whole)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == str(dtype).removeprefix("torch.")
    assert main([*command, f"output_path={tmp_path}/none", "precision=fp8"]) == 2
    assert "precision must be one of" in capsys.readouterr().err and not (tmp_path / "none").exists()
