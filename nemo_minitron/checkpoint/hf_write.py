"""HF folders as they are written: canonical tensors in, safetensors, configs and tokenizer files out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import torch

from nemo_minitron.checkpoint import model_card, tokenizer_files
from nemo_minitron.checkpoint.biases import has_zero_biases
from nemo_minitron.checkpoint.canonical import Taken, checked_cast, each_tensor, raw_bytes
from nemo_minitron.checkpoint.fuse import hf_part_rows, pieces
from nemo_minitron.checkpoint.hf_config import dressed_config, shape_from_hf
from nemo_minitron.checkpoint.model_card import ModelCard
from nemo_minitron.checkpoint.safetensors_folder import CODES
from nemo_minitron.config.schema import ConvertConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import AllOrNothing, Staging
from nemo_minitron.model.layout import PROJ_BIAS, PROJ_WEIGHT, VOCAB, Parameter
from nemo_minitron.model.shape import ModelShape

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
        layers: index of each layer among those of ``hf_config``, where that is known.
        max_shard_size: bytes, or a number with a unit as HF has it (``"5GB"``).
        card: written as ``README.md``; a foreign one is never replaced.
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
        layers: Sequence[int] | None = None,
        max_shard_size: int | str = ConvertConfig.max_shard_size,
        card: ModelCard | None = None,
        check: Callable[[Path], None] | None = None,
    ) -> None:
        self.destination, self.shape, self.dtype = Path(folder), shape, dtype
        made, self.dress = dressed_config(shape, dtype, hf_config, layers)
        if hf_config is None:
            made |= dict(token_ids or {})
        self._config = {key: value for key, value in made.items() if key not in _CODE_KEYS}
        self._why_none = without_tokenizer
        self._generation, self._tokenizer = generation_config, tokenizer
        self._zeros = has_zero_biases(shape_from_hf(made), shape)
        laid_out = shape.replace(proj_bias=True) if self._zeros else shape
        self._shards = _plan_shards(laid_out, dtype, parse_size(max_shard_size))
        self._card, self._check = card, check
        self._taken = Taken(shape, self.destination)
        room = laid_out.num_parameters() * dtype.itemsize
        own = (model_card.NAME,) if model_card.is_ours(self.destination / model_card.NAME) else ()
        self._staging = Staging(folder, folder=True, replaceable=(*self._PATTERNS, *own), room=room)
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
        name = self._taken.check(parameter, tensor, layer)
        if parameter.axes[0] == VOCAB:
            tensor = tensor[: self.shape.vocab_size]
        tensor = checked_cast(tensor, self.dtype, name)
        for part, rows, canonical in pieces(parameter, self.shape):
            self._put(parameter.hf[part].format(l=layer), tensor[canonical], rows.start * tensor[0].nbytes)
        if self._zeros and parameter is PROJ_WEIGHT:
            self._put(PROJ_BIAS.hf[0].format(l=layer), tensor.new_zeros(self.shape.hidden_size))
        self._taken.add(name)

    def _put(self, name: str, tensor: torch.Tensor, offset: int = 0) -> None:
        """Values of a HF tensor from byte ``offset`` of it on."""
        stream, start = self._places[name]
        stream.seek(start + offset)
        stream.write(raw_bytes(tensor))

    def commit(self) -> None:
        """Check that the folder is whole, complete it, and have it appear."""
        self._taken.check_all()
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
        if self._card is not None:
            notes = [note for note in (self.dress.note, self._why_none) if note]
            text = self._card.text(self.destination.name, self._config, notes, self._tokenizer is not None)
            (folder / model_card.NAME).write_text(text, encoding="utf-8")
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
