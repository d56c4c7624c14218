"""``.nemo`` files of Megatron-Core GPT models, as canonical tensors: lazy reading, streaming atomic writing.

A canonical tensor is unsharded, one layer's, with the size that ``layout.Parameter.size`` gives. Any grid that wrote
the file (TP, PP, Transformer Engine or local spec) reads the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoint import tokenizer_files
from nemo_minitron.checkpoint.archive import ArchiveWriter, open_archive, read_member
from nemo_minitron.checkpoint.canonical import (
    check_digest,
    each_tensor,
    fingerprint,
)
from nemo_minitron.checkpoint.distcp import WEIGHTS, read_index
from nemo_minitron.checkpoint.kinds import refuse_other_kinds
from nemo_minitron.checkpoint.nemo_config import SECTION, shape_from_nemo, update_shape, with_precision
from nemo_minitron.checkpoint.nemo_gate import check_config, tokenizer_model
from nemo_minitron.checkpoint.sharded import ShardedModel
from nemo_minitron.checkpoint.sharded_write import ShardedWeights
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import AllOrNothing
from nemo_minitron.files.text import JSON_LIMIT, YAML_LIMIT, check_yaml, parse_json, parse_yaml
from nemo_minitron.model.layout import Parameter
from nemo_minitron.model.shape import ModelShape

CONFIG = "model_config.yaml"
CHECKSUMS = "minitron/checksums.json"
_PREFIXES = ("model.module.", "model.")


class NemoReader:
    """Lazy, read-only view of a ``.nemo`` (tar, gzipped tar or folder); a context manager.

    Attributes:
        path: what was opened.
        config: ``model_config.yaml``.
        shape: V from the config, Vp from the stored table.
        dtype: the widest storage dtype among the model's tensors.

    Raises:
        MinitronError: not a ``.nemo``; zarr or legacy weights; hostile members; tensors missing or of other sizes than
            the config says; a model that is not Llama-like.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / CONFIG).is_file() and self.path.suffix != ".nemo":
            refuse_other_kinds(self.path, "a .nemo")
        self._archive = open_archive(self.path)
        try:
            self.config = self._read_config()
            index = read_index(self._archive, str(self.path))
            self._model = ShardedModel(self._archive, str(self.path), index, _PREFIXES)
            self.shape = shape_from_nemo(self.config, self._model.table_rows, where=f"{self.path}: {CONFIG}")
            self.dtype = self._model.check(self.shape)
        except BaseException:
            self._archive.close()
            raise
        self._fingerprint: str | None = None

    def _read_config(self) -> dict[str, Any]:
        if CONFIG not in self._archive.names():
            raise MinitronError(f"{self.path}: expected the member {CONFIG}, found none")
        config = parse_yaml(read_member(self._archive, CONFIG, YAML_LIMIT), f"{self.path}: {CONFIG}")
        check_config(config, self._archive.names(), f"{self.path}: {CONFIG}")
        return config

    def num_bytes(self) -> int:
        """Bytes of the model's tensors as stored."""
        return self._model.num_bytes()

    def tensor(self, parameter: Parameter, layer: int | None = None, rows: slice | None = None) -> torch.Tensor:
        """One canonical tensor in its storage dtype, or the ``rows`` of its first dimension.

        Only the chunks of this layer that overlap ``rows`` are read.
        """
        return self._model.tensor(parameter, layer, rows)

    def fingerprint(self, trust: bool = False) -> str:
        """sha256 over names, sizes, dtypes and bytes of the canonical tensors.

        The same for any archive kind, sharding and vocabulary padding (only the V true rows count). Reads every
        tensor once; kept for the life of the reader.

        Args:
            trust: take the sidecar's digests for all but the vocabulary tables, whose padding they count; not kept.
        """
        if self._fingerprint is None:
            sums = self.checksums() if trust else None
            found = fingerprint(self, sums)
            if sums is not None:
                return found
            self._fingerprint = found
        return self._fingerprint

    def checksums(self) -> dict[str, str] | None:
        """The sidecar's digests by tensor name; None where the file carries none (NeMo wrote it)."""
        if CHECKSUMS not in self._archive.names():
            return None
        return parse_json(read_member(self._archive, CHECKSUMS, JSON_LIMIT), f"{self.path}: {CHECKSUMS}")

    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer that is packed, as HF files or as NeMo's sentencepiece member; None without one.

        What ``tokenizer.type`` names lies elsewhere, and is not opened.
        """
        return tokenizer_files.unpack(self._archive, tokenizer_model(self.config))

    def save_tokenizer(self, folder: Path) -> bool:
        """False: a tokenizer that is packed lies in files, see :meth:`tokenizer_folder`."""
        return False

    @property
    def hf_config(self) -> Mapping[str, Any] | None:
        """``config.json`` of the model's source, which a file of ours keeps; None of NeMo's own."""
        return (self.config.get(SECTION) or {}).get("hf_config")

    @property
    def generation_config(self) -> Mapping[str, Any] | None:
        """``generation_config.json`` of the model's source, likewise."""
        return (self.config.get(SECTION) or {}).get("generation_config")

    def named_tokenizer(self) -> str | None:
        """Folder or hub name that ``tokenizer.type`` says; what lies there may be another model's by now."""
        return (self.config.get("tokenizer") or {}).get("type") or None

    def close(self) -> None:
        """Release the file."""
        self._archive.close()

    def __enter__(self) -> NemoReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def verify(path: str | Path) -> None:
    """Check every tensor of a ``.nemo`` against its sidecar.

    Raises:
        MinitronError: no sidecar, or the first tensor whose digest differs, by name.
    """
    with NemoReader(path) as reader:
        expected = reader.checksums()
        if expected is None:
            raise MinitronError(f"{path}: expected checksums in {CHECKSUMS}, found none (not written by minitron)")
        for parameter, layer in each_tensor(reader.shape):
            check_digest(path, expected, parameter, layer, reader.tensor(parameter, layer))


