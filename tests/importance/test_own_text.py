"""What a model writes against transformers: each token drawn from the distribution that transformers gives there."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoint import HfReader
from nemo_minitron.importance import own_text
from nemo_minitron.importance.own_text import LONGEST, _draw, steps, write_blocks
from nemo_minitron.synthetic import make_llama
from tests.llamas import SHAPES


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_every_token_is_drawn_from_what_transformers_expects_there(name, tmp_path):
    """The same draws, made again from transformers' logits of whole sequences, give the same tokens."""
    folder = make_llama(tmp_path / "hf", SHAPES[name])
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
    with HfReader(folder) as reader:
        found = write_blocks(reader, 3, 24, seed=7)
    generator = torch.Generator().manual_seed(7)
    expected = torch.randint(SHAPES[name].vocab_size, (3, 1), generator=generator)
    while expected.shape[1] < 24:
        chances = torch.softmax(model(expected).logits[:, -1].double(), -1)
        uniform = torch.rand(3, 1, generator=generator, dtype=torch.float64)
        expected = torch.cat([expected, (chances.cumsum(-1) < uniform).sum(-1, keepdim=True)], dim=1)
    assert torch.equal(found, expected)


def test_another_seed_writes_another_text_and_half_precision_runs(tmp_path):
    shape = SHAPES[next(iter(SHAPES))]
    with HfReader(make_llama(tmp_path / "hf", shape)) as reader:
        one, other = (write_blocks(reader, 2, 12, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
        with pytest.raises(ValueError, match="nothing to write"):
            write_blocks(reader, 0, 12, seed=0)
    assert one.shape == (2, 12) and one.min() >= 0 and one.max() < shape.vocab_size
    assert not torch.equal(one, other)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """200,000 draws from one distribution, against its chances; a token without a chance never comes."""
    logits = torch.tensor([0.0, -torch.inf, 2.0, 1.0, -3.0, -torch.inf])
    drawn = _draw(logits.expand(200_000, -1), torch.Generator().manual_seed(0))
    found, expected = torch.bincount(drawn, minlength=6) / len(drawn), torch.softmax(logits, -1)
    assert found[1] == found[5] == 0
    assert (found - expected).abs().max() < 5 * (0.25 / len(drawn)) ** 0.5


@pytest.mark.parametrize(("length", "parts", "each"), [(24, 1, 24), (LONGEST, 1, LONGEST), (2 * LONGEST + 3, 3, 87)])
def test_a_long_block_is_filled_with_several_samples(length, parts, each, tmp_path):
    """Blocks hold the samples of one call, one behind the other, without what is too much."""
    told: list[int] = []
    with HfReader(make_llama(tmp_path / "hf", SHAPES["gqa"])) as reader:
        blocks = write_blocks(reader, 2, length, seed=3, progress=told.append)
        samples = write_blocks(reader, 2 * parts, each, seed=3)
        total = steps(reader.shape, 2, length, torch.float32)
    assert blocks.shape == (2, length)
    assert torch.equal(blocks, samples.view(2, -1)[:, :length])
    assert sum(told) == total == each - 1


def test_samples_that_have_no_room_together_are_written_in_turns(tmp_path, monkeypatch):
    """Three of a size of which two fit: the first two as without the bound, the last as the next of the generator."""
    told: list[int] = []
    with HfReader(make_llama(tmp_path / "hf", SHAPES["gqa"])) as reader:
        shape = reader.shape
        two = write_blocks(reader, 2, 8, seed=5)
        monkeypatch.setattr(
            own_text, "CACHE_BYTES", 2 * 4 * 2 * shape.num_layers * shape.num_query_groups * 8 * shape.kv_channels
        )
        three = write_blocks(reader, 3, 8, seed=5, progress=told.append)
        assert len(told) == steps(shape, 3, 8, torch.float32) == 2 * 7
    assert torch.equal(three[:2], two) and not torch.equal(three[2], two[0])
