"""Token files against direct tokenizing, other readers, other worker counts; and destinations left alone on errors."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from nemo_minitron.config.schema import PreprocessConfig
from nemo_minitron.config.sections import Dataset, Tokenizer
from nemo_minitron.data import encode as module
from nemo_minitron.data.preprocess import preprocess, read_facts
from nemo_minitron.data.sources import Source
from nemo_minitron.data.tokenizer import TokenizerSpec, vocabulary_fingerprint
from nemo_minitron.errors import MinitronError
from tests.data.conftest import DOCUMENTS

SUFFIXES = (".bin", ".idx", ".json")


def bytes_of(prefix: Path, suffixes=SUFFIXES) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in suffixes]


@pytest.fixture
def reference(hf):
    """Ids of every sample document, by transformers alone, with EOS after each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    return [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in DOCUMENTS]


def test_megatron_reads_what_transformers_tokenizes(hf, jsonl, tmp_path, reference):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    (prefix,) = preprocess(jsonl, tmp_path / "new" / "out", tokenizer_type=str(hf))
    assert prefix == tmp_path / "new" / "out_text_document"
    dataset = IndexedDataset(str(prefix))
    assert dataset.index.dtype == np.uint16
    assert [list(dataset[i]) for i in range(len(dataset))] == reference
    assert list(dataset.document_indices) == list(range(len(reference) + 1))
    assert sorted(p.name for p in prefix.parent.iterdir()) == sorted(prefix.name + s for s in SUFFIXES)


def test_nemo_reads_it(hf, jsonl, tmp_path, reference):
    from nemo.collections.nlp.data.language_modeling.megatron.indexed_dataset import MMapIndexedDataset

    (prefix,) = preprocess(jsonl, tmp_path / "out", tokenizer_type=str(hf))
    dataset = MMapIndexedDataset(str(prefix))
    assert [list(dataset[i]) for i in range(len(dataset))] == reference


def test_workers_do_not_change_a_byte(hf, jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 3)  # many batches, so that order matters
    keys = ("title", "text")
    one = preprocess(jsonl, tmp_path / "one", tokenizer_type=str(hf), json_keys=keys)
    three = preprocess(jsonl, tmp_path / "three", tokenizer_type=str(hf), json_keys=keys, workers=3)
    assert [p.name for p in three] == ["three_title_document", "three_text_document"]
    for a, b in zip(one, three, strict=True):
        assert bytes_of(a) == bytes_of(b)


def test_no_eod_and_facts(hf, jsonl, tmp_path, reference):
    from transformers import AutoTokenizer

    (prefix,) = preprocess(
        Source(str(jsonl), heldout_every=4, heldout_part="heldout"), tmp_path / "out", tokenizer_type=str(hf),
        append_eod=False,
    )  # fmt: skip
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    assert tokens.tolist() == [i for ids in reference[::4] for i in ids[:-1]]
    tokenizer = AutoTokenizer.from_pretrained(hf)
    assert read_facts(prefix) == {
        "format": 1,
        "tokenizer": {
            "library": "huggingface",
            "fingerprint": vocabulary_fingerprint(tokenizer.get_vocab()),
            "vocab_size": 400,
            "eod": tokenizer.eos_token_id,
        },
        "append_eod": False,
        "dtype": "uint16",
        "documents": len(reference[::4]),
        "tokens": len(tokens),
        "key": "text",
        "source": {
            "input": str(jsonl), "split": "train", "document": "article", "heldout_every": 4, "heldout_part": "heldout",
        },
    }  # fmt: skip


def test_large_vocabularies_take_int32(hf, jsonl, tmp_path):
    """One token with an id beyond uint16 is enough, whatever the number of entries."""
    big = tmp_path / "big"
    shutil.copytree(hf, big)
    content = json.loads((big / "tokenizer.json").read_text())
    content["model"]["vocab"]["far away"] = 70000
    (big / "tokenizer.json").write_text(json.dumps(content))
    (prefix,) = preprocess(jsonl, tmp_path / "out", tokenizer_type=str(big))
    assert read_facts(prefix)["dtype"] == "int32" and read_facts(prefix)["tokenizer"]["vocab_size"] == 70001
    (small,) = preprocess(jsonl, tmp_path / "small", tokenizer_type=str(hf))
    assert np.array_equal(np.fromfile(f"{prefix}.bin", np.int32), np.fromfile(f"{small}.bin", np.uint16))


def test_ftfy(hf, tmp_path):
    (tmp_path / "a.txt").write_text("caf\u00c3\u00a9")
    (tmp_path / "b.txt").write_text("caf\u00e9")
    broken, repaired, clean = (
        preprocess(tmp_path / name, tmp_path / f"o{i}", tokenizer_type=str(hf), apply_ftfy=fix)[0]
        for i, (name, fix) in enumerate((("a.txt", False), ("a.txt", True), ("b.txt", False)))
    )
    assert bytes_of(repaired, (".bin",)) == bytes_of(clean, (".bin",)) != bytes_of(broken, (".bin",))


