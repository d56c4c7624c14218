"""Weights between a ``.nemo`` and a NeMo model on any tensor x pipeline grid.

Reading goes straight from the archive, one canonical tensor at a time, cut for this rank; nothing is extracted and
nothing unpickled. Writing joins the shards of one tensor at a time, so peak memory beyond the model is one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_minitron import parallel, runtime
from nemo_minitron.checkpoint import NemoReader, NemoWriter
from nemo_minitron.errors import MinitronError
from nemo_minitron.model import layout
from nemo_minitron.model.shape import ModelShape

if TYPE_CHECKING:
    from nemo_minitron.nemo.anywhere import AnywhereGPTModel


def split(parameter: layout.Parameter, tensor: Tensor, rank: int, size: int) -> Tensor:
    """This tensor-parallel rank's part of a canonical tensor.

    ``gate_up`` is split within each half, so that a rank holds ``[gate_t; up_t]``; QKV splits by group because it is
    group-major.
    """
    if size == 1 or parameter.tp_dim is None:
        return tensor
    if parameter.axes[parameter.tp_dim] == layout.GATE_UP:
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(size, dim=parameter.tp_dim)[rank]


def join(parameter: layout.Parameter, part: Tensor, group: parallel.Group) -> Tensor:
    """Inverse of :func:`split` over the tensor-parallel group; every rank receives the canonical tensor."""
    size = parallel.size(group)
    if size == 1 or parameter.tp_dim is None:
        return part
    whole = parallel.all_gather(part, group, dim=parameter.tp_dim)
    if parameter.axes[parameter.tp_dim] == layout.GATE_UP:
        pieces = whole.chunk(2 * size)
        whole = torch.cat([*pieces[0::2], *pieces[1::2]])
    return whole


def pad_vocab(parameter: layout.Parameter, tensor: Tensor, rows: int) -> Tensor:
    """Bring a vocabulary table to ``rows`` rows: zero rows are added, surplus padding is cut."""
    if parameter.axes[0] != layout.VOCAB or tensor.shape[0] == rows:
        return tensor
    if tensor.shape[0] > rows:
        return tensor[:rows]
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])


@torch.no_grad()
def load(model: AnywhereGPTModel, reader: NemoReader) -> None:
    """Copy the checkpoint's weights into ``model`` (this rank's stages and shards), in the parameters' dtype.

    Raises:
        MinitronError: a tensor of the checkpoint holds NaN or infinity, or does not fit.
    """
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()

    def copy(parameter: layout.Parameter, layer: int | None, target: Tensor) -> None:
        whole = pad_vocab(parameter, reader.tensor(parameter, layer), model.padded_vocab_size)
        where = f"{reader.path}: {parameter.key}" + ("" if layer is None else f" of layer {layer}")
        if not torch.isfinite(whole).all():
            raise MinitronError(f"{where} holds NaN or infinity")
        part = split(parameter, whole, tp_rank, tp_size)
        if part.shape != target.shape:
            raise MinitronError(f"{where}: expected {tuple(target.shape)}, found {tuple(part.shape)}")
        target.copy_(part)

    _visit(model, reader.shape, copy)


@torch.no_grad()
def save(model: AnywhereGPTModel, path: Path, dtype: torch.dtype) -> None:
    """Write ``model`` as a ``.nemo`` at ``path`` (atomically, from rank 0) in ``dtype``; all ranks must call it.

    Raises:
        MinitronError: on rank 0, when the destination cannot be written or a weight is not finite.
    """
    shape = model.shape
    if torch.distributed.get_rank() != 0:
        for _ in gather(model):
            pass
    else:
        # the config is the source's: the run's grid, paths and stand-ins for missing libraries are no part of a model
        with NemoWriter(path, model.checkpoint_config, shape, dtype, tokenizer=model.tokenizer_folder) as writer:
            for parameter, layer, tensor in gather(model):
                writer.write(parameter, pad_vocab(parameter, tensor, shape.padded_vocab_size).to("cpu", dtype), layer)
    parallel.barrier()


@torch.no_grad()
def gather(
    model: AnywhereGPTModel, part_of: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[tuple[layout.Parameter, int | None, Tensor]]:
    """Canonical tensors of ``model``, one at a time, on rank 0 and every rank of its pipeline group.

    Shards are joined over the tensor-parallel group, then sent from their stage over the pipeline group. Vocabulary
    tables have the rows that this grid pads to. Every rank of the job must run through the iteration.

    Args:
        part_of: what to take of each parameter; its data by default, its gradient for instance.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    stage, stages = parallel_state.get_pipeline_model_parallel_rank(), parallel.size(pipeline)
    padded = model.shape.replace(padded_vocab_size=model.padded_vocab_size)
    held: dict[tuple[str, int | None], Tensor] = {}
    _visit(model, model.shape, lambda p, layer, t: held.__setitem__((p.key, layer), part_of(t)))
    for parameter, layer in layout.slots(model.shape):
        part = held.get((parameter.key, layer))
        holder = torch.tensor([stages if part is None else stage], device=runtime.device())
        owner = int(parallel.all_reduce(holder, pipeline, op="min"))  # the first stage that has it
        if part is not None and owner == stage:
            whole = join(parameter, part, group)
        else:
            whole = torch.empty(parameter.size(padded), device=runtime.device())
        yield parameter, layer, parallel.broadcast(whole.float().contiguous(), owner, pipeline) if stages > 1 else whole


def _visit(
    model: AnywhereGPTModel, shape: ModelShape, action: Callable[[layout.Parameter, int | None, Tensor], None]
) -> None:
    """Call ``action`` on every parameter that this rank holds, with its canonical row and global layer number."""
    (module,) = model.get_model_module_list()
    local = dict(module.named_parameters())
    first = module.decoder.layers[0].layer_number - 1 if len(module.decoder.layers) else 0
    tied_copy = shape.share_embeddings_and_output_weights and not module.pre_process
    for parameter in layout.parameters(shape):
        layers: list[int | None] = [None]
        if parameter.per_layer:
            layers = [first + i for i in range(len(module.decoder.layers))]
        for layer in layers:
            index = None if layer is None else layer - first
            name = next((n for n in (parameter.memory_name(index, local=f) for f in (True, False)) if n in local), None)
            if parameter is layout.EMBEDDING and name is None and tied_copy and module.post_process:
                name = layout.OUTPUT.key  # the last stage's copy of the tied table
            if name is not None:
                action(parameter, layer, local[name])
            elif parameter.per_layer:
                raise MinitronError(f"the model has no parameter {parameter.memory_name(index)}")
