"""Tokenizers out of GGUFs: the ids of the tokenizers that went in, written as their models' own files have them."""

import itertools
import json

import pytest
import regex
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemo_minitron.checkpoint.gguf import GgufFile
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.synthetic import make_llama
from tests.checkpoint.test_gguf import BIASES, write_gguf
from tests.llamas import GQA

BEGIN, END, CONTROL, USER = "<|begin|>", "<|end|>", "<|tool_1|>", "<call>"
TEXT = (
    "It's 12345 in 2024, they'LL SAY: we've 3.14159!\n\n\tdef f(x):\r\n        return x  +1\n   \n caf\u00e9 cafe\u0301"
    " \u6771\u4eac\u30bf\u30ef\u30fc2024\u5e74 \U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467 \u00c3\u00bc zebra"
    f"{CONTROL}a{USER} b{END}c  $x^2 <= 1~2|3`4` [PAD517]  "
)
ROWS = 528


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def level(use_regex=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


LLAMA3 = (  # as tokenizer.json of Llama 3 and of Qwen 2 have them
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
CUTTING = {
    "llama-bpe": lambda: pre_tokenizers.Sequence([split(LLAMA3), level()]),
    "qwen2": lambda: pre_tokenizers.Sequence([split(QWEN2), level()]),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level(True)]),
    "gpt-2": lambda: level(True),
}


@pytest.fixture(scope="module")
def merged():
    """A vocabulary with merges across every border at which one of the ways cuts, and a token that no merge makes."""
    trainer = trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = level()
    pieces = [TEXT[i : i + n] for n in (3, 5, 8) for i in range(len(TEXT) - n)]
    tokenizer.train_from_iterator(pieces, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    assert len(model["vocab"]) == 512 and "Ġzebra" not in model["vocab"]
    return model["vocab"] | {"Ġzebra": 512}, [tuple(pair) for pair in model["merges"]]


def original(merged, name):
    """The tokenizer as its model's own ``tokenizer.json`` makes it."""
    vocab, merges = merged
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = CUTTING.get(name, level)(), decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken(one, normalized=False, special=True) for one in (BEGIN, END, CONTROL)])
    tokenizer.add_tokens([AddedToken(USER, normalized=False)])
    if name == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B:1", special_tokens=[(BEGIN, 513)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, clean_up_tokenization_spaces=False
    )


def packed(folder, merged, keys=(), **kwargs):
    """A GGUF by the gguf package's own writer; rows without a token are padding."""
    vocab, merges = merged
    tokens = [*sorted(vocab, key=vocab.get), BEGIN, END, CONTROL, USER]
    kinds = [1] * len(vocab) + [3, 3, 3, 4] + [5] * (ROWS - len(tokens))
    tokens += [f"[PAD{n}]" for n in range(len(tokens), ROWS)]
    said = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 513,
        "tokenizer.ggml.eos_token_id": 514,
    } | dict(keys)
    said = {key: value for key, value in said.items() if value is not None}
    shape = GQA.replace(vocab_size=ROWS, padded_vocab_size=ROWS)
    return write_gguf(folder / "m.gguf", shape=shape, keys=said, **kwargs)


def read_back(path, folder):
    GgufFile(path).save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("writer", ["ours", "gguf's"])
@pytest.mark.parametrize("name", CUTTING)
def test_ids_are_those_of_the_tokenizer_that_went_in(name, writer, merged, tmp_path):
    theirs = original(merged, name)
    if writer == "ours":
        folder = make_llama(tmp_path / "hf", GQA.replace(vocab_size=ROWS, padded_vocab_size=ROWS))
        theirs.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": 513, "eos_token_id": 514}
        (folder / "config.json").write_text(json.dumps(config))
        path = convert(folder, tmp_path / "m.gguf")
    else:  # under either architecture: transformers' own conversion hangs on it
        arch = {"architecture": "qwen2", "biases": BIASES} if name in ("qwen2", "gpt-2") else {}
        path = packed(tmp_path, merged, {"tokenizer.ggml.pre": name}, **arch)
    (tmp_path / "back").mkdir()
    found = read_back(path, tmp_path / "back")
    assert found(TEXT).input_ids == theirs(TEXT).input_ids
    assert found(TEXT).keys() == {"input_ids", "attention_mask"}, "what a model takes"
    assert found("a", TEXT).input_ids == theirs("a", TEXT).input_ids
    assert found.decode(found.encode(TEXT)) == theirs.decode(theirs.encode(TEXT))
    assert len(found) == len(theirs) == 517
    assert {n: (t.content, t.special) for n, t in found.added_tokens_decoder.items()} == {
        n: (t.content, t.special) for n, t in theirs.added_tokens_decoder.items()
    }
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (513, 514, None)


