"""``verify=logits``: the walk over what was written, or will be, against transformers on the other side."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoint import HfReader, logits
from nemo_minitron.cli import main
from nemo_minitron.convert import convert, walk
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.decoder import Rotary
from nemo_minitron.synthetic import make_llama
from tests.checkpoint.test_gguf import write_gguf
from tests.llamas import DTYPES, SHAPES


def run(source, target, *keys):
    return main(["convert", f"input_name_or_path={source}", f"output_path={target}", "verify=logits", *keys])


@pytest.mark.parametrize("name", ["head_dim", "llama3_rope", "padded", "qkv_bias", "bf16"])
def test_both_ways(name, tmp_path, capsys):
    source = make_llama(tmp_path / "hf", SHAPES[name], dtype=DTYPES[name])
    assert run(source, tmp_path / "m.nemo", "make_vocab_size_divisible_by=128") == 0
    assert run(tmp_path / "m.nemo", tmp_path / "back") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "verify=logits" in line]
    assert len(said) == 2 and all("largest difference from transformers' logits" in line for line in said)


def test_a_rounded_output_is_compared_with_the_rounded_original(tmp_path):
    source = make_llama(tmp_path / "hf", SHAPES["gqa"])
    convert(source, tmp_path / "m.nemo", precision="bf16", verify="logits")
    convert(source, tmp_path / "again", format="hf", precision="bf16", verify="logits")


def test_a_gguf(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    with HfReader(path) as reader:
        difference, largest = logits.compare_logits(reader, path, torch.float32, reader.shape.vocab_size)
    assert difference <= 1e-4 < largest


def test_what_computes_something_else_does_not_appear(tmp_path, monkeypatch):
    """A RoPE that is read wrongly passes the comparison of tensors; here it stops the conversion."""
    source = make_llama(tmp_path / "hf", SHAPES["llama3_rope"])
    plain = Rotary.of.__func__
    monkeypatch.setattr(Rotary, "of", classmethod(lambda c, shape, *a: plain(c, shape.replace(rope_scaling=None), *a)))
    convert(source, tmp_path / "m.nemo", verify=True)
    with pytest.raises(MinitronError, match=r"logits must be those that transformers computes .* found a difference"):
        convert(source, tmp_path / "other.nemo", verify="logits")
    assert not (tmp_path / "other.nemo").exists()


def test_too_little_memory_is_said_before_the_work(tmp_path, monkeypatch):
    source = make_llama(tmp_path / "hf", SHAPES["gqa"])
    monkeypatch.setattr(logits, "available_bytes", lambda: 1 << 16)
    monkeypatch.setattr(walk, "_copy", None)
    with pytest.raises(MinitronError, match=r"verify=logits needs about 0\.0 GiB .* verify=true compares every tensor"):
        convert(source, tmp_path / "m.nemo", verify="logits")


def test_memory_that_is_there():
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) << 10
    assert 0 < logits.available_bytes() <= total


def test_sides_that_transformers_does_not_load(tmp_path):
    source = make_llama(tmp_path / "hf", SHAPES["gqa"])
    nemo = convert(source, tmp_path / "m.nemo")
    with pytest.raises(MinitronError, match="a HF folder or a GGUF on one side, found nemo and nemo"):
        convert(nemo, tmp_path / "n.nemo", verify="logits")
    with pytest.raises(MinitronError, match="verify: expected true, false or logits, found 'maybe'"):
        convert(source, tmp_path / "n.nemo", verify="maybe")


# ------------------------------------------------------------------------------------------- another head, more tokens


def test_a_tied_config_with_another_head(tmp_path):
    from transformers import AutoModelForCausalLM

    source = make_llama(tmp_path / "hf", SHAPES["tied"])
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors")
    with pytest.raises(
        MinitronError, match=r"'lm_head.weight' differs .*set tie_word_embeddings to false .*untie=true"
    ):
        convert(source, tmp_path / "m.nemo")
    nemo = convert(source, tmp_path / "m.nemo", untie=True, verify="logits")
    back = convert(nemo, tmp_path / "back", verify="logits")
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(back)
    assert torch.equal(model.lm_head.weight, head) and not torch.equal(model.get_input_embeddings().weight, head)


def test_what_cannot_be_untied_is_refused(tmp_path):
    source = make_llama(tmp_path / "hf", SHAPES["tied"])
    said = "^untie=true: expected a tied model with another output head beside its table, found "
    with pytest.raises(MinitronError, match=f"{said}no 'lm_head.weight' in .*hf"):
        convert(source, tmp_path / "m.nemo", untie=True)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    with pytest.raises(MinitronError, match=f"{said}a 'lm_head.weight' that equals it"):
        convert(source, tmp_path / "m.nemo", untie=True)
    with pytest.raises(MinitronError, match=f"{said}an untied model in"):
        convert(make_llama(tmp_path / "untied", SHAPES["gqa"]), tmp_path / "m.nemo", untie=True)
    assert not (tmp_path / "m.nemo").exists()
    nemo = convert(source, tmp_path / "m.nemo")
    with pytest.raises(MinitronError, match=r"untie must be absent for a \.nemo"):
        convert(nemo, tmp_path / "c", untie=True)


@pytest.mark.parametrize("name", ["gqa", "tied", "bf16"])
def test_a_vocabulary_grows_to_its_tokenizers(name, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = make_llama(tmp_path / "hf", SHAPES[name], dtype=DTYPES[name])
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([f"<new{number}>" for number in range(7)])
    tokenizer.save_pretrained(source)
    with pytest.raises(MinitronError, match="has 327 entries, the model's table 320 rows"):
        convert(source, tmp_path / "m.nemo")
    nemo = convert(source, tmp_path / "m.nemo", vocab="grow", make_vocab_size_divisible_by=64, verify="logits")
    back = convert(nemo, tmp_path / "back", verify="logits")
    model, before = (AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto") for folder in (back, source))
    assert model.config.vocab_size == 327 == len(AutoTokenizer.from_pretrained(back))
    for read in ("get_input_embeddings", "get_output_embeddings"):
        new, table = (getattr(which, read)().weight for which in (model, before))
        assert torch.equal(new[:320], table) and len(new) == 327
        torch.testing.assert_close(new[320:], table.double().mean(0).to(table.dtype).expand(7, -1), rtol=0, atol=0)


def test_a_vocabulary_that_fits_does_not_grow(tmp_path):
    source = make_llama(tmp_path / "hf", SHAPES["gqa"])
    assert (
        convert(source, tmp_path / "a.nemo", vocab="grow").read_bytes()
        == convert(source, tmp_path / "b.nemo").read_bytes()
    )
    with pytest.raises(MinitronError, match="vocab: expected one of refuse, grow"):
        convert(source, tmp_path / "c.nemo", vocab="shrink")
    for file in source.glob("*token*"):
        file.unlink()
    with pytest.raises(MinitronError, match=r"^vocab=grow: expected a tokenizer whose tokens get rows, found none in"):
        convert(source, tmp_path / "c.nemo", vocab="grow")
