"""Checkpoints of Megatron-Bridge, Megatron-LM and NeMo 2: the same sharded weights in three dresses.

Each is a folder that its tool loads at any TP x PP. Nothing of the tool is imported: what describes the model is
plain data, a file for each dress. What we know beyond it, the checksums and HF's configs, lies under ``minitron/``,
where no tool looks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoint import bridge_config, megatron_args, nemo2_context, tokenizer_files
from nemo_minitron.checkpoint.archive import ArchiveWriter
from nemo_minitron.checkpoint.sharded_write import ShardedWeights
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import AllOrNothing
from nemo_minitron.model.parameter import Parameter
from nemo_minitron.model.shape import ModelShape

CHECKSUMS, HF_CONFIG, GENERATION_CONFIG = "checksums.json", "hf_config.json", "generation_config.json"
SIDECAR = "minitron/"
_TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Described:
    """What a dress is made from.

    Attributes:
        divisor: ``make_vocab_size_divisible_by`` that led to the shape's Vp at TP=1.
        tokenizer: where the tokenizer's folder is going to lie; None without one.
        where: the destination, for messages.
    """

    shape: ModelShape
    dtype: torch.dtype
    divisor: int
    tokenizer: str | None
    where: str


@dataclass(frozen=True)
class Dress:
    """One way to lay a Megatron checkpoint out.

    Attributes:
        weights: folder of the weights, ending in ``/``.
        prefix: of every key.
        tokenizer: folder of the tokenizer, ending in ``/``.
        sidecar: folder of what is ours, ending in ``/``.
        replaceable: names at the top of an earlier output.
        common: the common state.
        files: small files by name.
    """

    weights: str
    prefix: str
    tokenizer: str
    sidecar: str
    replaceable: tuple[str, ...]
    common: Callable[[Described], dict[str, Any]]
    files: Callable[[Described], dict[str, bytes]]


def _bridge_files(model: Described) -> dict[str, bytes]:
    config = bridge_config.run_config(model.shape, model.dtype, model.divisor, model.tokenizer, model.where)
    state = bridge_config.train_state()
    return {
        f"iter_0000000/{bridge_config.RUN_CONFIG}": _yaml(config),
        f"iter_0000000/{bridge_config.TRAIN_STATE}": state,
        f"latest_{bridge_config.TRAIN_STATE}": state,
        _TRACKER: b"0",
    }


def _nemo2_files(model: Described) -> dict[str, bytes]:
    call = nemo2_context.model_call(model.shape, model.dtype, model.divisor, model.tokenizer is not None, model.where)
    return {"context/io.json": nemo2_context.io_json(call), "context/model.yaml": nemo2_context.model_yaml(call)}


def _megatron_common(model: Described) -> dict[str, Any]:
    return megatron_args.common_state(model.shape, model.dtype, model.divisor, model.tokenizer, model.where)


DRESSES = {
    "bridge": Dress(
        weights="iter_0000000/",
        prefix="",
        tokenizer="iter_0000000/tokenizer/",
        sidecar=f"iter_0000000/{SIDECAR}",
        replaceable=("iter_0000000", f"latest_{bridge_config.TRAIN_STATE}", _TRACKER),
        common=lambda _: {"iteration": 0, "checkpoint_version": megatron_args.VERSION},
        files=_bridge_files,
    ),
    "megatron": Dress(
        weights="release/",
        prefix="",
        tokenizer="release/tokenizer/",
        sidecar=f"release/{SIDECAR}",
        replaceable=("release", _TRACKER),
        common=_megatron_common,
        files=lambda _: {_TRACKER: b"release"},
    ),
    "nemo2": Dress(
        weights="weights/",
        prefix="module.",
        tokenizer=f"context/{nemo2_context.TOKENIZER}/",
        sidecar=SIDECAR,
        replaceable=("context", "weights", "minitron"),
        common=lambda _: {},
        files=_nemo2_files,
    ),
}


class MegatronWriter(AllOrNothing):
    """Streams canonical tensors into a folder that Megatron-Bridge, Megatron-LM or NeMo 2 loads.

    The guarantees are those of :class:`nemo_minitron.checkpoint.NemoWriter`. An existing folder is replaced only where
    it holds an earlier output of this writer and nothing else.

    Args:
        dress: a key of :data:`DRESSES`.
        shape: with the rows of the table at TP=1 as Vp.
        divisor: ``make_vocab_size_divisible_by`` that led to them.
        tokenizer: HF tokenizer folder to copy.
        hf_config, generation_config: of the model that this one came from, kept beside it.
        transformer_engine: whether to write the empty states that only Transformer Engine's modules ask for.
        check: called with the path of the finished folder before it is renamed into place.

    Raises:
        MinitronError: a shape that the dress cannot describe, or a destination that cannot be written, before any
            work; a tensor of the wrong size, written twice, never, or with NaN or infinite values.
    """

    def __init__(
        self,
        path: str | Path,
        dress: str,
        shape: ModelShape,
        dtype: torch.dtype,
        *,
        divisor: int,
        tokenizer: Path | None = None,
        hf_config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
        transformer_engine: bool = False,
        check: Callable[[Path], None] | None = None,
    ) -> None:
        self.destination, self.shape, self.dtype = Path(path), shape, dtype
        self._dress, self._tokenizer, self._check = DRESSES[dress], tokenizer, check
        lies = None if tokenizer is None else str(self.destination.absolute() / self._dress.tokenizer.rstrip("/"))
        model = Described(shape, dtype, divisor, lies, str(self.destination))
        self._files = self._dress.files(model)
        common = self._dress.common(model)
        self._ours = {HF_CONFIG: hf_config, GENERATION_CONFIG: generation_config}
        self._refuse_others()
        room = shape.num_parameters(padded=True) * dtype.itemsize
        self._archive = ArchiveWriter(path, room, self._dress.replaceable)
        try:
            self._weights = ShardedWeights(
                self._archive,
                shape,
                dtype,
                self.destination,
                folder=self._dress.weights,
                prefix=self._dress.prefix,
                common=common,
                transformer_engine=transformer_engine,
            )
        except BaseException:
            self._archive.abort()
            raise

    def _refuse_others(self) -> None:
        """Leave alone what has the names of our output, but is a training's."""
        if self.destination.suffix in (".nemo", ".tar", ".gguf"):
            raise MinitronError(f"{self.destination}: expected the name of a folder, found that of a file")
        there = self.destination / self._dress.weights
        if there.exists() and not (self.destination / self._dress.sidecar / CHECKSUMS).is_file():
            raise MinitronError(
                f"{self.destination}: expected an empty folder or an earlier output to replace, found a checkpoint "
                "that minitron did not write"
            )

    def write(self, parameter: Parameter, tensor: torch.Tensor, layer: int | None = None) -> None:
        """Write one canonical tensor, cast to the writer's dtype; a V-row table is padded with zeros to Vp."""
        self._weights.write(parameter, tensor, layer)

    def commit(self) -> None:
        """Check that the checkpoint is whole, complete it, and have it appear."""
        digests = self._weights.close()
        if self._tokenizer is not None:
            tokenizer_files.pack(self._archive, self._tokenizer, self._dress.tokenizer)
        for name, data in self._files.items():
            self._archive.add(name, data)
        for name, content in {**self._ours, CHECKSUMS: digests}.items():
            if content is not None:
                self._archive.add(self._dress.sidecar + name, json.dumps(dict(content), indent=1).encode())
        finished = self._archive.end()
        if self._check is not None:
            self._check(finished)
        self._archive.commit()

    def abort(self) -> None:
        """Leave no trace."""
        self._weights.abort()
        self._archive.abort()


def _yaml(content: Mapping[str, Any]) -> bytes:
    import yaml

    return yaml.safe_dump(dict(content), sort_keys=False).encode()
