"""Canonical tensors into the sharded weights of a checkpoint, in whatever folder and under whatever prefix it has them.

The padded vocabulary is that of the shape: rows beyond the true ones are zeros. Layers are stacked as Megatron-Core
stacks them, one chunk a layer, so that a load at any TP x PP finds what it asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoint.archive import ArchiveWriter
from nemo_minitron.checkpoint.canonical import Taken, checked_cast, tensor_digest
from nemo_minitron.checkpoint.distcp import DistcpWriter
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.layout import EXTRA_STATE_MODULES, LAYERS, Parameter, engine_states
from nemo_minitron.model.shape import ModelShape


class ShardedWeights:
    """Streams the canonical tensors of one model into an archive, each once and finite.

    Args:
        destination: where the checkpoint appears, for messages.
        folder: where the weights lie in the archive, ending in ``/``.
        prefix: of every key, such as ``model.``.
        common: what is not sharded.
        transformer_engine: whether to add the empty states that only Transformer Engine's modules ask for.

    Raises:
        MinitronError: from :meth:`write` and :meth:`close`, for a tensor of the wrong size, written twice, never, or
            with NaN or infinite values.
    """

    def __init__(
        self,
        archive: ArchiveWriter,
        shape: ModelShape,
        dtype: torch.dtype,
        destination: Path,
        *,
        folder: str,
        prefix: str,
        common: Mapping[str, Any] | None = None,
        transformer_engine: bool = False,
    ) -> None:
        self.shape, self.dtype, self._destination, self._prefix = shape, dtype, destination, prefix
        self._states = [*EXTRA_STATE_MODULES, *(engine_states(shape) if transformer_engine else ())]
        self._out = DistcpWriter(archive, folder, common)
        self._hashing = ThreadPoolExecutor(1)
        self._digests: dict[str, str] = {}
        self._taken = Taken(shape, destination)

    def write(self, parameter: Parameter, tensor: torch.Tensor, layer: int | None = None) -> None:
        """Write one canonical tensor, cast to the writer's dtype; a V-row table is padded with zeros to Vp."""
        name, size = self._taken.check(parameter, tensor, layer), parameter.size(self.shape)
        tensor = checked_cast(tensor, self.dtype, name)
        if tensor.shape[0] != size[0]:
            tensor = torch.cat([tensor, tensor.new_zeros(size[0] - tensor.shape[0], *size[1:])])
        digest = self._hashing.submit(tensor_digest, tensor)  # while it is written: neither holds the interpreter
        key = f"{self._prefix}{parameter.key}"
        if parameter.per_layer:
            depth = self.shape.num_layers
            if layer is None or not 0 <= layer < depth:
                raise MinitronError(f"{self._destination}: layer must be 0..{depth - 1} for '{name}', found {layer}")
            self.add(key, tensor.unsqueeze(0), (depth, *size), (layer, *(0 for _ in size)))
        else:
            self.add(key, tensor, size, (0,) * len(size))
        self._digests[name] = digest.result()
        self._taken.add(name)

    def add(self, key: str, tensor: torch.Tensor, size: tuple[int, ...], offsets: tuple[int, ...]) -> None:
        """Write one chunk under its whole key, as :meth:`nemo_minitron.checkpoint.distcp.DistcpWriter.add` does.

        What is added past :meth:`write` is no part of the model, and no check is made of it.
        """
        self._out.add(key, tensor, size, offsets)

    def close(self) -> dict[str, str]:
        """Check that every tensor is there, end the weights, and return the digests by tensor name."""
        self._hashing.shutdown()
        self._taken.check_all()
        depth = self.shape.num_layers
        for layer in range(depth):
            for module in self._states:
                if module.startswith(LAYERS):
                    self._out.add_empty_state(f"{self._prefix}{module}", layer, depth)
        for module in self._states:
            if not module.startswith(LAYERS):
                self._out.add_empty_state(f"{self._prefix}{module}", 0, 1)
        self._out.close()
        return self._digests

    def abort(self) -> None:
        """Release the file that was being written."""
        self._hashing.shutdown()
        self._out.abort()
