"""One process, one set of Megatron groups, several small models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nemo_minitron.model.shape import LinearScaling, ModelShape, RopeScaling
from tests.llamas import GQA
from tests.zygote import Zygote

SHAPES = {
    "gqa_untied": ModelShape(2, 64, 128, 8, 4, 8, 512, 512, sliding_window=96),  # Mistral; logits are of 96 tokens
    "tied_head_dim_rope": ModelShape(
        3, 48, 96, 6, 2, 16, 500, 500, True, 500000.0, RopeScaling(32.0, 1.0, 4.0, 64), 4096, 1e-6
    ),
    "mha_odd_vocab": ModelShape(2, 32, 64, 4, 4, 8, 300, 300, False, 10000.0, LinearScaling(4.0), 1024),
    "qwen2": ModelShape(2, 64, 96, 8, 2, 8, 512, 512, True, 1000000.0, None, 1024, qkv_bias=True),
    "qwen3": ModelShape(3, 48, 96, 6, 2, 16, 512, 512, False, 1000000.0, None, 1024, family="qwen3"),
}


@pytest.fixture(scope="session")
def zygote():
    """Runs functions on grids of real processes that share one import of NeMo."""
    handle = Zygote()
    yield handle
    handle.close()


@pytest.fixture(scope="session")
def trainer():
    """A trainer that runs models forward in this process, with Megatron initialised at TP1 x PP1."""
    from nemo_minitron import runtime

    runtime.prepare()
    from nemo_minitron.nemo.trainer import inference_trainer

    runtime.init_distributed()
    return inference_trainer()


@pytest.fixture(scope="session", params=list(SHAPES))
def pair(request, tmp_path_factory):
    """(HF folder, .nemo, shape) of one random Llama; the odd vocabulary is padded to a multiple of 128."""
    from nemo_minitron.convert import convert
    from nemo_minitron.synthetic import make_llama

    shape = SHAPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    hf = make_llama(folder / "hf", shape, seed=3)
    nemo = folder / "model.nemo"
    convert(hf, nemo, make_vocab_size_divisible_by=128 if shape.vocab_size == 300 else None)
    return hf, nemo, shape


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Folder with ``model.nemo``, others that do not go with it or are broken, and tokens of two vocabularies."""
    from nemo_minitron.convert import convert
    from nemo_minitron.data.preprocess import preprocess
    from nemo_minitron.synthetic import make_llama

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
    few_positions = GQA.replace(max_position_embeddings=16)
    convert(make_llama(folder / "short_hf", few_positions), folder / "short.nemo")
    bare = convert(folder / "hf", folder / "bare")
    shutil.rmtree(bare / "model_weights")
    (folder / "cut.nemo").write_bytes((folder / "model.nemo").read_bytes()[:-20_000])
    for name, tokenizer in (("own", "hf"), ("foreign", "larger_hf"), ("permuted", "permuted_hf")):
        preprocess("pydoc_topics", folder / name, tokenizer_type=str(folder / tokenizer))
    whole, short = folder / "own_text_document", folder / "short_text_document"
    shutil.copy(f"{whole}.idx", f"{short}.idx")
    content = Path(f"{whole}.bin").read_bytes()
    Path(f"{short}.bin").write_bytes(content[: len(content) // 4 * 2])
    return folder


def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """transformers' own logits in float32, ``[b, s, V]``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager").eval()
    assert type(model).__name__ in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
    with torch.no_grad():
        return model(tokens).logits


def nemo_logits(model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a NeMo model, ours or NeMo's own, over the true vocabulary, ``[b, s, V]``."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = model.model.eval()(input_ids=tokens, position_ids=positions, attention_mask=None)
    return logits[..., : getattr(model, "true_vocab_size", None)]
