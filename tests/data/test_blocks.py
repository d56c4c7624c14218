"""Blocks, heads and data_prefix lists against plain slicing of the tokens that were written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nemo_minitron.data.blocks import counted_blocks, document_heads, split_lists, text_blocks, token_blocks
from nemo_minitron.data.masks import mask_prefix, prove_mask, with_masks
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.data.tokenizer import TokenizerSpec
from nemo_minitron.data.tokens import data_fingerprint
from nemo_minitron.errors import MinitronError

LENGTHS = [7, 12, 3, 30, 1, 19, 8]


def write(prefix: Path, lengths=tuple(LENGTHS)) -> tuple[Path, np.ndarray]:
    """Documents of the given lengths holding 0, 1, 2, … through Megatron's own builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    stream = np.arange(sum(lengths))
    for part in np.split(stream, np.cumsum(lengths)[:-1]):
        builder.add_document(part, [len(part)])
    builder.finalize(f"{prefix}.idx")
    return prefix, stream


def add_mask(prefix: Path, mask: np.ndarray, lengths=tuple(LENGTHS)) -> None:
    """Which tokens count, beside what :func:`write` wrote."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{mask_prefix(prefix)}.bin", dtype=np.uint8)
    for part in np.split(mask, np.cumsum(lengths)[:-1]):
        builder.add_document(part, [len(part)])
    builder.finalize(f"{mask_prefix(prefix)}.idx")
    Path(f"{prefix}.json").write_text(json.dumps({"mask": {"name": mask_prefix(prefix).name}}))


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data_text_document")


def test_blocks_cut_the_stream_without_overlap_or_padding(data):
    prefix, stream = data
    blocks = token_blocks(prefix, 8, shuffle=False)
    assert blocks.dtype == torch.int64
    assert blocks.tolist() == stream[: len(stream) // 9 * 9].reshape(-1, 9).tolist()


def test_blocks_are_shuffled_by_seed_alone(data):
    prefix, stream = data
    every = token_blocks(prefix, 4)
    assert sorted(every.tolist()) == stream[: len(stream) // 5 * 5].reshape(-1, 5).tolist()
    assert every.tolist() != sorted(every.tolist())
    assert torch.equal(every, token_blocks(str(prefix), 4, seed=1234))
    assert torch.equal(token_blocks(prefix, 4, num_samples=6), every[:6])
    assert not torch.equal(token_blocks(prefix, 4, seed=1), every)


def test_too_few_blocks_names_both_numbers(data):
    with pytest.raises(MinitronError, match=r"asked for 9 blocks of 10 tokens .* available 8 \(80 tokens\)"):
        token_blocks(data[0], 9, num_samples=9)
    with pytest.raises(MinitronError, match="available 0"):
        token_blocks(data[0], 200)
    for bad in ({"seq_length": 0}, {"seq_length": 4, "num_samples": 0}):
        with pytest.raises(MinitronError, match="must be at least 1, found 0"):
            token_blocks(data[0], **bad)


def test_ids_out_of_range_name_the_document(data):
    assert len(token_blocks(data[0], 7, vocab_size=80)) == 10
    with pytest.raises(MinitronError, match=r"document 3 has token 50, out of range .* 50"):
        token_blocks(data[0], 7, shuffle=False, vocab_size=50)
    with pytest.raises(MinitronError, match="document 5 has token 53"):
        document_heads(data[0], 1, 1, vocab_size=53)


def test_document_heads(data):
    prefix, stream = data
    begins = np.cumsum([0, *LENGTHS])[:-1]
    assert document_heads(prefix, 1).tolist() == stream[begins, None].tolist()
    assert document_heads(prefix, 7, 3).tolist() == [stream[b : b + 7].tolist() for b in begins[::3]]
    with pytest.raises(MinitronError, match="document 2 has 3 tokens, fewer than the 5"):
        document_heads(prefix, 5, 2)
    with pytest.raises(MinitronError, match="at least 1"):
        document_heads(prefix, 5, 0)


def test_fingerprint_is_of_the_bytes(data, tmp_path):
    prefix, _ = data
    expected = hashlib.sha256(Path(f"{prefix}.bin").read_bytes() + Path(f"{prefix}.idx").read_bytes()).hexdigest()
    assert data_fingerprint(prefix) == expected
    other, _ = write(tmp_path / "other")
    assert data_fingerprint(other) == expected
    write(tmp_path / "other", (*LENGTHS[:-2], LENGTHS[-1], LENGTHS[-2]))  # same tokens, other documents
    assert data_fingerprint(other) != expected


def test_damaged_files(data, tmp_path):
    prefix, _ = data
    with pytest.raises(MinitronError, match=r"no file .*data\.bin; did you mean .*data_text_document\?"):
        token_blocks(tmp_path / "data", 4)
    with pytest.raises(MinitronError, match="give the prefix without its extension"):
        token_blocks(f"{prefix}.bin", 4)
    index = Path(f"{prefix}.idx").read_bytes()
    for damaged in (index[:-20], index[:12], b"something else entirely", b""):
        Path(f"{prefix}.idx").write_bytes(damaged)
        with pytest.raises(MinitronError, match=r"idx: expected a Megatron index"):
            token_blocks(prefix, 4)
    Path(f"{prefix}.idx").write_bytes(index)
    content = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(content[:-2])
    with pytest.raises(MinitronError, match="its index says 160 bytes, found 158"):
        token_blocks(prefix, 4)
    Path(f"{prefix}.bin").write_bytes(b"")
    with pytest.raises(MinitronError, match="found an empty file"):
        token_blocks(prefix, 4)


def test_text_blocks_equal_those_of_its_files(hf, jsonl, tmp_path):
    (prefix,) = preprocess(jsonl, tmp_path / "out", tokenizer_type=str(hf))
    spec = TokenizerSpec(type=str(hf))
    blocks, counted, fingerprint = text_blocks(jsonl, spec, 16, num_samples=5)
    assert torch.equal(blocks, token_blocks(prefix, 16, num_samples=5)[:, :-1]) and counted is None
    assert fingerprint == data_fingerprint(prefix)
    with pytest.raises(MinitronError, match=r"docs.jsonl: asked for 9999 blocks"):
        text_blocks(jsonl, spec, 16, num_samples=9999)


def test_text_blocks_take_what_preprocess_takes(hf, tmp_path, capsys):
    text, end = tmp_path / "a.jsonl", json.loads((hf / "tokenizer_config.json").read_text())["eos_token"]
    text.write_text('{"text": "half \\ud83d"}\n{"text": "' + f"words {end} and more " * 20 + '"}\n')
    spec = TokenizerSpec(type=str(hf), split_special_tokens=True)
    with pytest.raises(MinitronError, match=r"a.jsonl:1: expected Unicode text"):
        text_blocks(text, spec, 16)
    blocks, _, fingerprint = text_blocks(text, spec, 16, on_bad_record="skip")
    assert "1 bad records skipped" in capsys.readouterr().err
    options = {"tokenizer_type": str(hf), "split_special_tokens": True, "on_bad_record": "skip"}
    (prefix,) = preprocess(text, tmp_path / "out", **options)
    assert fingerprint == data_fingerprint(prefix) and torch.equal(blocks, token_blocks(prefix, 16)[:, :-1])
    assert fingerprint != text_blocks(text, TokenizerSpec(type=str(hf)), 16, on_bad_record="skip").fingerprint


def test_blocks_without_a_label_that_counts_are_passed_over(data):
    """Tokens are their places in the stream, so that they tell what the mask says of them."""
    prefix, stream = data
    mask = (stream % 11 == 3) | (stream % 17 == 4)
    every = token_blocks(prefix, 4, seed=6)
    counts = torch.from_numpy(mask)[every]
    some = counts[:, 1:-1].any(1)  # the last token of a block is behind the sample
    assert 3 < some.sum() < len(every) - 3 and (counts.any(1) & ~some).any()
    plain = counted_blocks(prefix, 4, num_samples=3, seed=6)
    assert torch.equal(plain.tokens, every[:3, :-1]) and plain.counted is None
    assert plain.fingerprint == data_fingerprint(prefix)
    add_mask(prefix, mask.astype(np.uint8))
    found = counted_blocks(prefix, 4, num_samples=3, seed=6)
    assert torch.equal(found.tokens, every[some][:3, :-1]) and not torch.equal(found.tokens, plain.tokens)
    assert torch.equal(found.counted, counts[some][:3, 1:]) and found.counted.dtype == torch.bool
    assert found.fingerprint == with_masks({"": data_fingerprint(prefix)}, {"": prove_mask(prefix)})[""]
    assert found.fingerprint != plain.fingerprint
    whole = counted_blocks(prefix, 4, seed=6)
    assert torch.equal(whole.tokens, every[some][:, :-1])
    message = rf"asked for {some.sum() + 1} blocks of 5 tokens .* a label counts, available {some.sum()} \(of 16"
    with pytest.raises(MinitronError, match=message):
        counted_blocks(prefix, 4, num_samples=int(some.sum()) + 1)
    with pytest.raises(MinitronError, match=r"token \d+, out of range for the model.s vocabulary of 50"):
        counted_blocks(prefix, 4, vocab_size=50)


def test_a_mask_of_all_tokens_is_none(data):
    prefix, stream = data
    plain = counted_blocks(prefix, 4, num_samples=9)
    add_mask(prefix, np.ones(len(stream), np.uint8))
    found = counted_blocks(prefix, 4, num_samples=9)
    assert torch.equal(found.tokens, plain.tokens) and found.counted is None


def test_split_lists_accepts_each_form(data, tmp_path):
    p, q = str(data[0]), str(write(tmp_path / "b_text_document")[0])
    assert split_lists([p]) == [p]
    assert split_lists([p, q]) == [p, q]
    assert split_lists([1, p]) == [1.0, p]
    assert split_lists(["0.7", p, 0.3, q]) == [0.7, p, 0.3, q]
    cfg = OmegaConf.create({"train": [0.7, p, 0.3, q], "validation": [q], "test": None})
    assert split_lists(cfg) == {"train": [0.7, p, 0.3, q], "validation": [q]}
    assert type(split_lists(OmegaConf.create([p]))) is list


def test_split_lists_agrees_with_megatron(data, tmp_path):
    from megatron.core.datasets.utils import get_blend_from_list

    p, q = str(data[0]), str(write(tmp_path / "b_text_document")[0])
    assert get_blend_from_list(split_lists(["0.7", p, 0.3, q])) == ([p, q], [0.7, 0.3])
    assert get_blend_from_list(split_lists([p, q])) == ([p, q], None)
    assert get_blend_from_list(split_lists([p])) == ([p], None)


def test_split_lists_refuses(data):
    p = str(data[0])
    cases = [
        (p, rf"must be a list: write \[{p}\]"),
        (None, "must be"),
        ([], "at least one prefix"),
        ([0.5, p, 0.5], "must alternate weights and prefixes"),
        ([p, 0.5], "must alternate weights and prefixes"),
        ([-1, p], "weights must be finite"),
        ([float("nan"), p], "weights must be finite"),
        ([0, p, 1, p], "above 0"),
        ([f"{p}x"], r"no file .*documentx\.bin"),
        ({"train": [p], "valid": [p]}, "unknown split 'valid'.*Did you mean 'validation'"),
        ({"train": [p]}, "split 'validation' is missing"),
        ({"train": [p], "validation": p}, r"data_prefix\.validation must be a list"),
    ]
    for value, said in cases:
        with pytest.raises(MinitronError, match=said):
            split_lists(value)
    Path(f"{p}.idx").unlink()
    with pytest.raises(MinitronError, match=r"model\.data\.data_prefix: no file .*\.idx"):
        split_lists([p])
