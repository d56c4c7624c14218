"""Between HF's tensors and the canonical fused ones, by the ``fuse`` column of the layout table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from nemo_minitron.model.layout import Parameter
from nemo_minitron.model.shape import ModelShape


def hf_part_rows(parameter: Parameter, shape: ModelShape) -> tuple[int, ...]:
    """Rows (length of dimension 0) of each HF tensor of ``parameter``, in the order of ``parameter.hf``.

    Tables of the vocabulary have V rows in HF, without Megatron's padding.
    """
    if parameter.fuse == "qkv":
        queries, keys = shape.proj_columns, shape.num_query_groups * shape.kv_channels
        return (queries, keys, keys)
    if parameter.fuse == "cat":
        return (shape.ffn_hidden_size,) * len(parameter.hf)
    size = parameter.size(shape)
    return (shape.vocab_size if parameter.axes[0] == "vocab" else size[0],)


def pieces(parameter: Parameter, shape: ModelShape) -> Iterator[tuple[int, slice, slice]]:
    """Runs of rows that lie together on both sides: (which HF tensor, its rows, rows of the canonical tensor).

    A file is so read into, and written from, a fused tensor without a copy of it. Rows of padding are in none.
    """
    counts = hf_part_rows(parameter, shape)
    if parameter.fuse == "qkv":
        width, groups = shape.kv_channels, shape.num_query_groups
        heights = [count // groups for count in counts]  # of a group's cell: its queries, its key, its value
        for part, height in enumerate(heights):
            before = sum(heights[:part])
            for group in range(groups):
                start = group * (shape.heads_per_group + 2) * width + before
                yield part, slice(group * height, (group + 1) * height), slice(start, start + height)
        return
    for part, count in enumerate(counts):
        yield part, slice(0, count), slice(part * count, (part + 1) * count)


def fuse(parameter: Parameter, parts: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
    """Join HF tensors, ``parts[i]`` of ``hf_part_rows(...)[i]`` rows, into the canonical tensor of one layer.

    QKV is group-major: (A·d, …), (G·d, …), (G·d, …) → ((A+2G)·d, …), each group's r query heads, its key, its value.
    A vocabulary table keeps V rows here; padding to Vp is the writer's.
    """
    if parameter.fuse == "copy":
        return parts[0]
    if parameter.fuse == "cat":
        return torch.cat(tuple(parts), dim=0)
    groups, width, rest = shape.num_query_groups, shape.kv_channels, parts[0].shape[1:]
    cells = [part.reshape(groups, -1, width, *rest) for part in parts]
    return torch.cat(cells, dim=1).reshape(-1, *rest)


def unfuse(parameter: Parameter, tensor: torch.Tensor, shape: ModelShape) -> tuple[torch.Tensor, ...]:
    """Split a canonical tensor into HF's, contiguous: the inverse of :func:`fuse`."""
    if parameter.fuse == "copy":
        return (tensor,)
    if parameter.fuse == "cat":
        return tuple(part.contiguous() for part in tensor.chunk(len(parameter.hf), dim=0))
    groups, per_group, width = shape.num_query_groups, shape.heads_per_group, shape.kv_channels
    cells = tensor.reshape(groups, per_group + 2, width, *tensor.shape[1:])
    split = (cells[:, :per_group], cells[:, per_group : per_group + 1], cells[:, per_group + 1 :])
    return tuple(part.reshape(-1, *tensor.shape[1:]).contiguous() for part in split)
