"""One process, one set of Megatron groups, several small models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_minitron.shape import ModelShape, RopeScaling

SHAPES = {
    "gqa_untied": ModelShape(2, 64, 128, 8, 4, 8, 512, 512),
    "tied_head_dim_rope": ModelShape(
        3, 48, 96, 6, 2, 16, 500, 500, True, 500000.0, RopeScaling(32.0, 1.0, 4.0, 64), 4096, 1e-6
    ),
    "mha_odd_vocab": ModelShape(2, 32, 64, 4, 4, 8, 300, 300, False, 10000.0, None, 1024),
    "qwen2": ModelShape(2, 64, 96, 8, 2, 8, 512, 512, True, 1000000.0, None, 1024, qkv_bias=True),
}


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


def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """transformers' own logits in float32, ``[b, s, V]``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager").eval()
    assert type(model).__name__ in ("LlamaForCausalLM", "Qwen2ForCausalLM")
    with torch.no_grad():
        return model(tokens).logits


def nemo_logits(model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a NeMo model, ours or NeMo's own, over the true vocabulary, ``[b, s, V]``."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = model.model.eval()(input_ids=tokens, position_ids=positions, attention_mask=None)
    return logits[..., : getattr(model, "true_vocab_size", None)]
