"""What is measured on a checkpoint that is read layer by layer, on all processes of the job, with progress shown.

Weights are whole here, whatever the grid: every process takes its share of the samples, and all end with the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from nemo_minitron import parallel, runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.config.sections import Calibration
from nemo_minitron.errors import check_choice
from nemo_minitron.importance.echoes import echoed
from nemo_minitron.importance.metric import OBSERVES, Job, Metric
from nemo_minitron.importance.own_text import steps, write_blocks
from nemo_minitron.importance.reconstruction import Compensation, as_arrays, clipped, measure
from nemo_minitron.importance.scores_format import Ranking
from nemo_minitron.importance.stream import stream_collect
from nemo_minitron.jobs.progress import Progress, progress_bar
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.registry import METRICS, check_name

ECHOES = 8
"""Samples that are kept for each one that says itself twice beside them, to rank heads and query groups."""


def collect_by_layer(
    reader: NemoReader, blocks: Tensor, counted: Tensor | None = None
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Published scores of ``blocks [n, s]`` at the positions ``counted [n, s]``, and counts: what
    :func:`nemo_minitron.importance.collect.collect` gives of a model in memory."""
    if runtime.world_size() > 1:
        runtime.init_distributed()
    world = parallel.world()
    mine = slice(runtime.rank(), None, parallel.size(world))
    share, counts = blocks[mine].to(runtime.device()), _share(counted, mine)
    with _bar(len(share) * reader.shape.num_layers, "importance", "layer") as bar:
        return stream_collect(reader, share, counted=counts, group=world, progress=bar.update)


@dataclasses.dataclass(frozen=True)
class Kept:
    """Samples that ranks and compensation rest on.

    Attributes:
        tokens: ``[m, s]`` int64.
        counted: ``[m, s]`` bool, as :class:`nemo_minitron.data.blocks.Drawn` has it; None where all are True.
        own: how many of the last of them the model wrote itself.
    """

    tokens: Tensor
    counted: Tensor | None
    own: int


def kept_tokens(reader: NemoReader, blocks: Tensor, calibration: Calibration, counted: Tensor | None = None) -> Kept:
    """Keep as many of ``blocks [n, s]`` as have ``calibration.reconstruction_tokens``, at least one; beside them
    ``calibration.own_samples`` blocks of the model's own, or as many again where it is null. The same on every rank.

    Of ``blocks`` the positions ``counted [n, s]`` count, of the model's own text all.
    """
    drawn = blocks[: max(1, calibration.reconstruction_tokens // blocks.shape[1])]
    length, device = blocks.shape[1], runtime.device()
    count = len(drawn) if calibration.own_samples is None else calibration.own_samples
    if counted is not None:
        counted = torch.cat([counted[: len(drawn)], torch.ones(count, length, dtype=torch.bool)])
        counted = None if counted.all() else counted
    if count == 0:
        return Kept(drawn, counted, 0)
    written = torch.zeros(count, length, dtype=torch.int64)
    if runtime.rank() == 0:
        with _bar(steps(reader.shape, count, length, reader.dtype), "own text", "token") as bar:
            written = write_blocks(
                reader, count, length, seed=calibration.seed, device=device, dtype=reader.dtype, progress=bar.update
            )
    own = parallel.broadcast(written.to(device), 0, parallel.world()).to(drawn)
    return Kept(torch.cat([drawn, own]), counted, count)


def chosen_metrics(names: Iterable[str]) -> dict[str, Metric]:
    """Entries of :data:`nemo_minitron.registry.METRICS`, each once, in the order of ``names``.

    Raises:
        MinitronError: a name that is not known, or an entry that observes nothing that there is.
    """
    metrics: dict[str, Metric] = {}
    for name in names:
        metric = METRICS.get(check_name(name, "importance.metrics"))
        check_choice(f"the importance metric '{name}': observes", getattr(metric, "observes", None), OBSERVES)
        metrics[name] = metric
    return metrics


def rank_by_statistics(
    shape: ModelShape,
    found: Mapping[str, np.ndarray],
    counts: Mapping[str, int],
    metrics: Mapping[str, Metric],
    predicted: int | None = None,
) -> dict[str, Ranking]:
    """Rankings by those of ``metrics`` that observe statistics of forward passes, as ``collect`` found them.

    Args:
        predicted: tokens whose loss is counted; None: all, but the first of each sample.
    """
    predicted = counts["tokens"] - counts["samples"] if predicted is None else predicted
    job = Job(shape, torch.device("cpu"), counts["tokens"], predicted)
    rankings: dict[str, Ranking] = {}
    for name, metric in metrics.items():
        if metric.observes == "statistics":
            observer = metric.start(job)
            observer.statistics(found)
            rankings[name] = as_arrays(observer)
    return rankings


def rank_by_walk(
    reader: NemoReader, kept: Kept, metrics: Mapping[str, Metric]
) -> tuple[dict[str, Ranking], Compensation | None]:
    """Rankings by those of ``metrics`` that observe a walk through the layers.

    Where reconstruction is one of them, also what compensation needs, with the sensitivity ``[2L, m, s]`` of all
    processes' samples, its largest cut; heads and query groups are then ranked on the last samples said twice as well,
    one for :data:`ECHOES` that are kept, which the model wrote itself where it wrote any.
    """
    world = parallel.world()
    share = slice(runtime.rank(), None, parallel.size(world))
    tokens, counted = kept.tokens[share].to(runtime.device()), _share(kept.counted, share)
    echoes, _ = echoed(kept.tokens[len(kept.tokens) - len(kept.tokens) // ECHOES :])
    echoes = echoes[share].to(tokens)
    with _bar(2 * reader.shape.num_layers, "ranks", "layer") as bar:
        rankings, found = measure(
            reader, tokens, metrics, counted=counted, echoes=echoes, group=world, progress=bar.update
        )
    if found is None:
        return rankings, None
    whole = torch.zeros(len(found.sensitivity), *kept.tokens.shape, device=runtime.device())
    whole[:, share] = torch.from_numpy(found.sensitivity).to(whole)
    counts = None if kept.counted is None else kept.counted.numpy()
    sensitivity = clipped(parallel.all_reduce(whole, world).cpu().numpy(), counts)
    return rankings, dataclasses.replace(found, sensitivity=sensitivity)


def _share(counted: Tensor | None, mine: slice) -> Tensor | None:
    """This process's rows on its device."""
    return None if counted is None else counted[mine].to(runtime.device())


def _bar(total: int, description: str, unit: str) -> Progress:
    return progress_bar(total, description, unit, show=runtime.rank() == 0)
