"""The only module that issues collectives. Groups are always arguments; ``None`` or a group of one is the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_minitron.errors import MinitronError

Group = dist.ProcessGroup | None
_T = TypeVar("_T")

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def size(group: Group) -> int:
    """Members of ``group``; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def rank(group: Group) -> int:
    """Number of this process in ``group``; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def world() -> Group:
    """All processes of the job; None where there is no job."""
    return dist.group.WORLD if dist.is_initialized() else None


def all_reduce(tensor: Tensor, group: Group, op: str = "sum") -> Tensor:
    """Reduce ``tensor`` (any shape, not changed in place) over ``group`` by ``sum``, ``max`` or ``min``.

    Every rank receives the same bits. No gradient flows through.
    """
    if size(group) == 1:
        return tensor
    result = tensor.detach().clone().contiguous()
    dist.all_reduce(result, op=_OPS[op], group=group)
    return result


def all_gather(tensor: Tensor, group: Group, dim: int = 0) -> Tensor:
    """Concatenate each rank's equally sized ``tensor`` along ``dim``, in rank order of ``group``."""
    if size(group) == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(size(group))]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def reduce_scatter(tensor: Tensor, group: Group) -> Tensor:
    """Sum ``tensor`` ``[n, …]`` over ``group``; each rank receives its equal part ``[n/size, …]`` of dimension 0."""
    if size(group) == 1:
        return tensor
    part = tensor.new_empty(tensor.shape[0] // size(group), *tensor.shape[1:])
    dist.reduce_scatter_tensor(part, tensor.detach().contiguous(), group=group)
    return part


def broadcast(tensor: Tensor, source: int, group: Group) -> Tensor:
    """Give every rank of ``group`` the tensor of the rank at position ``source`` in it; overwrites ``tensor``."""
    if size(group) > 1:
        dist.broadcast(tensor, src=dist.get_global_rank(group, source), group=group)  # type: ignore[arg-type]
    return tensor


def barrier(group: Group = None) -> None:
    """Wait for every rank of ``group`` (None: of the job, if there is one)."""
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.barrier(group)


def from_first(compute: Callable[[], _T]) -> _T:
    """What rank 0 of the job computes, on every rank; must be called by all.

    Raises:
        MinitronError: on every rank, where rank 0 raised it.
    """
    if size(world()) == 1:
        return compute()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = compute()
        except MinitronError as error:
            found[1] = error
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def is_first() -> bool:
    """Whether this is rank 0 of the job."""
    return not dist.is_initialized() or dist.get_rank() == 0
