"""HF folders (and GGUF files) as canonical tensors: the same reading and writing interface as a ``.nemo``'s."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from nemo_minitron.checkpoint import tokenizer_files
from nemo_minitron.checkpoint.canonical import checked_cast, each_tensor, fingerprint, raw_bytes, tensor_name
from nemo_minitron.checkpoint.fuse import fuse, hf_part_rows, unfuse
from nemo_minitron.checkpoint.hf_config import hf_config_from_shape, shape_from_hf
from nemo_minitron.checkpoint.keys import has_no_place, other_head
from nemo_minitron.checkpoint.kinds import refuse_other_kinds
from nemo_minitron.checkpoint.safetensors_folder import CODES, SafetensorsFolder
from nemo_minitron.config.schema import ConvertConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import AllOrNothing, Staging
from nemo_minitron.model.layout import EMBEDDING, OUTPUT, VOCAB, Parameter, parameters
from nemo_minitron.model.shape import ModelShape

_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


class TensorSource(Protocol):
    """HF-named tensors with their model's config, wherever they come from."""

    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    sizes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def get(self, name: str) -> torch.Tensor:
        """One tensor, as HF has it."""

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors are the same, bit by bit."""

    def tokenizer_folder(self) -> Path | None:
        """Folder with tokenizer files, None where they must be made first."""

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer as a HF folder."""

    def close(self) -> None:
        """Release files."""


