"""Passages whose last word is to be found, in the manner of LAMBADA (arXiv 1606.06031), from text that is held out.

    python benchmarks/cloze.py TEXTS/prose_validation.jsonl FOLDER --count 500
    minitron evaluate model.restore_from_path=student.nemo evaluate.perplexity=false \
        evaluate.lm_eval.tasks=[FOLDER/cloze.yaml] output_path=cloze.json

The rule, no model has a say in it: a run is paragraphs of a document that follow each other, each of whole sentences
(it begins with a capital and ends with a full stop, an exclamation or a question mark) and nine tenths letters and
spaces. A passage ends with any sentence of a run of at least 5 words whose last one, before a full stop, has at least 4
letters and nothing else. It begins with the last sentence of the run from which it has 50 words, and its last word also
before its last sentence (in any case); one that would have more than 200 words is none. Passages of a document do not
overlap. Of all, ``--count`` are drawn by ``--seed``, at most ``--most`` of a document.

``FOLDER/cloze.jsonl`` has ``context``, ``word`` and ``source`` of each, ``cloze.yaml`` is the task for
lm-evaluation-harness. A word counts as found where each of its tokens is the likeliest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LEAST, MOST = 50, 200
"""Words of a passage."""
LEAST_LETTERS, LEAST_WORDS = 4, 5
"""Of its last word; of its last sentence."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_WHOLE = re.compile(r"[A-Z].*[.!?]$")

TASK = """# Made by benchmarks/cloze.py
task: cloze
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{' ' + word}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
metadata: {{version: 1.0}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="jsonl of documents, such as texts.py's prose_validation.jsonl")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=500, help="passages")
    parser.add_argument("--most", type=int, default=5, help="of one document")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with given.text.open(encoding="utf-8") as file:
        found = [passage for line in file for passage in passages(json.loads(line))]
    rows = drawn(found, given.count, given.most, given.seed)
    if len(rows) < given.count:
        print(f"note: {given.text} has {len(rows)} passages, fewer than the {given.count} asked for")
    given.folder.mkdir(parents=True, exist_ok=True)
    data = given.folder / "cloze.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (given.folder / "cloze.yaml").write_text(TASK.format(data=json.dumps(str(data.resolve()))), encoding="utf-8")
    digest = hashlib.sha256(data.read_bytes()).hexdigest()[:12]
    print(f"{data}: {len(rows)} of {len(found)} passages, sha256 {digest}")


def passages(document: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Of a document, in order."""
    for sentences in runs(document["text"]):
        begin = 0
        for end, last in enumerate(sentences):
            word = last_word(last)
            if word is None:
                continue
            start = _start(sentences, begin, end, word)
            if start is not None:
                context = " ".join(sentences[start : end + 1]).removesuffix(".").removesuffix(word).rstrip()
                yield {"context": context, "word": word, "source": document.get("source", "")}
                begin = end + 1


def _start(sentences: Sequence[str], begin: int, end: int, word: str) -> int | None:
    """The last sentence from which a passage that ends with ``end`` is long enough and has the word before it."""
    wanted = re.compile(rf"\b{re.escape(word)}\b", re.I)
    count, seen = len(sentences[end].split()), False
    for start in range(end - 1, begin - 1, -1):
        count += len(sentences[start].split())
        seen = seen or wanted.search(sentences[start]) is not None
        if count > MOST:
            return None
        if count >= LEAST and seen:
            return start
    return None


def runs(text: str) -> Iterator[list[str]]:
    """Sentences of paragraphs that follow each other; a heading, an item or code ends a run, an empty line does not."""
    sentences: list[str] = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        letters = sum(one.isalpha() or one == " " for one in line)
        if _WHOLE.match(line) and letters >= 0.9 * len(line):
            sentences += _SENTENCE_END.split(line)
        elif sentences:
            yield sentences
            sentences = []
    if sentences:
        yield sentences


def last_word(sentence: str) -> str | None:
    """What is to be found at the end of a sentence; None where it does not end in such a word."""
    words = sentence.split()
    word = words[-1].removesuffix(".") if sentence.endswith(".") else ""
    sound = word.isascii() and word.isalpha() and len(word) >= LEAST_LETTERS
    return word if sound and len(words) >= LEAST_WORDS else None


def drawn(found: Sequence[dict[str, str]], count: int, most: int, seed: int) -> list[dict[str, str]]:
    """As many as asked for, by the seed, at most ``most`` of a source, in the order of the text."""
    order = list(range(len(found)))
    random.Random(seed).shuffle(order)
    of_source: Counter[str] = Counter()
    chosen = []
    for at in order:
        if of_source[found[at]["source"]] < most and len(chosen) < count:
            of_source[found[at]["source"]] += 1
            chosen.append(at)
    return [found[at] for at in sorted(chosen)]


def read(path: Path) -> list[dict[str, str]]:
    """Passages of a ``cloze.jsonl``."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def accuracy(model: Any, tokenizer: Any, rows: Iterable[Mapping[str, str]], batch: int = 8) -> float:
    """Share of the rows whose word an HF model finds, as lm-evaluation-harness counts it, in bfloat16 products."""
    import torch

    pairs = []
    for row in rows:
        context = tokenizer(row["context"], add_special_tokens=False)["input_ids"]
        whole = tokenizer(f"{row['context']} {row['word']}", add_special_tokens=False)["input_ids"]
        pairs.append((whole, len(context)))
    right = 0
    for at in range(0, len(pairs), batch):
        part = pairs[at : at + batch]
        tokens = torch.zeros(len(part), max(len(whole) for whole, _ in part) - 1, dtype=torch.long)
        for row, (whole, _) in zip(tokens, part, strict=True):
            row[: len(whole) - 1] = torch.tensor(whole[:-1])  # what is behind it does not matter to a causal model
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
            hidden = model.model(tokens.to(model.device)).last_hidden_state
            for states, (whole, given) in zip(hidden, part, strict=True):
                likeliest = model.lm_head(states[given - 1 : len(whole) - 1]).argmax(dim=-1).tolist()
                right += likeliest == whole[given:]
    return right / len(pairs)


if __name__ == "__main__":
    main()
