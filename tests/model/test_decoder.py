"""The layer-wise forward pass against transformers' own models, on every supported shape."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoint import HfReader
from nemo_minitron.model import layout
from nemo_minitron.model.decoder import Layer, Rotary, rms_norm
from nemo_minitron.synthetic import make_llama
from tests.llamas import SHAPES


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_streams_and_logits_are_those_of_transformers(name, tmp_path):
    folder = make_llama(tmp_path / "hf", SHAPES[name])
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
    tokens = torch.randint(0, SHAPES[name].vocab_size, (2, 96), generator=torch.Generator().manual_seed(5))
    expected = model(tokens, output_hidden_states=True)
    with HfReader(folder) as reader:
        shape = reader.shape
        rotary = Rotary.of(shape, tokens.shape[1])
        x = reader.tensor(layout.EMBEDDING)[tokens]
        for number in range(shape.num_layers):
            torch.testing.assert_close(x, expected.hidden_states[number], rtol=1e-4, atol=1e-5)
            weights = {row.key: reader.tensor(row, number) for row in layout.layer_parameters(shape)}
            x = Layer(shape, weights).forward(x, rotary)
        x = rms_norm(x, reader.tensor(layout.FINAL_NORM), shape.layernorm_epsilon)
        head = layout.EMBEDDING if shape.share_embeddings_and_output_weights else layout.OUTPUT
        torch.testing.assert_close(x @ reader.tensor(head).T, expected.logits, rtol=1e-4, atol=1e-4)


def test_norm_in_bfloat16_is_computed_in_float32():
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16) * 100
    weight = torch.rand(64)
    y = x.double()
    expected = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    found = rms_norm(x, weight, 1e-5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=0)


def test_norm_of_a_small_stream_is_that_of_transformers():
    """Where the mean square is as small as epsilon, which else changes nothing that a tolerance sees."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = 1e-3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    norm = LlamaRMSNorm(32, eps=1e-5)
    torch.testing.assert_close(rms_norm(x, norm.weight, 1e-5), norm(x), rtol=1e-5, atol=1e-8)
