"""``minitron importance``: what each neuron, head, group, channel and layer of a ``.nemo`` is worth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from nemo_minitron.errors import MinitronError, required
from nemo_minitron.importance.scores import JSON, NPZ, Scores

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.checkpoint import NemoReader
    from nemo_minitron.model.shape import ModelShape


@dataclass(frozen=True)
class Calibration:
    """Which tokens the model sees; the names are the keys of ``calibration``.

    Attributes:
        data_prefix: ``.bin/.idx`` prefix, or NeMo's ``[w1, p1, w2, p2, …]``, whose weights share out the samples.
        path: text instead, tokenized with the model's own tokenizer.
        on_bad_record, split_special_tokens: of that text, as ``minitron preprocess`` has them.
        num_samples: unpadded blocks, drawn without replacement from the whole stream by ``seed``.
        seq_length: tokens per block; the model's ``encoder_seq_length`` when None.
        micro_batch_size: blocks per forward pass; changes speed and memory, not scores.
        reconstruction: also rank units by what is left once the others have been re-solved, and keep the tokens.
        reconstruction_tokens: of the drawn blocks, as many as have this many tokens serve for that, and are kept for
            compensation.
        own_samples: blocks that the model writes itself (:mod:`nemo_minitron.importance.own_text`), kept beside those;
            needs the whole model in one process's memory, under ``stream`` as well.
        stream: ``importance.stream``: read the checkpoint layer by layer instead of building the model.
    """

    data_prefix: Any = None
    path: str | None = None
    on_bad_record: str = "stop"
    split_special_tokens: bool = False
    num_samples: int = 1024
    seq_length: int | None = None
    micro_batch_size: int = 1
    seed: int = 1234
    reconstruction: bool = True
    reconstruction_tokens: int = 65536
    own_samples: int = 0
    stream: bool = False


def run(cfg: DictConfig) -> Scores:
    """Score ``model.restore_from_path`` on ``calibration`` and write the folder ``output_path``."""
    source, output = required(cfg, "model.restore_from_path"), required(cfg, "output_path")
    keys: Any = OmegaConf.to_container(cfg.calibration, resolve=True)
    calibration = Calibration(**keys, stream=bool(cfg.importance.stream))
    return measure_and_save(Path(source), calibration, Path(output), cfg.model, cfg.get("trainer") or {})


def measure_and_save(
    source: Path, calibration: Calibration, output: Path, model: Mapping[str, Any], trainer: Mapping[str, Any]
) -> Scores:
    """Measure a checkpoint and write the scores folder, from every rank of the job.

    Args:
        model: the run's ``model`` section (grid, sequence parallel); trainer: ``devices``, ``num_nodes``,
            ``precision``.

    Returns:
        The scores, on every rank.

    Raises:
        MinitronError: before any weight is read: unwritable output, missing or too little data, tokens that the model
            does not have, a sequence or a grid that does not fit; later: NaN in weights or activations.
    """
    from nemo_minitron import runtime
    from nemo_minitron.checkpoint import NemoReader
    from nemo_minitron.files.staging import Staging

    writes = runtime.rank() == 0
    staging = Staging(output, folder=True, replaceable=(JSON, NPZ)) if writes else None
    try:
        with NemoReader(source) as reader:
            length = _seq_length(calibration, reader)
            blocks, data = _blocks(calibration, length, reader, model)
            _check_grid(calibration, blocks, model)
            if calibration.stream:
                arrays, counts = _stream(reader, blocks)
            else:
                arrays, counts = _measure(source, reader.shape, blocks, calibration, {**model}, trainer)
            kept = _kept(reader, blocks, calibration) if calibration.reconstruction else None
            ranks, sensitivity = ({}, None) if kept is None else _rank(reader, kept)
            scores = Scores(
                shape=reader.shape,
                source_fingerprint=reader.fingerprint(),
                data_fingerprint=data,
                calibration={
                    "sequence": "mean",
                    "batch": "l2",
                    "seq_length": length,
                    "seed": calibration.seed,
                    "precision": str(trainer.get("precision", 32)),
                    **counts,
                },
                ranks=ranks,
                tokens=None if kept is None else kept.numpy(),
                sensitivity=sensitivity,
                **arrays,
            )
        if staging is not None:
            scores.write(staging.path)
            staging.commit()
            print(f"importance: {counts['tokens']:,} tokens in {counts['samples']} samples -> {output}")
    except BaseException as error:
        if staging is not None:
            staging.abort()
        if isinstance(error, OSError):
            raise MinitronError(f"output_path: cannot write '{output}': {error.strerror or error}") from None
        raise
    return scores


def _stream(reader: NemoReader, blocks: Tensor) -> tuple[dict[str, Any], dict[str, int]]:
    """The published scores, read layer by layer; all processes of the job share the samples, whatever their grid."""
    from tqdm import tqdm

    from nemo_minitron import parallel, runtime
    from nemo_minitron.importance.stream import stream_collect

    if runtime.world_size() > 1:
        runtime.init_distributed()
    world = parallel.world()
    mine = blocks[runtime.rank() :: parallel.size(world)].to(runtime.device())
    quiet = None if runtime.rank() == 0 else True
    with tqdm(total=len(mine) * reader.shape.num_layers, desc="importance", unit="layer", disable=quiet) as bar:
        return stream_collect(reader, mine, group=world, progress=bar.update)


def _kept(reader: NemoReader, blocks: Tensor, calibration: Calibration) -> Tensor:
    """Blocks that ranks and compensation rest on: of those drawn, and of the model's own, the same on every rank."""
    import torch
    from tqdm import tqdm

    from nemo_minitron import parallel, runtime
    from nemo_minitron.importance.own_text import write_samples

    drawn = blocks[: max(1, calibration.reconstruction_tokens // blocks.shape[1])]
    count = calibration.own_samples
    if count == 0:
        return drawn
    device, length = runtime.device(), blocks.shape[1]
    written = torch.zeros(count, length, dtype=torch.int64)
    if runtime.rank() == 0:
        with tqdm(total=length - 1, desc="own text", unit="token") as bar:
            written = write_samples(
                reader, count, length, seed=calibration.seed, device=device, dtype=reader.dtype, progress=bar.update
            )
    return torch.cat([drawn, parallel.broadcast(written.to(device), 0, parallel.world()).to(drawn)])


def _rank(reader: NemoReader, tokens: Tensor) -> tuple[dict[str, Any], Any]:
    """Ranks by reconstruction and sensitivity; all processes of the job share the samples, whatever their grid."""
    import torch
    from tqdm import tqdm

    from nemo_minitron import parallel, runtime
    from nemo_minitron.importance.reconstruction import clipped, rank_by_reconstruction

    world = parallel.world()
    quiet = None if runtime.rank() == 0 else True
    with tqdm(total=2 * reader.shape.num_layers, desc="ranks", unit="layer", disable=quiet) as bar:
        mine = slice(runtime.rank(), None, parallel.size(world))
        ranks, part = rank_by_reconstruction(
            reader, tokens[mine].to(runtime.device()), group=world, progress=bar.update
        )
    whole = torch.zeros(len(part), *tokens.shape, device=runtime.device())
    whole[:, mine] = torch.from_numpy(part).to(whole)
    return ranks, clipped(parallel.all_reduce(whole, world).cpu().numpy())


def _seq_length(calibration: Calibration, reader: NemoReader) -> int:
    longest = reader.shape.max_position_embeddings
    length = calibration.seq_length or int(reader.config.get("encoder_seq_length") or longest)
    if length > longest:
        raise MinitronError(f"calibration.seq_length: {length} asked, the model has {longest} positions")
    return length


def _check_grid(calibration: Calibration, blocks: Tensor, model: Mapping[str, Any]) -> None:
    """Every data-parallel rank needs a micro-batch, every tensor-parallel rank an equal part of a split sequence."""
    ranks, micro, length = _data_ranks(model), calibration.micro_batch_size, blocks.shape[1]
    if micro < 1:
        raise MinitronError(f"calibration.micro_batch_size: expected at least 1, found {micro}")
    if calibration.stream:
        from nemo_minitron import runtime

        if len(blocks) < runtime.world_size():
            raise MinitronError(
                f"calibration.num_samples: {len(blocks)} blocks do not reach all {runtime.world_size()} processes"
            )
        return
    if -(-len(blocks) // micro) < ranks:
        raise MinitronError(
            f"calibration.num_samples: {len(blocks)} blocks in micro-batches of {micro} do not reach all {ranks} "
            "data-parallel ranks"
        )
    tensor = int(model.get("tensor_model_parallel_size") or 1)
    if model.get("sequence_parallel") and length % tensor:
        raise MinitronError(
            f"calibration.seq_length ({length}) must be a multiple of model.tensor_model_parallel_size ({tensor}) "
            "under sequence_parallel"
        )


def _data_ranks(model: Mapping[str, Any]) -> int:
    from nemo_minitron import runtime

    tensor, pipeline = (int(model.get(f"{kind}_model_parallel_size") or 1) for kind in ("tensor", "pipeline"))
    return max(1, runtime.world_size() // (tensor * pipeline))


def _blocks(calibration: Calibration, length: int, reader: NemoReader, model: Mapping[str, Any]) -> tuple[Tensor, str]:
    """Token blocks ``[n, length]`` and the fingerprint of their data."""
    if (calibration.data_prefix is None) == (calibration.path is None):
        raise MinitronError(
            "calibration: expected one of calibration.data_prefix and calibration.path, found both or none"
        )
    if calibration.own_samples < 0:
        raise MinitronError(f"calibration.own_samples: expected 0 or more, found {calibration.own_samples}")
    if calibration.num_samples < 1:
        raise MinitronError(f"calibration.num_samples: expected at least 1, found {calibration.num_samples}")
    if calibration.path is None:
        return _draw(_parts(calibration), calibration, length, reader.shape)
    from nemo_minitron.checkpoint.tokenizer_open import choose
    from nemo_minitron.data.blocks import text_blocks
    from nemo_minitron.data.tokenizer import TokenizerSpec

    if not Path(calibration.path).exists():
        raise MinitronError(f"calibration.path: no file or folder '{calibration.path}'")
    folder = choose(reader, model.get("tokenizer"), "model.tokenizer")
    if folder is None:
        raise MinitronError(
            f"calibration.path: '{reader.path}' carries no tokenizer; give one with model.tokenizer.type, or give "
            "calibration.data_prefix"
        )
    drawn, fingerprint = text_blocks(
        calibration.path,
        TokenizerSpec("huggingface", str(folder), None, calibration.split_special_tokens),
        length,
        on_bad_record=calibration.on_bad_record,
        num_samples=calibration.num_samples,
        seed=calibration.seed,
        vocab_size=reader.shape.vocab_size,
    )
    return drawn[:, :-1], fingerprint


def _parts(calibration: Calibration) -> list[tuple[str, int]]:
    """Prefixes with the number of samples to draw from each; remainders go to the earlier ones."""
    given = calibration.data_prefix
    if isinstance(given, str | Path):
        return [(str(given), calibration.num_samples)]
    from nemo_minitron.data.blocks import split_lists

    blend = split_lists(
        list(given) if isinstance(given, list | tuple | ListConfig) else given, "calibration.data_prefix"
    )
    if isinstance(blend, dict):
        blend = blend["train"]
    if len(blend) == 1:
        return [(blend[0], calibration.num_samples)]
    if not isinstance(blend[0], float):
        raise MinitronError(f"calibration.data_prefix: several prefixes need weights, found {blend}")
    weights, prefixes = blend[::2], blend[1::2]
    shares = [int(calibration.num_samples * weight / sum(weights)) for weight in weights]
    for index in range(calibration.num_samples - sum(shares)):
        shares[index] += 1
    return [(prefix, share) for prefix, share in zip(prefixes, shares, strict=True) if share]


def _draw(
    parts: Iterable[tuple[str, int]], calibration: Calibration, length: int, shape: ModelShape
) -> tuple[Tensor, str]:
    import torch

    from nemo_minitron.data.blocks import token_blocks
    from nemo_minitron.data.tokens import data_fingerprint

    blocks: list[Tensor] = []
    facts: list[tuple[str, int]] = []
    for prefix, count in parts:
        drawn = token_blocks(prefix, length, num_samples=count, seed=calibration.seed, vocab_size=shape.vocab_size)
        blocks.append(drawn[:, :-1])  # the last token is only a label
        facts.append((data_fingerprint(prefix), count))
    if len(facts) == 1:
        return blocks[0], facts[0][0]
    return torch.cat(blocks), hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _measure(
    source: Path,
    shape: ModelShape,
    blocks: Tensor,
    calibration: Calibration,
    model_cfg: dict[str, Any],
    trainer_cfg: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, int]]:
    """Build the model on this job's grid and collect."""
    from nemo_minitron import runtime

    runtime.prepare()
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from nemo.utils import logging
    from tqdm import tqdm

    from nemo_minitron.importance.collect import Groups, collect
    from nemo_minitron.nemo.restore import load_model
    from nemo_minitron.nemo.trainer import inference_trainer

    precision = trainer_cfg.get("precision", 32)
    trainer = inference_trainer(precision, trainer_cfg.get("devices", 1), trainer_cfg.get("num_nodes", 1))
    settings = {
        **model_cfg,
        "precision": precision,
        "encoder_seq_length": blocks.shape[1],
        "micro_batch_size": calibration.micro_batch_size,
        "global_batch_size": calibration.micro_batch_size * _data_ranks(model_cfg),  # one micro-batch per rank
    }
    logging.setLevel(logging.ERROR)  # NeMo names every absent config key
    model = load_model(source, trainer, settings)
    (module,) = model.get_model_module_list()
    module.to(runtime.device())

    def step(tokens: Tensor, stage: Any) -> tuple[Tensor, Any]:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        output = stage(input_ids=tokens, position_ids=positions, attention_mask=None)
        return output, lambda logits: (logits.sum(), {})

    def forward(tokens: Tensor) -> None:
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=tokens,
            model=module,
            num_microbatches=1,
            forward_only=True,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
        )

    data = parallel_state.get_data_parallel_group()
    first, ranks = torch.distributed.get_rank(data), torch.distributed.get_world_size(data)
    batches = list(blocks.split(calibration.micro_batch_size))[first::ranks]
    bar = tqdm(batches, desc="importance", unit="batch", disable=None if runtime.rank() == 0 else True)
    return collect(
        module,
        (batch.contiguous().to(runtime.device()) for batch in bar),
        shape,
        groups=Groups(
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
            data,
        ),
        sequence_parallel=bool(module.config.sequence_parallel),
        forward=forward,
    )
