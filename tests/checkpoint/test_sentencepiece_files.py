"""What NeMo packs of a tokenizer, one sentencepiece file, as files from which transformers loads the same."""

import io
import json
import struct

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer

from nemo_minitron.checkpoint.sentencepiece_files import PROBES, with_hf_files
from nemo_minitron.checkpoint.sentencepiece_model import CONTROL, USER_DEFINED, parse
from nemo_minitron.errors import MinitronError

LINES = [f"Line {i} of {i * i} says: the {w} cafés, 東京, x = {i};" for i, w in enumerate(["red", "old"] * 60)]
KINDS = {  # as Llama 2, T5 and NeMo's own recipe have them
    "bpe": {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    | {"user_defined_symbols": ["<|im_start|>"], "split_digits": True, "allow_whitespace_only_pieces": True},
    "unigram": {"normalization_rule_name": "nmt_nfkc", "pad_id": 3},
    "bpe, folded": {"normalization_rule_name": "nmt_nfkc_cf", "bos_id": -1, "add_dummy_prefix": False},
}


def train(folder, kind, **options):
    folder.mkdir()
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=written, model_type=kind.split(",")[0], vocab_size=400,
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_sentencepiece(kind, tmp_path):
    folder = train(tmp_path / "a", kind, **KINDS[kind])
    theirs = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    made = with_hf_files(folder)
    ours = AutoTokenizer.from_pretrained(made)
    for text in (*PROBES, *LINES, "Tokens <of> no\nline, 0123456789 ½ 大阪 " * 3):
        ids = ours(text).input_ids
        assert ids == theirs.encode(text)
        assert ours(text).keys() == {"input_ids", "attention_mask"}, "what a model takes"
        if theirs.unk_id() not in ids:
            assert ours.decode(ids) == theirs.decode(ids)
    assert len(ours) == theirs.get_piece_size() and (made / "tokenizer.model").is_file()
    for name in ("bos", "eos", "pad", "unk"):
        number = getattr(theirs, f"{name}_id")()
        assert getattr(ours, f"{name}_token_id") == (None if number < 0 else number)


def test_the_file_is_read_as_sentencepiece_reads_it(tmp_path):
    folder = train(tmp_path / "a", "bpe", **KINDS["bpe"])
    data = (folder / "tokenizer.model").read_bytes()
    theirs, model = SentencePieceProcessor(model_proto=data), parse(data)
    for number, piece in enumerate(model.pieces):
        assert (piece.text, piece.score) == (theirs.id_to_piece(number), theirs.get_score(number))
        assert (piece.kind == CONTROL) == theirs.is_control(number)
        assert (piece.kind == USER_DEFINED) == (piece.text == "<|im_start|>")
    assert model.byte_fallback and model.dummy_prefix and not model.squeeze and model.ids["pad"] == -1


def test_a_model_of_words_is_refused(tmp_path):
    folder = train(tmp_path / "a", "word")
    with pytest.raises(MinitronError, match="expected pieces of words, found whole words"):
        with_hf_files(folder)


def test_rules_that_are_not_kept_are_found_out(tmp_path):
    """Sentencepiece divides a piece that is marked as unused again, which transformers does not know of."""
    folder = train(tmp_path / "a", "bpe", **KINDS["bpe"])
    data = (folder / "tokenizer.model").read_bytes()
    theirs = SentencePieceProcessor(model_proto=data)
    found = theirs.encode(PROBES[0])
    number = next(number for number in found if len(theirs.id_to_piece(number)) > 1 and not theirs.is_byte(number))
    text = theirs.id_to_piece(number).encode()
    body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", theirs.get_score(number))
    entry = b"\x0a" + bytes([len(body)]) + body
    assert data.count(entry) == 1
    data = data.replace(entry, b"\x0a" + bytes([len(body) + 2]) + body + b"\x18\x05")
    (folder / "tokenizer.model").write_bytes(data)
    with pytest.raises(MinitronError, match="transformers would give other ids than sentencepiece to 'The quick"):
        with_hf_files(folder)


@pytest.mark.parametrize("data", [b"", b"\x0a", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x0b", b"\x08\x01"])
def test_what_is_no_model_is_one_message(data, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(MinitronError, match="expected a sentencepiece model"):
        with_hf_files(tmp_path)


def test_config_says_what_is_added_to_a_text(tmp_path):
    made = with_hf_files(train(tmp_path / "a", "unigram", **KINDS["unigram"]))
    config = json.loads((made / "tokenizer_config.json").read_text())
    assert (config["add_bos_token"], config["add_eos_token"], config["pad_token"]) == (False, False, "<pad>")
