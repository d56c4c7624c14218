"""Text that a model writes itself: a sample of what it can do, where calibration data show only a part of it.

Weights that are re-solved on one kind of text alone follow correlations that hold in it and nowhere else, and the
student gets worse than a merely cut one on all other text. A model's own samples, begun with a random token and drawn
at temperature 1, are spread over all that it was trained on and need no data (LLM-QAT, arXiv 2305.17888, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_minitron.model import layout
from nemo_minitron.model.decoder import LayerReader, Rotary, read_head, read_layer, rms_norm


@torch.no_grad()
def write_samples(
    reader: LayerReader,
    count: int,
    length: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """``[count, length]`` int64 tokens of the true vocabulary, on the CPU.

    The whole model is in memory in ``dtype``, on one process: no grid plays a part in what is written. All samples grow
    together, token by token, with their keys and values kept. ``progress`` is told after each, of ``length - 1``.

    Raises:
        ValueError: no sample or no token asked for.
    """
    if count < 1 or length < 1:
        raise ValueError(f"nothing to write: {count} samples of {length} tokens")
    shape, generator = reader.shape, torch.Generator().manual_seed(seed)
    norm, head = read_head(reader, device, dtype)
    tied = shape.share_embeddings_and_output_weights
    table = head if tied else reader.tensor(layout.EMBEDDING)[: shape.vocab_size].to(device, dtype)
    layers = [read_layer(reader, number, device, dtype) for number in range(shape.num_layers)]
    rotary = Rotary.of(shape, length, device)
    size = (shape.num_layers, 2, count, shape.num_query_groups, length, shape.kv_channels)
    kept = torch.empty(size, dtype=dtype, device=device)
    written = torch.empty(count, length, dtype=torch.int64)
    written[:, 0] = torch.randint(shape.vocab_size, (count,), generator=generator)
    for position in range(length - 1):
        x = table[written[:, position : position + 1].to(device)]
        for layer, (keys, values) in zip(layers, kept, strict=True):
            x = layer.forward_next(x, keys, values, position, rotary)
        logits = rms_norm(x[:, 0], norm, shape.layernorm_epsilon) @ head.T
        chances = torch.softmax(logits.float(), dim=-1).cpu()
        written[:, position + 1] = torch.multinomial(chances, 1, generator=generator)[:, 0]
        progress(1)
    return written