def test_sentencepiece(jsonl, tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS), model_prefix=str(tmp_path / "sp"), vocab_size=120, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    (prefix,) = preprocess(
        jsonl, tmp_path / "out", tokenizer_library="sentencepiece", tokenizer_model=str(tmp_path / "sp.model")
    )
    expected = [i for text in DOCUMENTS for i in (*processor.encode(text), processor.eos_id())]
    assert np.fromfile(f"{prefix}.bin", np.uint16).tolist() == expected
    facts = read_facts(prefix)["tokenizer"]
    assert facts["vocab_size"] == processor.get_piece_size() and facts["library"] == "sentencepiece"


def test_tokenizer_packed_in_a_nemo(hf, jsonl, tmp_path):
    from nemo_minitron.convert import convert

    convert(hf, tmp_path / "model.nemo")
    packed = preprocess(jsonl, tmp_path / "packed", tokenizer_type=str(tmp_path / "model.nemo"), workers=2)[0]
    folder = preprocess(jsonl, tmp_path / "folder", tokenizer_type=str(hf))[0]
    assert bytes_of(packed) == bytes_of(folder)


def test_no_bos_even_if_the_tokenizer_adds_one(hf, tmp_path):
    adds = tmp_path / "adds"
    shutil.copytree(hf, adds)
    content = json.loads((adds / "tokenizer.json").read_text())
    bos = content["added_tokens"][0]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos["content"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos["content"]: {"id": bos["content"], "ids": [bos["id"]], "tokens": [bos["content"]]}},
    }
    (adds / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "a.txt").write_text("The fox")
    with_bos = preprocess(tmp_path / "a.txt", tmp_path / "o1", tokenizer_type=str(adds))[0]
    without = preprocess(tmp_path / "a.txt", tmp_path / "o2", tokenizer_type=str(hf))[0]
    assert bytes_of(with_bos, (".bin",)) == bytes_of(without, (".bin",))


# --- what goes wrong: the message, and that the earlier output survives with nothing beside it ---


@pytest.fixture
def earlier(hf, tmp_path):
    """An earlier output; afterwards it must be unchanged and alone."""
    (tmp_path / "good.txt").write_text("Some good text.")
    prefix = preprocess(tmp_path / "good.txt", tmp_path / "out" / "data", tokenizer_type=str(hf))[0]
    before = bytes_of(prefix)
    yield tmp_path / "out" / "data"
    assert bytes_of(prefix) == before
    assert len(list(prefix.parent.iterdir())) == 3


