"""Forward passes of NeMo's model on the job's grid, one micro-batch at a time, and the scores that come of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nemo_minitron import parallel, runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.config.grid import Grid, Machines
from nemo_minitron.config.sections import Calibration
from nemo_minitron.data.blocks import Drawn
from nemo_minitron.data.calibration import block_length, draw_blocks
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import Staging
from nemo_minitron.importance.collect import Groups, collect
from nemo_minitron.importance.measure import (
    Kept,
    chosen_metrics,
    collect_by_layer,
    kept_tokens,
    rank_by_statistics,
    rank_by_walk,
)
from nemo_minitron.importance.metric import Metric
from nemo_minitron.importance.reconstruction import Compensation
from nemo_minitron.importance.scores import JSON, NPZ, Scores
from nemo_minitron.importance.scores_format import Ranking, statistic_sizes
from nemo_minitron.jobs.progress import progress_bar
from nemo_minitron.model.next_token import label_count

if TYPE_CHECKING:
    from nemo_minitron.nemo.model import MinitronGPTModel

Section = Mapping[str, Any]
"""A section of the config whose keys are NeMo's or Lightning's."""


def measure_and_save(
    source: Path,
    output: Path,
    calibration: Calibration,
    stream: bool,
    model: Section,
    trainer: Section,
    metrics: Sequence[str] = (),
) -> Scores:
    """Score a checkpoint and write the scores folder, from every rank of the job.

    Args:
        stream: read the checkpoint layer by layer, without NeMo and without a grid, instead of building the model.
        model, trainer: the run's sections; grid, tokenizer, devices and precision are read.
        metrics: further ones to rank by, beside ``minitron`` and, if ``calibration`` asks for it, ``reconstruction``.

    Returns:
        The scores, on every rank.

    Raises:
        MinitronError: before any weight is read: unwritable output, missing or too little data, tokens that the model
            does not have, a sequence or a grid that does not fit; later: NaN in weights or activations.
    """
    chosen = chosen_metrics(["minitron", *(["reconstruction"] if calibration.reconstruction else []), *metrics])
    staged = Staging(output, folder=True, replaceable=(JSON, NPZ)) if runtime.rank() == 0 else nullcontext()
    try:
        with staged as staging, NemoReader(source) as reader:
            drawn = draw_blocks(calibration, block_length(calibration, reader), reader, model.get("tokenizer"))
            precision = "32" if stream else str(Machines.of(trainer).precision)  # layers that are read run in no other
            if stream:
                _check_processes(drawn.tokens)
                arrays, counts = collect_by_layer(reader, drawn.tokens, drawn.counted)
            else:
                _check_grid(calibration, drawn.tokens, Grid.of(model))
                arrays, counts = collect_on_grid(source, drawn, calibration.micro_batch_size, model, trainer)
            rankings, kept, compensation = _rank(reader, drawn, calibration, chosen, arrays, counts)
            scores = Scores(
                shape=reader.shape,
                source_fingerprint=reader.fingerprint(),
                data_fingerprint=drawn.fingerprint,
                calibration={
                    **_record(calibration, drawn.tokens, precision, None if kept is None else kept.own),
                    **counts,
                },
                rankings=rankings,
                stream_moment=None if compensation is None else compensation.stream_moment,
                tokens=None if kept is None else kept.tokens.numpy(),
                counted=None if kept is None or kept.counted is None else kept.counted.numpy(),
                sensitivity=None if compensation is None else compensation.sensitivity,
                **{name: arrays[name] for name in statistic_sizes(reader.shape)},
            )
            if staging is not None:
                scores.write(staging.path)
    except OSError as error:
        raise MinitronError(f"output_path: cannot write '{output}': {error.strerror or error}") from None
    if staging is not None:
        all_of_them = "" if drawn.counted is None else f" that count, of {drawn.tokens.numel():,},"
        print(f"importance: {counts['tokens']:,} tokens{all_of_them} in {counts['samples']} samples -> {output}")
    return scores


def _rank(
    reader: NemoReader,
    drawn: Drawn,
    calibration: Calibration,
    metrics: Mapping[str, Metric],
    arrays: Mapping[str, np.ndarray],
    counts: Mapping[str, int],
) -> tuple[dict[str, Ranking], Kept | None, Compensation | None]:
    """Rankings by all of ``metrics``; where weights are to be re-solved, also what on and with what."""
    blocks, counted = drawn.tokens, drawn.counted
    rankings = rank_by_statistics(reader.shape, arrays, counts, metrics, label_count(blocks, counted))
    if len(rankings) == len(metrics):
        return rankings, None, None
    kept = kept_tokens(reader, blocks, calibration, counted)
    by_walk, compensation = rank_by_walk(reader, kept, metrics)
    if not calibration.reconstruction:  # they were ranked on, and nothing is to be re-solved on them
        return rankings | by_walk, None, None
    return rankings | by_walk, kept, compensation


def _record(calibration: Calibration, blocks: Tensor, precision: str, own: int | None) -> dict[str, str | int]:
    """How scores were measured, as they record it; ``own``: how many of their tokens' samples the model wrote."""
    return {
        "sequence": "mean",
        "batch": "l2",
        "seq_length": blocks.shape[1],
        "seed": calibration.seed,
        "precision": precision,
        **({} if own is None else {"own_samples": own}),
    }


