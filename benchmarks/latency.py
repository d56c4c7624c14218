"""The search's latency model against decoding steps that are run, for shapes from all over the space.

    python benchmarks/latency.py --model llama-8b --json benchmarks/results/latency_llama_8b_h100.json
    python benchmarks/latency.py --model smollm2 --json benchmarks/results/latency_smollm2_h100.json

A step is a whole Llama in torch with random weights: norms, rotary, fused QKV and gate/up products, attention over a
full KV cache, and the output layer. On CUDA it is replayed from a captured graph. Nothing is fused beyond what torch's
own operations do, so a serving engine will be faster; the model is there to tell shapes apart, which the rank
correlation says, and the median ratio says how far its milliseconds are from these.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance
from torch.nn import functional

from nemo_minitron import runtime
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.search import latency, predict
from nemo_minitron.search.space import Space

MODELS = {
    "llama-8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, 128256),
    "smollm2": ModelShape(30, 576, 1536, 9, 3, 64, 49152, 49152, share_embeddings_and_output_weights=True),
}
GIVEN = {
    "llama-8b": [{"hidden_size": 3072, "ffn_hidden_size": 9216}, {"num_layers": 16}],
    "smollm2": [{"hidden_size": 448}, {"num_layers": 20}],
}
"""Sizes of well-known students, which are measured beside the shapes drawn at random."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--batch", default="1,32", help="sequences decoded at a time, comma-separated")
    parser.add_argument("--length", type=int, default=2048, help="tokens in the KV cache")
    parser.add_argument("--bytes", type=int, default=2, choices=latency.DTYPES, help="of weights and cache")
    parser.add_argument("--shapes", type=int, default=20, help="drawn at random from the space that is searched")
    parser.add_argument("--runs", type=int, default=10, help="of which the shortest counts")
    parser.add_argument("--json", type=Path, help="write the table here")
    given = parser.parse_args()
    source = MODELS[given.model]
    rates = latency.measure(given.bytes)
    print(rates)
    rows: list[dict[str, Any]] = []
    for batch in map(int, given.batch.split(",")):
        titles = ("layers", "hidden", "ffn", "heads", "batch", "modelled ms", "run ms", "ratio")
        print("\n{:>6} {:>6} {:>6} {:>8} {:>5} {:>12} {:>8} {}".format(*titles))
        for shape in drawn(source, GIVEN[given.model], given.shapes):
            modelled = 1e3 * float(rates.decode_seconds(shape, batch, given.length, given.bytes))
            with torch.no_grad():
                step = decoding_step(shape, batch, given.length, given.bytes)
                run = 1e3 * latency.best_seconds(step, given.runs)
            sizes = (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size)
            heads = f"{shape.num_attention_heads}/{shape.num_query_groups}"
            print(
                "{:6} {:6} {:6}".format(*sizes),
                f"{heads:>8} {batch:5} {modelled:12.3f} {run:8.3f} {run / modelled:5.2f}",
            )
            rows.append({"batch": batch, "sizes": sizes, "heads": heads, "modelled_ms": modelled, "run_ms": run})
    summary = {}
    for batch in sorted({row["batch"] for row in rows}):
        pairs = [(row["modelled_ms"], row["run_ms"]) for row in rows if row["batch"] == batch]
        summary[batch] = {
            "shapes": len(pairs),
            "rank_correlation": predict.rank_correlation(*zip(*pairs, strict=True)),
            "median_ratio": round(statistics.median(run / modelled for modelled, run in pairs), 3),
        }
        print(f"batch {batch}: {summary[batch]}")
    if given.json:
        known = {"model": given.model, "length": given.length, "bytes_per_value": given.bytes}
        table = provenance() | known | {"rates": rates.to_dict(), "summary": summary, "rows": rows}
        given.json.write_text(json.dumps(table, indent=2) + "\n")


def drawn(source: ModelShape, known: list[dict[str, int]], count: int) -> list[ModelShape]:
    """The source, the known students, and ``count`` more, each number of layers as likely as another."""
    space, generator = Space.of(source), np.random.default_rng(0)
    blocks = list(space.blocks())
    at = generator.integers(len(blocks), size=count)
    random = [blocks[one].shape(int(generator.integers(len(blocks[one].sizes)))) for one in at]
    return [source, *(source.replace(**sizes) for sizes in known), *random]


def decoding_step(shape: ModelShape, batch: int, length: int, bytes_per_value: int) -> Callable[[], torch.Tensor]:
    """One token of ``batch`` sequences, of which ``length`` tokens are in the cache; returns logits ``[b, Vp]``."""
    device, dtype = runtime.device(), getattr(torch, latency.DTYPES[bytes_per_value])

    def random(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(std=0.02)

    hidden, groups, channels = shape.hidden_size, shape.num_query_groups, shape.kv_channels
    table = random(shape.padded_vocab_size, hidden)
    output = table if shape.share_embeddings_and_output_weights else random(shape.padded_vocab_size, hidden)
    layers = [
        (
            random(hidden),
            random(shape.qkv_rows, hidden),
            random(batch, groups, length, channels),
            random(batch, groups, length, channels),
            random(hidden, shape.proj_columns),
            random(hidden),
            random(2 * shape.ffn_hidden_size, hidden),
            random(hidden, shape.ffn_hidden_size),
        )
        for _ in range(shape.num_layers)
    ]
    norm, tokens = random(hidden), torch.zeros(batch, dtype=torch.long, device=device)
    cosine, sine = random(channels), random(channels)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cosine + torch.cat((-second, first), -1) * sine

    def step() -> torch.Tensor:
        x = table[tokens]
        for norm1, qkv, keys, values, proj, norm2, fc1, fc2 in layers:
            mixed = functional.linear(functional.rms_norm(x, (hidden,), norm1), qkv)
            mixed = mixed.view(batch, groups, shape.heads_per_group + 2, channels)
            query, key = turned(mixed[:, :, :-1]).split((shape.heads_per_group, 1), 2)
            keys[:, :, -1:], values[:, :, -1:] = key, mixed[:, :, -1:]
            # Heads of a group are rows of one query, for all of them see the same keys.
            seen = functional.scaled_dot_product_attention(query, keys, values)
            x = torch.addmm(x, seen.reshape(batch, -1), proj.t())
            gate, up = functional.linear(functional.rms_norm(x, (hidden,), norm2), fc1).chunk(2, -1)
            x = torch.addmm(x, functional.silu(gate) * up, fc2.t())
        return functional.linear(functional.rms_norm(x, (hidden,), norm), output)

    return step


if __name__ == "__main__":
    main()
