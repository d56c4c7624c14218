"""Calibration blocks: from tokens, from text, from blends."""

import pytest
import torch

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.config.sections import Calibration
from nemo_minitron.convert import convert
from nemo_minitron.data.blocks import token_blocks
from nemo_minitron.data.calibration import _mixed, block_length, draw_blocks, shares
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.data.tokens import data_fingerprint
from nemo_minitron.errors import MinitronError
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA

TEXTS = [f"Sentence {i} says that {i * i} is the square of {i}." for i in range(200)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A ``.nemo`` with its tokenizer, a text, and the text's tokens."""
    folder = tmp_path_factory.mktemp("model")
    make_llama(folder / "hf", GQA, tokenizer_texts=TEXTS)
    convert(folder / "hf", folder / "model.nemo")
    (folder / "text.txt").write_text("\n".join(TEXTS))
    preprocess(folder / "text.txt", folder / "tokens", tokenizer_type=str(folder / "hf"))
    return folder


@pytest.fixture
def reader(model):
    with NemoReader(model / "model.nemo") as reader:
        yield reader


def test_the_same_is_drawn_from_text_as_from_its_tokens(model, reader):
    prefix = f"{model}/tokens_text_document"
    tokens, counted, data = draw_blocks(Calibration(data_prefix=prefix, num_samples=5), 32, reader)
    from_text = draw_blocks(Calibration(path=f"{model}/text.txt", num_samples=5), 32, reader)
    assert torch.equal(tokens, token_blocks(prefix, 32, num_samples=5, seed=Calibration().seed)[:, :-1])
    assert torch.equal(from_text.tokens, tokens) and from_text.fingerprint == data == data_fingerprint(prefix)
    mixed, counts, both = draw_blocks(Calibration(data_prefix=[0.6, prefix, 0.4, prefix], num_samples=5), 32, reader)
    assert torch.equal(mixed, tokens[[0, 0, 1, 1, 2]]) and both != data
    assert counted is from_text.counted is counts is None


def test_weights_share_out_every_sample(model):
    prefix = f"{model}/tokens_text_document"
    blend = [3, prefix, 2, prefix, 1, prefix]
    assert [count for _, count in shares(Calibration(data_prefix=blend, num_samples=11))] == [6, 4, 1]
    assert [count for _, count in shares(Calibration(data_prefix=[9, prefix, 1, prefix], num_samples=1))] == [1]


def test_a_text_that_no_sample_falls_to_is_told_of(model, capsys):
    """A blend would be another one than its weights say, and nobody would know."""
    one, other = (f"{model}/tokens_text_document", f"{model}/../{model.name}/tokens_text_document")
    few = Calibration(data_prefix=[0.9, one, 0.1, other], num_samples=4)
    assert shares(few) == [(one, 4)]
    said = capsys.readouterr().err
    assert f"none of calibration.num_samples=4 is drawn from '{other}', whose weight is 0.1 of 1;" in said
    shares(Calibration(data_prefix=[0.9, one, 0.1, other], num_samples=11))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("counts", [(8, 8), (3, 9, 4), (15, 1)])
def test_any_first_few_samples_have_each_texts_share(model, counts):
    """What re-solves weights takes the first samples, and what is held back the last."""
    weights = [item for count in counts for item in (count, f"{model}/tokens_text_document")]
    with NemoReader(model / "model.nemo") as reader:
        drawn = draw_blocks(Calibration(data_prefix=weights, num_samples=sum(counts)), 16, reader).tokens
    alone = token_blocks(f"{model}/tokens_text_document", 16, num_samples=max(counts), seed=Calibration().seed)[:, :-1]
    parts = [alone[:count] for count in counts]
    order = _mixed(counts)
    assert torch.equal(drawn, torch.cat(parts)[order])
    of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[order]
    for first in range(1, sum(counts)):
        for part, count in enumerate(counts):
            assert abs(int((of[:first] == part).sum()) - first * count / sum(counts)) <= 1


def test_a_block_is_as_long_as_the_model_was_trained_on_unless_asked(reader):
    assert block_length(Calibration(seq_length=16), reader) == 16
    assert block_length(Calibration(), reader) == reader.config["encoder_seq_length"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "expected one of calibration.data_prefix and calibration.path, found both or none"),
        ({"data_prefix": "P", "path": "T"}, "found both or none"),
        ({"data_prefix": ["P", "P"]}, "several prefixes need weights"),
        ({"data_prefix": "P", "num_samples": 0}, "calibration.num_samples: expected at least 1, found 0"),
        ({"data_prefix": "P", "own_samples": -1}, "calibration.own_samples: expected 0 or more, found -1"),
        ({"path": "absent"}, "calibration.path: no file or folder 'absent'"),
    ],
)
def test_what_cannot_be_is_refused(model, reader, settings, message):
    prefix = f"{model}/tokens_text_document"
    if "data_prefix" in settings:
        given = settings["data_prefix"]
        settings = {**settings, "data_prefix": prefix if given == "P" else [prefix] * len(given)}
    with pytest.raises(MinitronError, match=message):
        draw_blocks(Calibration(**settings), 32, reader)


def test_more_tokens_than_the_model_has_positions_are_refused(reader):
    longest = reader.shape.max_position_embeddings
    with pytest.raises(MinitronError, match=f"calibration.seq_length: {longest + 1} asked, .* {longest} positions"):
        block_length(Calibration(seq_length=longest + 1), reader)