def test_every_way_to_cut_gives_other_ids(merged):
    """Otherwise what is compared above would not tell them apart."""
    ids = [tuple(original(merged, name)(TEXT, add_special_tokens=False).input_ids) for name in CUTTING]
    assert all(first != second for first, second in itertools.combinations(ids, 2))


def test_without_a_name_the_text_is_cut_as_by_llama_cpps_default(merged, tmp_path, capsys):
    """Its four expressions, each applied to what the one before left, by the regex package."""
    found = read_back(packed(tmp_path, merged), tmp_path)
    assert "tokenizer.ggml.pre is absent; texts are cut as llama.cpp cuts them then" in capsys.readouterr().err
    text, whole = TEXT.replace(USER, "").replace(CONTROL, "").replace(END, ""), original(merged, None)
    pieces = [text]
    for pattern in (
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ):
        pieces = [part for piece in pieces for part in regex.split(f"({pattern})", piece) if part]
    assert "123" in pieces and "45" in pieces
    expected = [number for piece in pieces for number in whole(piece, add_special_tokens=False).input_ids]
    assert found(text, add_special_tokens=False).input_ids == expected
    assert expected != original(merged, "gpt-2")(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("name", "flags", "around"),
    [
        ("llama-v3", {}, (True, False)),
        ("llama-bpe", {"add_bos_token": False}, (False, False)),
        ("deepseek-r1-qwen", {}, (False, False)),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
    ],
)
def test_what_is_put_around_a_text(name, flags, around, merged, tmp_path):
    keys = {f"tokenizer.ggml.{key}": value for key, value in flags.items()} | {"tokenizer.ggml.pre": name}
    ids = read_back(packed(tmp_path, merged, keys), tmp_path)("a").input_ids
    assert (ids[0] == 513, ids[-1] == 514) == around and len(ids) == 1 + sum(around)


