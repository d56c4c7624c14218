"""``on_bad_record``: every bad record alike, whichever part of preprocess finds it, with any number of workers."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from nemo_minitron.cli import main
from nemo_minitron.data import encode as module
from nemo_minitron.data.preprocess import preprocess, read_facts
from nemo_minitron.data.sources import Source
from nemo_minitron.data.tokenizer import TextTokenizer
from nemo_minitron.errors import MinitronError
from tests.data.conftest import DOCUMENTS

GOOD = [json.dumps({"text": text}) for text in DOCUMENTS]
HALF = '{"text": "half an emoji \\ud83d here"}'
BAD = {  # found by: the tokenizer's process, the JSON parser, the reader of lines, the key
    HALF: "expected Unicode text, found half of a surrogate pair (\\ud83d) at character 14",
    '{"text": "torn': "expected one JSON object per line, found Unterminated string starting at",
    '{"text": "caf\udce9"}': "expected UTF-8 text, found byte 0xe9",
    '{"title": "other"}': "json_keys asks for 'text', found ['title'].",
}


def write(path: Path, lines: list[str]) -> Path:
    path.write_bytes(("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))
    return path


@pytest.fixture(params=[1, 2])
def workers(request, monkeypatch) -> int:
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 3)  # so that the reader is far ahead of the tokenizer
    return request.param


def test_the_first_bad_record_stops_whoever_finds_it(hf, tmp_path, workers):
    kinds = list(BAD)
    for first in (0,) if workers == 2 else range(len(kinds)):  # the tokenizer's own is the one that is known last
        lines = [*GOOD[:7], kinds[first], *GOOD[7:9], *kinds[first + 1 :], *kinds[:first], *GOOD]
        path = write(tmp_path / f"{first}.jsonl", lines)
        with pytest.raises(MinitronError) as error:
            preprocess(path, tmp_path / "out", tokenizer_type=str(hf), workers=workers)
        assert str(error.value) == f"{path}:8: {BAD[kinds[first]]}; on_bad_record=skip leaves such records out"
    assert not list(tmp_path.glob("out*"))


def test_skipping_leaves_out_the_bad_ones_alone(hf, tmp_path, workers):
    path = write(tmp_path / "a.jsonl", [line for pair in zip(GOOD, [*BAD] * 20, strict=False) for line in pair])
    clean = preprocess(write(tmp_path / "b.jsonl", GOOD), tmp_path / "clean", tokenizer_type=str(hf))[0]
    found = preprocess(path, tmp_path / "out", tokenizer_type=str(hf), workers=workers, on_bad_record="skip")[0]
    for suffix in (".bin", ".idx"):
        assert Path(f"{found}{suffix}").read_bytes() == Path(f"{clean}{suffix}").read_bytes()
    assert read_facts(found)["skipped"] == {"records": len(GOOD), "first": f"{path}:2: {BAD[HALF]}"}
    assert "skipped" not in read_facts(clean)


def test_damage_is_told_after_the_bad_record_before_it(hf, tmp_path, workers):
    packed = gzip.compress(("\n".join([*GOOD[:4], HALF, *GOOD * 40]) + "\n").encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-20])
    for mode, said in (("stop", "a.jsonl.gz:5: expected Unicode"), ("skip", "a.jsonl.gz: cannot be read")):
        with pytest.raises(MinitronError, match=said):
            preprocess(tmp_path / "a.jsonl.gz", tmp_path / "out", tokenizer_type=str(hf), workers=workers,
                       on_bad_record=mode)  # fmt: skip


def test_what_a_tokenizer_cannot_take_is_a_bad_record(hf, tmp_path, monkeypatch):
    """One text in a batch makes tokenizers refuse all of it: its own message, of that record alone."""
    real = TextTokenizer.encode

    def encode(self, texts):
        if any("kůň" in text for text in texts):
            raise MinitronError("the tokenizer gave up")
        return real(self, texts)

    monkeypatch.setattr(TextTokenizer, "encode", encode)
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(MinitronError, match=r"a.jsonl:2: cannot be tokenized: the tokenizer gave up"):
        preprocess(path, tmp_path / "out", tokenizer_type=str(hf))
    prefix = preprocess(path, tmp_path / "out", tokenizer_type=str(hf), on_bad_record="skip")[0]
    facts = read_facts(prefix)
    assert facts["skipped"]["records"] == 1 and facts["documents"] == len(GOOD) - 1


def test_ftfy_still_mends_halves_of_pairs(hf, tmp_path):
    path = write(tmp_path / "a.jsonl", [HALF])
    preprocess(path, tmp_path / "out", tokenizer_type=str(hf), apply_ftfy=True)


@pytest.mark.parametrize("bad", list(BAD), ids=range(len(BAD)))
def test_a_bad_record_has_its_number_among_the_held_out(hf, tmp_path, bad):
    path = write(tmp_path / "a.jsonl", [GOOD[0], bad, *GOOD[1:4]])
    options = {"tokenizer_type": str(hf), "on_bad_record": "skip"}
    parts = {
        part: preprocess(Source(str(path), heldout_every=2, heldout_part=part), tmp_path / part, **options)[0]
        for part in ("train", "heldout")
    }
    facts = {part: read_facts(prefix) for part, prefix in parts.items()}
    assert (facts["train"]["skipped"]["records"], facts["train"]["documents"]) == (1, 1)
    assert (facts["heldout"]["skipped"]["records"], facts["heldout"]["documents"]) == (0, 3)


def test_nothing_but_bad_records(hf, tmp_path):
    for lines in ([HALF] * 3, ["{}"] * 3):
        path = write(tmp_path / "a.jsonl", lines)
        with pytest.raises(MinitronError, match=f"{path}:1: "):
            preprocess(path, tmp_path / "out", tokenizer_type=str(hf), on_bad_record="skip")
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
    with pytest.raises(MinitronError, match="Did you mean 'skip'"):
        preprocess(path, tmp_path / "out", tokenizer_type=str(hf), on_bad_record="skipp")


def test_the_command_counts_and_names_the_first(hf, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [GOOD[0], HALF, GOOD[1]])
    keys = ["preprocess", f"input={path}", f"output_prefix={tmp_path}/out", f"tokenizer.type={hf}"]
    assert main(keys) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"minitron: {path}:2: expected Unicode text, found half")
    assert main([*keys, "on_bad_record=skip"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"1 bad records skipped (on_bad_record=skip), the first: {path}:2: {BAD[HALF]}"
    )


def test_text_as_the_world_has_it_is_the_same_text(hf, tmp_path):
    """Byte order marks, line ends and encodings leave no token behind."""
    text = "fine text\nin two lines\n"
    kinds = {
        "plain": text.encode(),
        "mark": text.encode("utf-8-sig"),
        "windows": text.replace("\n", "\r\n").encode("utf-8-sig"),
        "wide": text.encode("utf-16"),
    }
    found = {}
    for name, content in kinds.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
        prefix = preprocess(tmp_path / f"{name}.txt", tmp_path / name, tokenizer_type=str(hf))[0]
        found[name] = np.fromfile(f"{prefix}.bin", np.uint16).tolist()
    assert found == dict.fromkeys(kinds, found["plain"])


STABLE = {  # of the tokens that versions before `on_bad_record` wrote
    "jsonl": "91dc1319f1b3b7a1",
    "txt": "221fb6a54ee87597",
    "parquet": "91dc1319f1b3b7a1",
}


def test_tokens_of_plain_input_stay_what_they_were(tmp_path):
    """Ids of bytes, with a vocabulary of their own: only a change of reading or writing changes these digests."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.data.conftest import write_parquet

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(tmp_path / "bytes")
    texts = [*DOCUMENTS, " \n", "tabs\tand <|end|> of text\u2028"]
    write(tmp_path / "a.jsonl", [json.dumps({"text": text}) for text in texts] + [""])
    (tmp_path / "a.txt").write_text("".join(texts))
    write_parquet(tmp_path / "a.parquet", [*texts, None])
    found = {}
    for kind in STABLE:
        prefix = preprocess(tmp_path / f"a.{kind}", tmp_path / kind, tokenizer_type=str(tmp_path / "bytes"))[0]
        content = b"".join(Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx"))
        found[kind] = hashlib.sha256(content).hexdigest()[:16]
    assert found == STABLE
