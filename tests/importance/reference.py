"""The definitions of importance, computed densely with numpy on transformers' activations in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.canonical import Memory, to_transformers


def answers(samples: int, length: int) -> Tensor:
    """Positions that count, bool ``[n, s]``: of the first sample all, of the others one to three stretches, of which
    no one, of the second sample, reaches its end."""
    counted = torch.zeros(samples, length, dtype=torch.bool)
    counted[0] = True
    for sample in range(1, samples):
        for start in range(2 + sample % 5, length - 6, 11 + sample % 3):
            counted[sample, start : start + 3 + sample % 4] = True
        counted[sample, -2:] = sample % 3 == 2
    return counted


def counted_loss(logits: Tensor, tokens: Tensor, counted: Tensor | None) -> Tensor:
    """Summed loss of the tokens that count, one position after the other."""
    chances = torch.log_softmax(logits, dim=-1)
    places = [
        (sample, at)
        for sample in range(tokens.shape[0])
        for at in range(tokens.shape[1] - 1)
        if counted is None or counted[sample, at]
    ]
    return -torch.stack([chances[sample, at, tokens[sample, at + 1]] for sample, at in places]).sum()


def activations(model: Memory, tokens: Tensor) -> dict[str, np.ndarray]:
    """``[rows, n, s, C]`` per kind, all samples at once."""
    reference, seen = to_transformers(model), {"ffn": [], "proj": [], "norm": [], "residual": []}

    def keep(kind):
        return lambda _module, args, *_: seen[kind].append(args[0].numpy())

    def keep_output(kind):
        return lambda _module, _args, out: seen[kind].append((out[0] if isinstance(out, tuple) else out).numpy())

    for layer in reference.model.layers:
        layer.register_forward_pre_hook(keep("residual"))
        layer.input_layernorm.register_forward_hook(keep_output("norm"))
        layer.self_attn.o_proj.register_forward_pre_hook(keep("proj"))
        layer.post_attention_layernorm.register_forward_hook(keep_output("norm"))
        layer.mlp.down_proj.register_forward_pre_hook(keep("ffn"))
    reference.model.layers[-1].register_forward_hook(keep_output("residual"))
    reference.model.norm.register_forward_hook(keep_output("norm"))
    with torch.no_grad():
        reference(tokens)
    return {kind: np.stack(rows) for kind, rows in seen.items()}


def aggregate(values: np.ndarray, how: str, absolute: bool) -> np.ndarray:
    """Over the first axis."""
    if how == "mean":
        return (np.abs(values) if absolute else values).mean(0)
    return np.sqrt((values**2).sum(0)) if how == "l2" else values.var(0)


def score(rows: np.ndarray, mask: np.ndarray, sequence: str, batch: str) -> np.ndarray:
    """``[rows, n, s, C]`` → ``[rows, C]``, one sample at a time."""
    samples = [i for i in range(mask.shape[0]) if mask[i].any()]
    return np.stack(
        [
            aggregate(np.stack([aggregate(row[i][mask[i]], sequence, True) for i in samples]), batch, False)
            for row in rows
        ]
    )


def dense_scores(model: Memory, tokens: Tensor, mask: Tensor | None, sequence="mean", batch="l2", unit="l2"):
    """Every array of ``Scores`` by its definition."""
    shape, act = model.shape, activations(model, tokens)
    keep = np.ones(tuple(tokens.shape), bool) if mask is None else mask.numpy()
    layers, d, r = shape.num_layers, shape.kv_channels, shape.heads_per_group
    joined = {"l2": np.linalg.norm, "mean": np.mean}[unit]
    proj = score(act["proj"], keep, sequence, batch)
    norms = score(act["norm"], keep, sequence, batch)
    flat = {kind: rows[:, keep] for kind, rows in act.items()}  # [rows, tokens, C]
    stream = flat["residual"]
    cosine = np.empty((layers + 1, layers + 1))
    for i in range(layers + 1):
        for j in range(layers + 1):
            dots = (stream[i] * stream[j]).sum(-1)
            cosine[i, j] = (dots / np.linalg.norm(stream[i], axis=-1) / np.linalg.norm(stream[j], axis=-1)).mean()
    rms = {kind: np.sqrt((rows**2).mean(1)) for kind, rows in flat.items()}
    return {
        "ffn": score(act["ffn"], keep, sequence, batch),
        "heads": np.array(
            [[joined(row[a * d : (a + 1) * d]) for a in range(shape.num_attention_heads)] for row in proj]
        ),
        "groups": np.array(
            [[joined(row[g * r * d : (g + 1) * r * d]) for g in range(shape.num_query_groups)] for row in proj]
        ),
        "hidden": norms.sum(0),
        "block_influence": np.array([1 - cosine[i, i + 1] for i in range(layers)]),
        "residual_cosine": cosine,
        "hidden_norms": norms,
        "ffn_rms": rms["ffn"],
        "proj_rms": rms["proj"],
        "norm_rms": rms["norm"],
        "residual_rms": rms["residual"],
    }