def collect_on_grid(
    source: Path, drawn: Drawn, micro_batch_size: int, model: Section, trainer: Section
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Build the model on this job's grid and :func:`collect` on what was drawn, shared out to the data ranks."""
    ranks = Grid.of(model).data_ranks(runtime.world_size())
    batches = {"micro_batch_size": micro_batch_size, "global_batch_size": micro_batch_size * ranks}  # one for each rank
    built = load_for_forward(source, {**model, **batches}, trainer, drawn.tokens.shape[1])
    from megatron.core import parallel_state

    (stage,) = built.get_model_module_list()
    return collect(
        stage,
        _batches(drawn, micro_batch_size),
        built.shape,
        groups=Groups(
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
            parallel_state.get_data_parallel_group(),
        ),
        sequence_parallel=bool(stage.config.sequence_parallel),
        forward=lambda tokens: forward_micro_batch(stage, tokens, lambda logits: None),
    )


def _batches(drawn: Drawn, size: int) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
    """This data rank's micro-batches, with the positions that count where not all do."""
    if drawn.counted is None:
        yield from micro_batches(drawn.tokens, size, "importance")
        return
    for pair in micro_batches(torch.stack((drawn.tokens, drawn.counted.long()), dim=1), size, "importance"):
        yield pair[:, 0].contiguous(), pair[:, 1].bool()


def load_for_forward(source: Path, model: Section, trainer: Section, seq_length: int) -> MinitronGPTModel:
    """NeMo's model of a ``.nemo`` on this job's grid, to be run forward on sequences of ``seq_length``.

    On a GPU in bf16 the weights are bf16 too, unless ``model.megatron_amp_O2`` says otherwise: autocast would round
    float32 ones to it at every pass.

    Raises:
        MinitronError: as :func:`nemo_minitron.nemo.restore.load_model`.
    """
    runtime.prepare()
    from nemo_minitron.nemo.restore import load_model
    from nemo_minitron.nemo.trainer import inference_trainer

    machines = Machines.of(trainer)
    half_weights = machines.half and runtime.has_cuda()
    asked = {key: value for key, value in model.items() if value is not None}
    settings = {"megatron_amp_O2": half_weights, **asked, "precision": machines.precision}
    settings["encoder_seq_length"] = seq_length
    return load_model(source, inference_trainer(machines.precision, machines.devices, machines.num_nodes), settings)


def micro_batches(blocks: Tensor, size: int, description: str) -> Iterator[Tensor]:
    """This data rank's micro-batches of ``blocks [n, s]``, every n-th, on its device, with progress shown."""
    from megatron.core import parallel_state

    data = parallel_state.get_data_parallel_group()
    share = list(blocks.split(size))[torch.distributed.get_rank(data) :: parallel.size(data)]
    with progress_bar(len(share), description, "batch", show=runtime.rank() == 0) as bar:
        for batch in share:
            yield batch.contiguous().to(runtime.device())
            bar.update()


@torch.no_grad()
def forward_micro_batch(
    stage: torch.nn.Module, tokens: Tensor, reduce: Callable[[Tensor], Any], start: int = 0, **options: Any
) -> Any:
    """Run one micro-batch forward through all pipeline stages, by Megatron-Core's own schedule.

    Args:
        stage: this rank's part of the model.
        tokens: ``[b, s]`` int64, the same on all ranks of a TP x PP group.
        reduce: makes what is returned of the last stage's output: logits ``[b, s, Vp/t]``, or what ``options`` ask for.
        start: position of the first token.
        options: further arguments of the model's ``forward``.

    Returns:
        What ``reduce`` made on the last stage; None on the others.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    batch, length = tokens.shape
    positions = torch.arange(start, start + length, device=tokens.device).expand(batch, length)

    def forward_step(iterator: None, part: torch.nn.Module) -> tuple[Tensor, Any]:
        output = part(input_ids=tokens, position_ids=positions, attention_mask=None, **options)
        return output, lambda last: (last.new_zeros(()), reduce(last))  # the schedule divides its first by batches

    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=stage,
        num_microbatches=1,
        forward_only=True,
        seq_length=length,
        micro_batch_size=batch,
    )
    return found[0] if found else None


def _check_processes(blocks: Tensor) -> None:
    """Every process needs a block."""
    if len(blocks) < runtime.world_size():
        raise MinitronError(
            f"calibration.num_samples: {len(blocks)} blocks do not reach all {runtime.world_size()} processes"
        )


def _check_grid(calibration: Calibration, blocks: Tensor, grid: Grid) -> None:
    """Every data-parallel rank needs a micro-batch, every tensor-parallel rank an equal part of a split sequence."""
    ranks, micro, length = grid.data_ranks(runtime.world_size()), calibration.micro_batch_size, blocks.shape[1]
    if micro < 1:
        raise MinitronError(f"calibration.micro_batch_size: expected at least 1, found {micro}")
    if -(-len(blocks) // micro) < ranks:
        raise MinitronError(
            f"calibration.num_samples: {len(blocks)} blocks in micro-batches of {micro} do not reach all {ranks} "
            "data-parallel ranks"
        )
    if grid.sequence_parallel and length % grid.tensor:
        raise MinitronError(
            f"calibration.seq_length ({length}) must be a multiple of model.tensor_model_parallel_size ({grid.tensor}) "
            "under sequence_parallel"
        )
