"""The model in a torch_dist checkpoint as canonical tensors, whatever grid, prefix and layer specification wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from nemo_minitron.checkpoint.archive import Archive
from nemo_minitron.checkpoint.canonical import each_tensor, tensor_name
from nemo_minitron.checkpoint.distcp import STORAGE_DTYPES, Stored, read_tensor, stored_bytes
from nemo_minitron.checkpoint.keys import has_no_place, other_head
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.layout import EMBEDDING, OUTPUT, Parameter, parameters
from nemo_minitron.model.shape import ModelShape

_ROWS = 4096  # of two tables that are compared


class ShardedModel:
    """Stored tensors by canonical key; canonical tensors once :meth:`check` has been told their shape.

    Args:
        where: the file or folder, in messages.
        index: every tensor by its full key.
        prefixes: beginnings of the model's keys, the longest first; each key is stripped of the first that it has.

    Raises:
        MinitronError: a tensor that is there under two prefixes, or no embedding table.
    """

    def __init__(self, archive: Archive, where: str, index: Mapping[str, Stored], prefixes: Sequence[str]) -> None:
        self._archive, self._where = archive, where
        self._prefix = prefixes[-1] if prefixes else ""
        self.index: dict[str, tuple[str, Stored]] = {}
        for key, stored in index.items():
            name = next((key.removeprefix(prefix) for prefix in prefixes if key.startswith(prefix)), key)
            if name in self.index:
                other = self.index[name][0]
                raise MinitronError(f"{where}: tensor '{key}' must be there once, found also '{other}'")
            self.index[name] = (key, stored)
        self.table_rows: int = (*self.stored(EMBEDDING, None)[1].size, 0)[0]

    def stored(self, parameter: Parameter, layer: int | None) -> tuple[str, Stored, bool]:
        """Full key, entry, and whether layers are stacked in it (they are not in heterogeneous models)."""
        if parameter.key in self.index:
            return (*self.index[parameter.key], parameter.per_layer)
        name = tensor_name(parameter, layer)
        if name in self.index:
            return (*self.index[name], False)
        raise MinitronError(f"{self._where}: expected the tensor '{self._prefix}{parameter.key}', found none")

    def check(self, shape: ModelShape, tied_by: str = "share_embeddings_and_output_weights") -> torch.dtype:
        """Compare every tensor with ``shape``; return the widest storage dtype.

        Args:
            tied_by: the key of the config that ties the head, in messages.

        Raises:
            MinitronError: tensors missing, of other sizes or dtypes, or unknown; a head that differs from the table
                that it is tied to.
        """
        self._shape = shape
        dtype, unknown = None, {key for key, _ in self.index.values()}
        for parameter, layer in each_tensor(shape):
            key, stored, stacked = self.stored(parameter, layer)
            unknown.discard(key)
            expected = ((shape.num_layers,) if stacked else ()) + parameter.size(shape)
            if stored.size != expected:
                raise MinitronError(f"{self._where}: tensor '{key}' must have the size {expected}, found {stored.size}")
            if stored.dtype not in STORAGE_DTYPES:
                raise MinitronError(
                    f"{self._where}: tensor '{key}' must be float32, bfloat16 or float16, found {stored.dtype}"
                )
            dtype = stored.dtype if dtype is None else torch.promote_types(dtype, stored.dtype)
        if shape.share_embeddings_and_output_weights and OUTPUT.key in self.index:
            unknown.discard(self.index[OUTPUT.key][0])
            self._check_tied_head(tied_by)
        if unknown:
            raise has_no_place(self._where, min(unknown), [row.key for row in parameters(shape)])
        assert dtype is not None
        return dtype

    def _check_tied_head(self, tied_by: str) -> None:
        """Refuse a head beside a table that it is tied to by the config, but differs from."""
        (key, head), (_, table) = self.index[OUTPUT.key], self.index[EMBEDDING.key]
        same = (head.size, head.dtype) == (table.size, table.dtype)
        for start in range(0, self._shape.vocab_size if same else 0, _ROWS):
            rows = slice(start, min(start + _ROWS, self._shape.vocab_size))
            one, other = (self.tensor(row, None, rows).contiguous().view(torch.uint8) for row in (OUTPUT, EMBEDDING))
            same = same and torch.equal(one, other)
        if not same:
            raise other_head(self._where, key, tied_by)

    def num_bytes(self) -> int:
        """Bytes of the model's tensors as stored."""
        return stored_bytes({key: stored for key, stored in self.index.values()})

    def tensor(self, parameter: Parameter, layer: int | None = None, rows: slice | None = None) -> torch.Tensor:
        """One canonical tensor in its storage dtype, or the ``rows`` of its first dimension.

        Only the chunks of this layer that overlap ``rows`` are read.
        """
        key, stored, stacked = self.stored(parameter, layer)
        size = parameter.size(self._shape)
        start, stop, step = (rows or slice(None)).indices(size[0])
        if step != 1:
            raise ValueError("rows must have step 1")
        window = (slice(start, max(start, stop)), *(slice(0, n) for n in size[1:]))
        if stacked:
            if layer is None or not 0 <= layer < self._shape.num_layers:
                raise MinitronError(f"{self._where}: layer must be 0..{self._shape.num_layers - 1}, found {layer}")
            return read_tensor(self._archive, key, stored, (slice(layer, layer + 1), *window))[0]
        return read_tensor(self._archive, key, stored, window)