class HfReader:
    """Lazy, read-only view of a HF folder or of a GGUF file, as canonical tensors; a context manager.

    Attributes:
        path: what was opened.
        hf_config: ``config.json`` (built from its metadata for a GGUF); ``generation_config``: its file, or None.
        shape: V = Vp = the rows of HF's table.
        dtype: the widest storage dtype among the tensors (float32 for a GGUF, which is dequantised).

    Raises:
        MinitronError: no such folder, an unsupported architecture or feature, a missing, unknown, truncated or
            wrongly sized tensor.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._source = _open_source(self.path)
        try:
            self.hf_config, self.generation_config = self._source.config, self._source.generation_config
            self.shape = shape_from_hf(self.hf_config, f"{self.path}: config.json")
            self.dtype = self._check_tensors()
        except BaseException:
            self._source.close()
            raise

    def _check_tensors(self) -> torch.dtype:
        dtype, unknown = None, set(self._source.sizes)
        for parameter, layer in each_tensor(self.shape):
            rows = hf_part_rows(parameter, self.shape)
            for name, count in zip(parameter.hf, rows, strict=True):
                name = name.format(l=layer)
                expected = (count, *parameter.size(self.shape)[1:])
                if name not in self._source.sizes:
                    raise MinitronError(f"{self.path}: expected the tensor '{name}', found none")
                if self._source.sizes[name] != expected:
                    raise MinitronError(
                        f"{self.path}: tensor '{name}' must have the size {expected}, found {self._source.sizes[name]}"
                    )
                found = self._source.dtypes[name]
                dtype = found if dtype is None else torch.promote_types(dtype, found)
                unknown.discard(name)
        if self.shape.share_embeddings_and_output_weights and (head := OUTPUT.hf[0]) in unknown:
            unknown.discard(head)
            if not self._source.equal(head, EMBEDDING.hf[0]):
                raise other_head(f"{self.path}", head, "tie_word_embeddings")
        unknown = {name for name in unknown if not _IGNORED.fullmatch(name)}
        if unknown:
            places = [name.replace("{l}", "N") for row in parameters(self.shape) for name in row.hf]
            raise has_no_place(f"{self.path}", min(unknown), places)
        assert dtype is not None
        return dtype

    @property
    def is_gguf(self) -> bool:
        """Whether the tokenizer must be made by :meth:`save_tokenizer`."""
        return not isinstance(self._source, SafetensorsFolder)

    def num_bytes(self) -> int:
        """Bytes of the model's tensors in :attr:`dtype`."""
        return self.shape.num_parameters() * self.dtype.itemsize

    def tensor(self, parameter: Parameter, layer: int | None = None, rows: slice | None = None) -> torch.Tensor:
        """One canonical tensor in its storage dtype, or the ``rows`` of its first dimension; tables have V rows."""
        parts = [self._source.get(name.format(l=layer)) for name in parameter.hf]
        tensor = fuse(parameter, parts, self.shape)
        return tensor if rows is None else tensor[rows]

    def fingerprint(self) -> str:
        """Fingerprint of the weights, equal to that of a ``.nemo`` with the same weights in the same dtype."""
        return fingerprint(self)

    def tokenizer_folder(self) -> Path | None:
        """The HF folder itself; None for a GGUF, whose tokenizer :meth:`save_tokenizer` writes, and without one."""
        return self._source.tokenizer_folder()

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files into an existing folder."""
        self._source.save_tokenizer(folder)

    def close(self) -> None:
        """Release the files."""
        self._source.close()

    def __enter__(self) -> HfReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _open_source(path: Path) -> TensorSource:
    if not path.exists():
        raise MinitronError(f"{path}: expected a HF folder or a .gguf file, found none")
    if not (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        refuse_other_kinds(path, "a HF folder with config.json, or one .gguf file")
    if path.is_dir() and (path / "config.json").is_file():
        return SafetensorsFolder(path)
    ggufs = sorted(path.glob("*.gguf")) if path.is_dir() else [path] if path.suffix == ".gguf" else []
    if len(ggufs) != 1:
        raise MinitronError(f"{path}: expected a HF folder with config.json, or one .gguf file, found neither")
    from nemo_minitron.checkpoint.gguf import GgufFile

    return GgufFile(ggufs[0])


NO_TOKENIZER = "tokenizer.missing.txt"
_CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")  # they name code, which does not go with a model


class HfWriter(AllOrNothing):
    """Streams canonical tensors into a HF folder; a context manager with the guarantees of :class:`NemoWriter`.

    Shards are laid out beforehand from the shape alone, so each tensor goes straight to its place: memory holds one
    tensor at a time. One file is ``model.safetensors``; several are ``model-0000i-of-0000n.safetensors`` with
    ``model.safetensors.index.json``.

    Args:
        hf_config: the source's ``config.json``, of which only fields that ``shape`` or ``dtype`` change are replaced;
            a plain Llama config is made when None.
        generation_config: written as it is; not written when None.
        tokenizer: folder whose tokenizer files are copied.
        without_tokenizer: says, where there is none, why; written as ``tokenizer.missing.txt``.
        token_ids: ``eos_token_id`` and its like for a config that is made.
        max_shard_size: bytes, or a number with a unit as HF has it (``"5GB"``).
        check: called with the path of the finished folder before it is renamed into place.
    """

    _PATTERNS = (
        *tokenizer_files.FILES,
        NO_TOKENIZER,
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-*-of-*.safetensors",
        "model.safetensors.index.json",
    )

    def __init__(
        self,
        folder: str | Path,
        hf_config: Mapping[str, Any] | None,
        shape: ModelShape,
        dtype: torch.dtype,
        *,
        generation_config: Mapping[str, Any] | None = None,
        tokenizer: Path | None = None,
        without_tokenizer: str = "",
        token_ids: Mapping[str, int | None] | None = None,
        max_shard_size: int | str = ConvertConfig.max_shard_size,
        check: Callable[[Path], None] | None = None,
    ) -> None:
        self.destination, self.shape, self.dtype = Path(folder), shape, dtype
        made = hf_config_from_shape(shape, dtype, hf_config)
        if hf_config is None:
            made |= dict(token_ids or {})
        self._config = {key: value for key, value in made.items() if key not in _CODE_KEYS}
        self._why_none = without_tokenizer
        self._generation, self._tokenizer = generation_config, tokenizer
        self._shards = _plan_shards(shape, dtype, parse_size(max_shard_size))
        self._check = check
        self._written: set[str] = set()
        room = shape.num_parameters() * dtype.itemsize
        self._staging = Staging(folder, folder=True, replaceable=self._PATTERNS, room=room)
        self._stack = ExitStack()
        self._places: dict[str, tuple[IO[bytes], int]] = {}
        try:
            for number, names in enumerate(self._shards, start=1):
                self._start_shard(self._file_name(number), names)
        except BaseException:
            self.abort()
            raise

    def _file_name(self, number: int) -> str:
        total = len(self._shards)
        return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"

    def _start_shard(self, file: str, sizes: dict[str, tuple[int, ...]]) -> None:
        stream = self._stack.enter_context((self._staging.path / file).open("wb"))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, size in sizes.items():
            end = at + math.prod(size) * self.dtype.itemsize
            header[name] = {"dtype": CODES[self.dtype], "shape": list(size), "data_offsets": [at, end]}
            at = end
        blob = json.dumps(header, separators=(",", ":")).encode()
        blob += b" " * (-len(blob) % 8)
        stream.write(len(blob).to_bytes(8, "little") + blob)
        for name in sizes:
            self._places[name] = (stream, 8 + len(blob) + header[name]["data_offsets"][0])

    def write(self, parameter: Parameter, tensor: torch.Tensor, layer: int | None = None) -> None:
        """Write one canonical tensor, cast to the writer's dtype, as HF's; of a table only the V true rows."""
        name, size = tensor_name(parameter, layer), parameter.size(self.shape)
        unpadded = (self.shape.vocab_size, *size[1:])
        if tuple(tensor.shape) not in ((size, unpadded) if parameter.axes[0] == VOCAB else (size,)):
            found = tuple(tensor.shape)
            raise MinitronError(f"{self.destination}: tensor '{name}' must have the size {size}, found {found}")
        if name in self._written:
            raise MinitronError(f"{self.destination}: tensor '{name}' must be written once, found a second write")
        if parameter.axes[0] == VOCAB:
            tensor = tensor[: self.shape.vocab_size]
        tensor = checked_cast(tensor, self.dtype, name)
        for hf_name, part in zip(parameter.hf, unfuse(parameter, tensor, self.shape), strict=True):
            stream, start = self._places[hf_name.format(l=layer)]
            stream.seek(start)
            stream.write(raw_bytes(part))
        self._written.add(name)

    def commit(self) -> None:
        """Check that the folder is whole, complete it, and have it appear."""
        missing = [n for p, layer in each_tensor(self.shape) if (n := tensor_name(p, layer)) not in self._written]
        if missing:
            raise MinitronError(
                f"{self.destination}: expected every tensor, found none for '{missing[0]}' (of {len(missing)})"
            )
        self._stack.close()
        folder = self._staging.path
        _write_json(folder / "config.json", self._config)
        if self._generation is not None:
            _write_json(folder / "generation_config.json", self._generation)
        if self._tokenizer is not None:
            tokenizer_files.copy_tokenizer(self._tokenizer, folder)
        elif self._why_none:
            (folder / NO_TOKENIZER).write_text(self._why_none + "\n", encoding="utf-8")
        if len(self._shards) > 1:
            places = {name: self._file_name(i) for i, names in enumerate(self._shards, start=1) for name in names}
            total = sum(math.prod(size) for names in self._shards for size in names.values()) * self.dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            _write_json(folder / "model.safetensors.index.json", index)
        if self._check is not None:
            self._check(folder)
        self._staging.commit()

    def abort(self) -> None:
        """Leave no trace."""
        with suppress(OSError):  # what is still to be flushed may not fit either
            self._stack.close()
        self._staging.abort()


def _plan_shards(shape: ModelShape, dtype: torch.dtype, limit: int) -> list[dict[str, tuple[int, ...]]]:
    """Sizes of the HF tensors of each shard, in forward order; a tensor larger than the limit has its own."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for parameter, layer in each_tensor(shape):
        for name, rows in zip(parameter.hf, hf_part_rows(parameter, shape), strict=True):
            size = (rows, *parameter.size(shape)[1:])
            count = math.prod(size) * dtype.itemsize
            if shards[-1] and used + count > limit:
                shards.append({})
                used = 0
            shards[-1][name.format(l=layer)] = size
            used += count
    return shards


def parse_size(size: int | str) -> int:
    """Bytes of ``"5GB"`` (decimal) or ``"5GiB"`` (binary), as HF reads ``max_shard_size``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|[KMGT]i?)B?\s*", str(size), flags=re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise MinitronError(f"max_shard_size must be a number of bytes such as '5GB', found '{size}'")
    unit = match[2].upper()
    base = 1024 if unit.endswith("I") else 1000
    return int(float(match[1]) * base ** ("KMGT".index(unit[0]) + 1 if unit else 0))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON object, formatted as HF's, keys in their own order."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