REFUSED = {
    "pre": (
        {"tokenizer.ggml.pre": "tekken"},
        r"ggml\.pre must be one of llama-bpe, .* found 'tekken'; tokenizer\.type",
    ),
    "model": ({"tokenizer.ggml.model": "bert"}, r"ggml\.model must be gpt2 or llama .* found 'bert'; tokenizer\.type"),
    "no model": ({"tokenizer.ggml.model": None}, r"ggml\.model must be gpt2 or llama .* found none"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, r"ggml\.tokens must be a list of str, found none"),
    "tokens": ({"tokenizer.ggml.tokens": [1, 2]}, r"ggml\.tokens must be a list of str, found \[1, 2\]"),
    "no merges": ({"tokenizer.ggml.merges": None}, r"ggml\.merges must be a list of str, found none"),
    "a merge": ({"tokenizer.ggml.merges": ["ab"]}, r"ggml\.merges must be pairs of tokens, found 'ab'"),
    "merge of nothing": ({"tokenizer.ggml.merges": ["a nothing"]}, "expected a tokenizer that transformers reads"),
    "kinds": ({"tokenizer.ggml.token_type": [1, 2]}, r"ggml\.token_type must have 528 entries, .* found 2"),
    "kinds of text": ({"tokenizer.ggml.token_type": ["a"]}, r"ggml\.token_type must be a list of int"),
    "no begin": (
        {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": None},
        r"ggml\.bos_token_id must be there where every text gets it, found none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_and_a_folder_helps(case, merged, tmp_path):
    keys, message = REFUSED[case]
    path = packed(tmp_path, merged, {"tokenizer.ggml.pre": "gpt-2"} | keys)
    for form in ("nemo", "hf", "gguf"):
        with pytest.raises(MinitronError, match=message) as caught:
            convert(path, tmp_path / "out" / "m", format=form)
        assert "\n" not in str(caught.value)
    assert [one.name for one in tmp_path.rglob("*") if one.is_file()] == ["m.gguf"]


@pytest.mark.parametrize("target", ["out.nemo", "out", "out.gguf"])
def test_a_tokenizer_that_is_asked_for_goes_before_the_files_own(target, merged, tmp_path):
    theirs = original(merged, "llama-bpe")
    theirs.save_pretrained(tmp_path / "given")
    path = packed(tmp_path, merged, {"tokenizer.ggml.pre": "tekken"})
    form = "hf" if target == "out" else None
    out = convert(path, tmp_path / target, format=form, tokenizer={"type": str(tmp_path / "given")})
    if target == "out.nemo":
        out = convert(out, tmp_path / "hf")
    if target == "out.gguf":
        GgufFile(out).save_tokenizer(tmp_path)
        out = tmp_path
    assert AutoTokenizer.from_pretrained(out)(TEXT).input_ids == theirs(TEXT).input_ids


def test_a_control_token_whose_text_stands_twice(merged, tmp_path):
    vocab, merges = merged
    swapped = {CONTROL if token == "Ġzebra" else token: number for token, number in vocab.items()}
    kinds = [1] * 512 + [3] + [3, 3, 3, 4] + [5] * (ROWS - 517)
    path = packed(tmp_path, (swapped, merges), {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.token_type": kinds})
    with pytest.raises(MinitronError, match=r"must have '<\|tool_1\|>', which is not text, once; found 512 and 515"):
        convert(path, tmp_path / "m.nemo")


def test_a_special_id_beyond_the_tokens_is_left_out_and_said(merged, tmp_path, capsys):
    keys = {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.padding_token_id": 2**32 - 1}
    found = read_back(packed(tmp_path, merged, keys), tmp_path)
    assert found.pad_token_id is None
    assert "padding_token_id must be below 528, found 4294967295; the tokenizer has none" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepieces_kind_has_the_ids_of_sentencepiece(prefix, tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["It is 2024, and they say: a call is  a call."] * 9), vocab_size=300, model_type="bpe",
        model_prefix=str(tmp_path / "sp"), byte_fallback=True, hard_vocab_limit=False, add_dummy_prefix=prefix,
        remove_extra_whitespaces=False, normalization_rule_name="identity", user_defined_symbols=[USER],
        minloglevel=2,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    ids = range(theirs.GetPieceSize())
    kinds = [
        4 if theirs.IdToPiece(n) == USER else 3 if theirs.IsControl(n) else 6 if theirs.IsByte(n) else 1 for n in ids
    ]
    said = {
        "model": "llama",
        "tokens": [theirs.IdToPiece(n) for n in ids],
        "scores": [theirs.GetScore(n) for n in ids],
        "token_type": [2, *kinds[1:]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": False,
        "add_space_prefix": prefix,
    }
    shape = GQA.replace(vocab_size=len(ids), padded_vocab_size=len(ids))
    path = write_gguf(tmp_path / "m.gguf", shape=shape, keys={f"tokenizer.ggml.{key}": said[key] for key in said})
    found = read_back(path, tmp_path)
    for text in ("they say: 2024", " two  spaces\n\tand \u6771\u4eac", f"a call{USER}"):
        assert found(text).input_ids == theirs.encode(text)
        assert found(text).keys() == {"input_ids", "attention_mask"}
    qwen2 = write_gguf(
        tmp_path / "q.gguf",
        shape=shape,
        architecture="qwen2",
        biases=BIASES,
        keys={f"tokenizer.ggml.{key}": said[key] for key in said},
    )
    with pytest.raises(MinitronError, match=r"ggml\.model must be gpt2 under architecture qwen2, found 'llama'"):
        convert(qwen2, tmp_path / "m.nemo")
