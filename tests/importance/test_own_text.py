"""What a model writes against transformers: each token drawn from the distribution that transformers gives there."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoint import HfReader
from nemo_minitron.importance.own_text import write_samples
from nemo_minitron.synthetic import make_llama
from tests.llamas import SHAPES


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_every_token_is_drawn_from_what_transformers_expects_there(name, tmp_path):
    """The same draws, made again from transformers' logits of whole sequences, give the same tokens."""
    folder = make_llama(tmp_path / "hf", SHAPES[name])
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
    with HfReader(folder) as reader:
        found = write_samples(reader, 3, 24, seed=7)
    generator = torch.Generator().manual_seed(7)
    expected = torch.randint(SHAPES[name].vocab_size, (3, 1), generator=generator)
    while expected.shape[1] < 24:
        chances = torch.softmax(model(expected).logits[:, -1].float(), -1)
        expected = torch.cat([expected, torch.multinomial(chances, 1, generator=generator)], dim=1)
    assert torch.equal(found, expected)


def test_another_seed_writes_another_text_and_half_precision_runs(tmp_path):
    shape = SHAPES[next(iter(SHAPES))]
    with HfReader(make_llama(tmp_path / "hf", shape)) as reader:
        one, other = (write_samples(reader, 2, 12, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
        with pytest.raises(ValueError, match="nothing to write"):
            write_samples(reader, 0, 12, seed=0)
    assert one.shape == (2, 12) and one.min() >= 0 and one.max() < shape.vocab_size
    assert not torch.equal(one, other)