def refused(*args, **kwargs) -> str:
    with pytest.raises(MinitronError) as error:
        preprocess(*args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_in_the_middle(hf, earlier, tmp_path, workers):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' * 700 + '{"text": "torn\n')
    assert "bad.jsonl:701" in refused(tmp_path / "bad.jsonl", earlier, tokenizer_type=str(hf), workers=workers)


def die(_batch):
    os._exit(9)


def test_a_worker_that_dies_is_an_error_not_a_hang(hf, earlier, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_encode_in_worker", die)
    assert "workers=2: a tokenizing process ended" in refused(
        tmp_path / "good.txt", earlier, tokenizer_type=str(hf), workers=2
    )


def test_bad_inputs(hf, earlier, tmp_path):
    good = tmp_path / "good.txt"
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "a", "title": ""}\n')
    tokenizer = {"tokenizer_type": str(hf)}
    assert "found none" in refused(tmp_path / "empty.jsonl", earlier, **tokenizer)
    assert "under key 'title'" in refused(tmp_path / "half.jsonl", earlier, json_keys=("text", "title"), **tokenizer)
    assert "no file or folder" in refused(tmp_path / "absent.txt", earlier, **tokenizer)
    assert "workers must be a positive integer, found 0" in refused(good, earlier, workers=0, **tokenizer)
    assert "none twice" in refused(good, earlier, json_keys=("text", "text"), **tokenizer)
    assert "file name" in refused(good, earlier, json_keys=("a/b",), **tokenizer)
    assert "output_prefix must end in a name" in refused(good, f"{tmp_path}/out/", **tokenizer)


def test_bad_tokenizers(hf, earlier, tmp_path, monkeypatch):
    good = tmp_path / "good.txt"
    assert "tokenizer.type must name" in refused(good, earlier)
    message = refused(good, earlier, tokenizer_library="hugingface", tokenizer_type=str(hf))
    assert "Did you mean 'huggingface'?" in message
    assert "tokenizer.model does not apply" in refused(
        good, earlier, tokenizer_type=str(hf), tokenizer_model="tokenizer.model"
    )
    assert "expected a folder" in refused(good, earlier, tokenizer_type=str(tmp_path / "absent"))
    assert "no .nemo at" in refused(good, earlier, tokenizer_type=str(tmp_path / "absent.nemo"))
    (tmp_path / "bare").mkdir()
    assert "holds no tokenizer" in refused(good, earlier, tokenizer_type=str(tmp_path / "bare"))
    (tmp_path / "bare" / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    assert "tokenizer.json is not valid JSON" in refused(good, earlier, tokenizer_type=str(tmp_path / "bare"))
    assert "no sentencepiece file" in refused(
        good, earlier, tokenizer_library="sentencepiece", tokenizer_model=str(tmp_path / "absent.model")
    )
    assert "expected a sentencepiece model" in refused(
        good, earlier, tokenizer_library="sentencepiece", tokenizer_model=str(good)
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refused(good, earlier, tokenizer_type="no-such-owner/no-such-model")
    assert "'no-such-owner/no-such-model' is no path here" in message and "HF_HUB_OFFLINE is set" in message


def test_a_tokenizer_without_eos_needs_append_eod_false(hf, earlier, tmp_path):
    bare = tmp_path / "no_eos"
    shutil.copytree(hf, bare)
    (bare / "special_tokens_map.json").unlink()
    config = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    assert "append_eod" in refused(tmp_path / "good.txt", earlier, tokenizer_type=str(bare))
    preprocess(tmp_path / "good.txt", tmp_path / "elsewhere", tokenizer_type=str(bare), append_eod=False)


def test_unwritable_output(hf, tmp_path):
    (tmp_path / "good.txt").write_text("Some good text.")
    (tmp_path / "file").write_text("in the way")
    message = refused(tmp_path / "good.txt", tmp_path / "file" / "data", tokenizer_type=str(hf))
    assert str(tmp_path / "file") in message
    (tmp_path / "data_text_document.idx").mkdir()
    assert "data_text_document.idx" in refused(tmp_path / "good.txt", tmp_path / "data", tokenizer_type=str(hf))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data_text_document.idx", "file", "good.txt"]


def test_folders_made_for_a_failed_output_are_removed(hf, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine", "b": "x"}\n{"text"\n')
    refused(tmp_path / "bad.jsonl", tmp_path / "a" / "b" / "c", tokenizer_type=str(hf), json_keys=("text", "b"))
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_facts_that_do_not_belong(hf, tmp_path):
    (tmp_path / "good.txt").write_text("Some good text.")
    (prefix,) = preprocess(tmp_path / "good.txt", tmp_path / "data", tokenizer_type=str(hf))
    with open(f"{prefix}.bin", "ab") as file:
        file.write(b"xx")
    with pytest.raises(MinitronError, match="not its record"):
        read_facts(prefix)
    Path(f"{prefix}.json").write_text("[]")
    with pytest.raises(MinitronError, match="expected a JSON object"):
        read_facts(prefix)
    Path(f"{prefix}.json").unlink()
    with pytest.raises(MinitronError, match="not found"):
        read_facts(prefix)


def test_fingerprint_is_the_vocabulary_not_its_place(hf, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(hf, copy)
    first, second = TokenizerSpec(type=str(hf)).load(), TokenizerSpec(type=str(copy)).load()
    assert first.fingerprint == second.fingerprint
    content = json.loads((copy / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    a, b = [token for token in vocab if len(token) == 1][:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert TokenizerSpec(type=str(copy)).load().fingerprint != first.fingerprint


def test_stage(hf, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nemo_minitron.jobs.progress.START_SECONDS", 0.0)
    from nemo_minitron.stages.preprocess import run

    cfg = {
        "input": "pydoc_topics",
        "dataset": Dataset(split="validation"),
        "tokenizer": Tokenizer(type=str(hf)),
        "output_prefix": str(tmp_path / "pydoc"),
    }
    (prefix,) = run(PreprocessConfig(**cfg))
    facts = read_facts(prefix)
    out = capsys.readouterr()
    assert out.out.count("\n") == 1
    assert f"{facts['documents']} documents, {facts['tokens']} tokens" in out.out and str(prefix) in out.out
    assert "100%" in out.err
    with pytest.raises(MinitronError, match="output_prefix is required"):
        run(PreprocessConfig(**cfg | {"output_prefix": "???"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"tokens": 3, "dtype": "uint16"}', "expected the record of `minitron preprocess`: KeyError"),
        ('{"tokens": 3, "dtype": "uint16", "tokenizer": 7}', "TypeError"),
        ('{"tokens": 3, "dtype": "uint16", "tokenizer": {"fingerprint": 7, "vocab_size": 8}}', "fingerprint is no str"),
        ('{"tokens": 3, "dtype": "magic", "tokenizer": {}}', "TypeError"),
        ('{"tokens": 4, "dtype": "uint16", "tokenizer": {"fingerprint": "f", "vocab_size": 8}}', "records 8 bytes"),
        ('{"tokens": 3, "tokens": 3}', "'tokens' given twice"),
        ('{"tokens": ' + "[" * 99_999, "expected JSON"),
        ('{"tokens": "' + "x" * (1 << 20) + '"}', "expected at most 1048576 bytes"),
        ("[]", "expected a JSON object"),
    ],
)
def test_hostile_facts_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "d.bin").write_bytes(bytes(6))
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(MinitronError, match=message) as caught:
        read_facts(tmp_path / "d")
    assert "d.json" in str(caught.value) and len(str(caught.value)) < 500
