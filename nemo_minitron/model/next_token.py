"""Next-token losses of a residual stream in plain torch, a chunk of tokens at a time.

What a model loses is the same three lines wherever a checkpoint is streamed: final norm, output layer, cross entropy.
Logits of a whole sample have no room beside a vocabulary of 128,000, so that they are made and dropped for
:data:`HEAD_BYTES` of them at a time. Weights are whole; under any grid each process takes its share of the samples.
(A model that lives in Megatron has its own: :mod:`nemo_minitron.distill.fused`, over a sharded vocabulary.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_minitron.model.decoder import rms_norm

HEAD_BYTES = 256 << 20
"""Bounds the logits that are alive at once."""
IGNORED = -100
"""Label of a token that does not count."""
_PER_NAT = 2.0**20


def next_labels(tokens: Tensor, counted: Tensor | None) -> Tensor:
    """The token that follows each position but the last, or ``IGNORED``: ``[…, s]`` → ``[…, s-1]`` int64.

    Args:
        counted: ``[…, s]`` bool, which positions predict a token that counts
            (:class:`nemo_minitron.data.blocks.Drawn`); None: all.
    """
    labels = tokens[..., 1:]
    return labels if counted is None else labels.masked_fill(~counted[..., :-1], IGNORED)


def label_count(tokens: Tensor, counted: Tensor | None) -> int:
    """How many of :func:`next_labels` count."""
    return tokens[..., 1:].numel() if counted is None else int(counted[..., :-1].sum())


def loss_sums(
    x: Tensor, labels: Tensor, norm: Tensor, head: Tensor, epsilon: float, scales: Sequence[float] = (1.0,)
) -> Tensor:
    """Summed next-token losses of one sample, in nats, for each scale of the final norm.

    Args:
        x: ``[t, H]`` float32, the stream after the last layer. labels: ``[t]`` int64, the token that follows each
            position, or ``IGNORED``.
        norm: ``[H]``, of the final norm. head: ``[V, H]``, without padded rows.
        scales: numbers by which ``norm`` is multiplied.

    Returns:
        ``[len(scales)]`` float64 on the device of ``x``, whole multiples of 2^-20: float64 adds those of many samples
        without error, so that the sum does not depend on which process saw which sample.
    """
    total = torch.zeros(len(scales), dtype=torch.float64, device=x.device)
    for some in _chunks(len(x), len(head)):
        logits = (rms_norm(x[some], norm, epsilon) @ head.T).float()
        total += torch.stack([_loss(logits if scale == 1 else scale * logits, labels[some]) for scale in scales])
    return (total * _PER_NAT).round() / _PER_NAT


def loss_gradient(x: Tensor, labels: Tensor, norm: Tensor, head: Tensor, epsilon: float) -> Tensor:
    """Gradient of the summed loss with respect to ``x``, ``[t, H]`` float32; arguments as for :func:`loss_sums`."""
    gradient = torch.empty_like(x)
    for some in _chunks(len(x), len(head)):
        with torch.enable_grad():
            part = x[some].detach().clone().requires_grad_(True)
            loss = _loss(rms_norm(part, norm, epsilon) @ head.T, labels[some])
            gradient[some] = torch.autograd.grad(loss, part)[0]
    return gradient


def norm_gradients(x: Tensor, labels: Tensor, norm: Tensor, head: Tensor, epsilon: float) -> Tensor:
    """Gradient of each token's loss with respect to relative changes of ``norm``, ``[t, H]`` float32.

    That is ``(sum_v p_v head_v - head_label) * h``, h the normed stream and p the chances; zeros for ``IGNORED``.
    Arguments as for :func:`loss_sums`.
    """
    gradients = torch.empty_like(x)
    for some in _chunks(len(x), len(head)):
        normed, wanted = rms_norm(x[some], norm, epsilon), labels[some, None]
        chances = torch.softmax(normed @ head.T, dim=-1)
        chances.scatter_add_(1, wanted.clamp_min(0), torch.full_like(normed[:, :1], -1.0))
        gradients[some] = (chances @ head) * normed * (wanted != IGNORED)
    return gradients


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the tokens, a float64 scalar."""
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED).double()


def _chunks(tokens: int, vocab_size: int) -> Iterator[slice]:
    """Slices of tokens whose float32 logits have room in ``HEAD_BYTES``; of one token at least."""
    step = max(1, HEAD_BYTES // (4 * vocab_size))
    return (slice(start, start + step) for start in range(0, tokens, step))
