"""What is measured on a checkpoint that is read layer by layer, on all processes of the job, with progress shown.

Weights are whole here, whatever the grid: every process takes its share of the samples, and all end with the same.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nemo_minitron import parallel, runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.config.sections import Calibration
from nemo_minitron.importance.own_text import write_samples
from nemo_minitron.importance.reconstruction import clipped, rank_by_reconstruction
from nemo_minitron.importance.stream import stream_collect


def collect_by_layer(reader: NemoReader, blocks: Tensor) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Published scores of ``blocks [n, s]``, and counts: what :func:`nemo_minitron.importance.collect.collect` gives
    of a model in memory."""
    if runtime.world_size() > 1:
        runtime.init_distributed()
    world = parallel.world()
    share = blocks[runtime.rank() :: parallel.size(world)].to(runtime.device())
    with _bar(len(share) * reader.shape.num_layers, "importance", "layer") as bar:
        return stream_collect(reader, share, group=world, progress=bar.update)


def kept_tokens(reader: NemoReader, blocks: Tensor, calibration: Calibration) -> Tensor:
    """Tokens ``[m, s]`` that ranks and compensation rest on: of ``blocks [n, s]`` as many as have
    ``calibration.reconstruction_tokens``, at least one, and ``calibration.own_samples`` that the model writes itself;
    the same on every rank."""
    drawn = blocks[: max(1, calibration.reconstruction_tokens // blocks.shape[1])]
    count, length, device = calibration.own_samples, blocks.shape[1], runtime.device()
    if count == 0:
        return drawn
    written = torch.zeros(count, length, dtype=torch.int64)
    if runtime.rank() == 0:
        with _bar(length - 1, "own text", "token") as bar:
            written = write_samples(
                reader, count, length, seed=calibration.seed, device=device, dtype=reader.dtype, progress=bar.update
            )
    return torch.cat([drawn, parallel.broadcast(written.to(device), 0, parallel.world()).to(drawn)])


def rank_units(reader: NemoReader, tokens: Tensor) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Ranks by reconstruction and the residual stream's moment, as :class:`nemo_minitron.importance.scores.Scores` has
    them, and the sensitivity ``[2L, m, s]`` of the loss to the stream at every token of ``tokens [m, s]``."""
    world = parallel.world()
    share = slice(runtime.rank(), None, parallel.size(world))
    with _bar(2 * reader.shape.num_layers, "ranks", "layer") as bar:
        ranks, part = rank_by_reconstruction(
            reader, tokens[share].to(runtime.device()), group=world, progress=bar.update
        )
    whole = torch.zeros(len(part), *tokens.shape, device=runtime.device())
    whole[:, share] = torch.from_numpy(part).to(whole)
    return ranks, clipped(parallel.all_reduce(whole, world).cpu().numpy())


def _bar(total: int, description: str, unit: str) -> tqdm:
    return tqdm(total=total, desc=description, unit=unit, disable=None if runtime.rank() == 0 else True)
