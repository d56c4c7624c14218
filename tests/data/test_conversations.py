"""``minitron preprocess`` of conversations: the files, and what becomes of records that cannot be taken."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from nemo_minitron.cli import main
from nemo_minitron.data import encode
from nemo_minitron.data.blocks import counted_blocks, text_blocks, token_blocks
from nemo_minitron.data.calibration import _from_prefixes
from nemo_minitron.data.index import read_index
from nemo_minitron.data.masks import mask_of, open_mask, prove_mask
from nemo_minitron.data.preprocess import preprocess, read_facts
from nemo_minitron.data.tokenizer import TokenizerSpec
from nemo_minitron.data.tokens import data_fingerprint, open_tokens
from nemo_minitron.errors import MinitronError
from tests.data.chats import CHATML, TURNS, user_first, with_template

CHATS = [
    [*TURNS[: 1 + 2 * (number % 2 + 1)], {"role": "user", "content": f"And {number}?"}, TURNS[-1]]
    for number in range(20)
]


@pytest.fixture(scope="module")
def tokenizer(hf, tmp_path_factory) -> Path:
    return with_template(hf, tmp_path_factory.mktemp("chatml"), CHATML)


def write(path: Path, records: list) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def made(source, prefix, tokenizer, **options) -> Path:
    return preprocess(source, prefix, tokenizer_type=str(tokenizer), json_keys=["messages"], **options)[0]


def content(prefix: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}*")}


def test_tokens_and_mask_are_of_the_same_documents(tokenizer, tmp_path):
    prefix = made(write(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS]), tmp_path / "a", tokenizer)
    assert prefix.name == "a_messages_document" and mask_of(prefix) == tmp_path / "a_messages_mask"
    backend, tokens, mask = AutoTokenizer.from_pretrained(tokenizer), open_tokens(prefix), open_mask(prefix)
    begins = [0, *tokens.ends]
    for number, chat in enumerate(CHATS):
        part = slice(begins[number], begins[number + 1])
        ids, counts = tokens.tokens[part], mask.tokens[part]
        assert ids.tolist() == [*backend.apply_chat_template(chat), backend.eos_token_id]
        answers = "".join(f"{one['content']}<|im_end|>" for one in chat if one["role"] == "assistant")
        assert backend.decode(ids[counts == 1]) == answers and counts[-1] == 0
    lengths = [read_index(Path(f"{p}.bin"), Path(f"{p}.idx")).lengths.tolist() for p in (prefix, mask_of(prefix))]
    assert lengths[0] == lengths[1] and mask.tokens.dtype == np.uint8
    facts = read_facts(prefix)
    assert facts["mask"] == {"name": "a_messages_mask", "counted": int(mask.tokens.sum())}
    assert facts["chat"]["loss_on"] == "responses" and prove_mask(prefix) is not None


def test_bytes_do_not_depend_on_the_number_of_workers_or_the_format(tokenizer, tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(encode, "BATCH_DOCUMENTS", 3)
    records = write(tmp_path / "a.jsonl", [{"messages": chat, "source": "x"} for chat in CHATS])
    table = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"messages": CHATS}), table)
    found = [
        made(source, tmp_path / name / "a", tokenizer, workers=workers)
        for name, source, workers in (("one", records, 1), ("two", records, 2), ("columns", table, 1))
    ]
    for name in ("a_messages_document.bin", "a_messages_document.idx", "a_messages_mask.bin", "a_messages_mask.idx"):
        assert len({(prefix.parent / name).read_bytes() for prefix in found}) == 1, name


BAD = {
    '[{"role": "user", "content": "hi"}]': "expected something that the assistant says, found nothing",
    '[{"role": "bot", "content": "hi"}]': "messages[0].role: expected one of system, developer, user, assistant, tool",
    '[{"role": "user", "content": " "}]': "messages[0].content: expected text, found none",
    '[{"role": "user"}]': "messages[0].content: expected text, found None",
    "[]": "messages: expected a list of objects with role and content, found []",
    '[{"role": "user", "content": "\\ud83d"}]': "expected Unicode text, found half of a surrogate pair",
    '[{"role": "assistant", "content": "a", "tool_calls": [1]}]': "messages[0].tool_calls: expected role and content",
    '"a text"': "expected messages as in the records before, found text",
}


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_conversations_stop_or_are_left_out(tokenizer, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(encode, "BATCH_DOCUMENTS", 3)
    good = [json.dumps({"messages": chat}) for chat in CHATS]
    clean = made(write(tmp_path / "good.jsonl", map(json.loads, good)), tmp_path / "good", tokenizer)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([good[0], *(f'{{"messages": {bad}}}' for bad in BAD), *good[1:]]) + "\n")
    for line, complaint in enumerate(BAD.values(), start=2):
        text = mixed.read_text().splitlines()
        one = tmp_path / "one.jsonl"
        one.write_text("\n".join([text[0], text[line - 1], text[-1]]) + "\n")
        if workers == 1:
            with pytest.raises(MinitronError) as error:
                made(one, tmp_path / "out", tokenizer)
            assert str(error.value).startswith(f"{one}:2: {complaint}"), complaint
            assert "on_bad_record=skip" in str(error.value) and not list(tmp_path.glob("out*"))
    found = made(mixed, tmp_path / "kept", tokenizer, workers=workers, on_bad_record="skip")
    assert read_facts(found)["skipped"]["records"] == len(BAD)
    for name in ("document", "mask"):
        for suffix in (".bin", ".idx"):
            kept = (tmp_path / f"kept_messages_{name}{suffix}").read_bytes()
            assert kept == (tmp_path / f"good_messages_{name}{suffix}").read_bytes()
    assert read_facts(clean)["documents"] == len(CHATS)


def test_where_all_counts_there_is_no_mask(tokenizer, tmp_path):
    source = write(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS])
    made(source, tmp_path / "a", tokenizer)
    prefix = made(source, tmp_path / "a", tokenizer, loss_on="all")
    assert read_facts(prefix)["chat"]["loss_on"] == "all" and mask_of(prefix) is None
    assert not list(tmp_path.glob("*mask*"))  # that of the first run went with its tokens


def test_messages_need_a_template_and_whole_control_tokens(hf, tokenizer, tmp_path):
    source = write(tmp_path / "a.jsonl", [{"messages": user_first(CHATS[0])}])
    for name, options, complaint in (
        (hf, {"on_bad_record": "skip"}, "expected a tokenizer with a chat template for conversations, found none"),
        (hf, {"on_bad_record": "skip", "workers": 2}, "expected a tokenizer with a chat template"),
        (tokenizer, {"split_special_tokens": True}, "tokenizer.split_special_tokens: expected false for conversations"),
        (tokenizer, {"loss_on": "answers"}, "chat.loss_on: expected one of responses, all, found 'answers'"),
    ):
        with pytest.raises(MinitronError, match=complaint):
            made(source, tmp_path / "out", name, **options)
        assert not list(tmp_path.glob("out*"))


def test_the_command_says_what_counts(tokenizer, tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS])
    keys = [f"input={source}", "json_keys=[messages]", f"tokenizer.type={tokenizer}", f"output_prefix={tmp_path}/a"]
    assert main(["preprocess", *keys]) == 0
    counted = read_facts(tmp_path / "a_messages_document")["mask"]["counted"]
    assert f"{counted} tokens (" in capsys.readouterr().out


def written(tokenizer, folder: Path) -> Path:
    return made(write(folder / "a.jsonl", [{"messages": chat} for chat in CHATS]), folder / "a", tokenizer)


def test_masks_that_do_not_go_with_their_tokens_are_refused(tokenizer, tmp_path):
    prefix = written(tokenizer, tmp_path)
    mask, facts = Path(f"{mask_of(prefix)}.bin"), Path(f"{prefix}.json")
    whole, said = mask.read_bytes(), facts.read_text()
    mask.write_bytes(b"\2" + whole[1:])
    with pytest.raises(MinitronError, match="expected 0 or 1 for each token, found 2"):
        prove_mask(prefix)
    mask.write_bytes(bytes(len(whole)))
    with pytest.raises(MinitronError, match="expected tokens that count, found none"):
        prove_mask(prefix)
    mask.write_bytes(whole[:-1])
    with pytest.raises(MinitronError, match=f"its index says {len(whole)} bytes"):
        open_mask(prefix)
    mask.unlink()
    with pytest.raises(MinitronError, match="names a mask: no file"):
        mask_of(prefix)
    mask.write_bytes(whole)
    facts.write_text(json.dumps(json.loads(said) | {"mask": {"name": "../a_messages_mask"}}))
    with pytest.raises(MinitronError, match="expected the name of a file beside it"):
        mask_of(prefix)
    facts.unlink()
    with pytest.raises(MinitronError, match="the three belong together"):
        mask_of(prefix)
    facts.write_text(json.dumps(json.loads(said) | {"mask": {"name": prefix.name}}))
    with pytest.raises(MinitronError, match="expected one byte per token, found uint16"):
        open_mask(prefix)
    other = made(
        write(tmp_path / "b.jsonl", [{"messages": chat} for chat in CHATS[1:]]), tmp_path / "other" / "a", tokenizer
    )
    facts.write_text(said)
    for suffix in (".bin", ".idx"):
        Path(f"{mask_of(prefix)}{suffix}").write_bytes(Path(f"{mask_of(other)}{suffix}").read_bytes())
    with pytest.raises(MinitronError, match="expected a mask of the same documents"):
        open_mask(prefix)


def test_calibration_knows_what_the_assistant_says(tokenizer, tmp_path, capsys):
    prefix = str(written(tokenizer, tmp_path))
    drawn = counted_blocks(prefix, 16, num_samples=9, seed=1)
    text, mask = open_tokens(prefix).tokens, open_mask(prefix).tokens
    rows = torch.from_numpy(text[: len(text) // 17 * 17].reshape(-1, 17).astype(np.int64))
    counts = torch.from_numpy(mask[: rows.numel()].reshape(-1, 17)[:, 1:])
    for sample, counted in zip(drawn.tokens, drawn.counted, strict=True):
        places = (rows[:, :-1] == sample).all(1).nonzero()[:, 0]
        assert any(torch.equal(counts[place].bool(), counted) for place in places)
    assert 0 < drawn.counted.sum() < drawn.counted.numel() and drawn.counted[:, :-1].any(1).all()
    assert not capsys.readouterr().err
    plain = made(write(tmp_path / "b.jsonl", [{"messages": chat} for chat in CHATS]), tmp_path / "b", tokenizer,
                 loss_on="all")  # fmt: skip
    mixed = _from_prefixes([(str(plain), 3), (prefix, 9)], 1, 16, 1000)
    of_chats = [at for at in range(12) if at % 4 != 1]  # of every four samples one is plain
    assert torch.equal(mixed.tokens[of_chats], drawn.tokens) and torch.equal(mixed.counted[of_chats], drawn.counted)
    assert torch.equal(mixed.tokens[1::4], token_blocks(plain, 16, num_samples=3, seed=1)[:, :-1])
    assert mixed.counted[1::4].all()
    content = json.dumps([(data_fingerprint(plain), 3), (drawn.fingerprint, 9)])
    assert mixed.fingerprint == hashlib.sha256(content.encode()).hexdigest()
    assert _from_prefixes([(str(plain), 3), (str(plain), 2)], 1, 16, 1000).counted is None


def test_calibration_reads_conversations_under_text(tokenizer, tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": chat} for chat in CHATS])
    (prefix,) = preprocess(source, tmp_path / "a", tokenizer_type=str(tokenizer))
    found = text_blocks(source, TokenizerSpec(type=str(tokenizer)), 16, seed=2)
    expected = counted_blocks(prefix, 16, seed=2)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.counted, expected.counted)
    assert found.fingerprint == expected.fingerprint and found.counted.any() and not found.counted.all()