class NemoWriter(AllOrNothing):
    """Streams canonical tensors into a ``.nemo`` that NeMo's ``MegatronGPTModel.restore_from`` reads at any TP x PP.

    A context manager: on a clean exit it checks that every tensor of ``shape`` was written once, then renames the
    file into place; on an exception nothing is left behind. ``path`` ending in ``.nemo`` makes a tar, any other name a
    folder of the same members.

    Args:
        config: NeMo model config; the keys of the shape and the precision are brought into line with what is written.
        tokenizer: HF tokenizer folder to pack.
        extra_members: small members to add, by name; under ``minitron/`` NeMo ignores them.
        check: called with the path of the finished file before it is renamed into place.

    Raises:
        MinitronError: the destination cannot be written (before any work); a tensor of the wrong size, written twice,
            never, or with NaN or infinite values.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        shape: ModelShape,
        dtype: torch.dtype,
        *,
        tokenizer: Path | None = None,
        extra_members: Mapping[str, bytes] | None = None,
        check: Callable[[Path], None] | None = None,
    ) -> None:
        self.destination, self.shape, self.dtype = Path(path), shape, dtype
        self.config = with_precision(update_shape(_plain(config), shape), dtype)
        self._members = _name_members(self.config, tokenizer)
        self._tokenizer, self._extra = tokenizer, dict(extra_members or {})
        self._check = check
        self._archive = ArchiveWriter(path, shape.num_parameters(padded=True) * dtype.itemsize)
        try:
            text = _yaml(self.config)
            check_yaml(text, f"{self.destination}: {CONFIG}")  # what could not be read again must not be written
            self._archive.add(CONFIG, text)
            self._weights = ShardedWeights(
                self._archive, shape, dtype, self.destination, folder=WEIGHTS, prefix="model."
            )
        except BaseException:
            self._archive.abort()
            raise

    def write(self, parameter: Parameter, tensor: torch.Tensor, layer: int | None = None) -> None:
        """Write one canonical tensor, cast to the writer's dtype; a V-row table is padded with zeros to Vp."""
        self._weights.write(parameter, tensor, layer)

    def commit(self) -> None:
        """Check that the file is whole, end it, and have it appear."""
        digests = self._weights.close()
        if self._tokenizer is not None:
            tokenizer_files.pack(self._archive, self._tokenizer)
        for name, file in self._members.items():
            self._archive.add(name, file.read_bytes())
        self._archive.add(CHECKSUMS, json.dumps(digests, indent=1).encode())
        for name, data in self._extra.items():
            self._archive.add(name, data)
        finished = self._archive.end()
        if self._check is not None:
            self._check(finished)
        self._archive.commit()

    def abort(self) -> None:
        """Leave no trace."""
        self._weights.abort()
        self._archive.abort()


def _name_members(config: dict[str, Any], tokenizer: Path | None) -> dict[str, Path]:
    """Members that a config's tokenizer section names, for NeMo, with their files; names without a file are removed."""
    section, members = config.get("tokenizer") or {}, {}
    for key, value in section.items():
        if isinstance(value, str) and value.startswith("nemo:"):
            file = None if tokenizer is None else tokenizer / "tokenizer.model"
            if key in ("model", "tokenizer_model") and file is not None and file.is_file():
                members[value.removeprefix("nemo:")] = file
            else:
                section[key] = None
    return members


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    from omegaconf import DictConfig, OmegaConf

    if isinstance(config, DictConfig):
        return {str(k): v for k, v in OmegaConf.to_container(config, resolve=True).items()}  # type: ignore[union-attr]
    return dict(config)


def _yaml(config: Mapping[str, Any]) -> bytes:
    # OmegaConf's dumper quotes what its loader would read as a number, PyYAML's does not.
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dict(config))).encode()
