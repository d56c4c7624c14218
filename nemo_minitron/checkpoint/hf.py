"""HF folders (and GGUF files) as canonical tensors: the same reading interface as a ``.nemo``'s."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_minitron.checkpoint import gguf_parts
from nemo_minitron.checkpoint.canonical import each_tensor, fingerprint, raw_bytes
from nemo_minitron.checkpoint.fuse import fuse, hf_part_rows, pieces, unfuse
from nemo_minitron.checkpoint.hf_config import shape_from_hf
from nemo_minitron.checkpoint.hf_folder import HfFolder, shards
from nemo_minitron.checkpoint.keys import has_no_place, other_head
from nemo_minitron.checkpoint.kinds import refuse_other_kinds
from nemo_minitron.checkpoint.pytorch_bin import PytorchBinFolder
from nemo_minitron.checkpoint.safetensors_folder import SafetensorsFolder
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.processes import notice
from nemo_minitron.model.layout import EMBEDDING, OUTPUT, PROJ_BIAS, Parameter, parameters
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

    def rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Values as they would be after they were stored under ``name`` and read again, but for the dtype."""

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

    Args:
        untie: use another output head that a tied model's file has: shape and ``hf_config`` are then of an untied one.
            A model without one is refused.

    Raises:
        MinitronError: no such folder, an unsupported architecture or feature, a missing, unknown, truncated or
            wrongly sized tensor.
    """

    def __init__(self, path: str | Path, untie: bool = False) -> None:
        self.path = Path(path)
        self._source = _open_source(self.path)
        self._zeros: frozenset[str] = frozenset()
        try:
            self.hf_config, self.generation_config = self._source.config, self._source.generation_config
            self.shape = self._without_zeros(shape_from_hf(self.hf_config, f"{self.path}: config.json"))
            if untie:
                self._check_untie()
                self.hf_config = {**self.hf_config, "tie_word_embeddings": False}
                self.shape = self.shape.replace(share_embeddings_and_output_weights=False)
            self.dtype = self._check_tensors()
        except BaseException:
            self._source.close()
            raise

    def _without_zeros(self, shape: ModelShape) -> ModelShape:
        """The shape without a bias of the attention's output where that is zero in every layer.

        So is a Qwen2 in the dress of a Llama, which has ``attention_bias`` for QKV alone.
        """
        zeros = {PROJ_BIAS.hf[0].format(l=layer) for layer in range(shape.num_layers)} if shape.proj_bias else set()
        if not zeros or any(self._source.sizes.get(name) != (shape.hidden_size,) for name in zeros):
            return shape
        if any(any(raw_bytes(self._source.get(name))) for name in zeros):
            return shape
        self._zeros = frozenset(zeros)
        notice(f"{self.path}: every o_proj.bias is zero; read as a model with a bias on queries, keys and values alone")
        return shape.replace(proj_bias=False)

    def _check_tensors(self) -> torch.dtype:
        dtype, unknown = None, set(self._source.sizes) - self._zeros
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
        if self._has_another_head():
            raise other_head(f"{self.path}", OUTPUT.hf[0], "tie_word_embeddings", " (convert with untie=true)")
        if self.shape.share_embeddings_and_output_weights:
            unknown.discard(OUTPUT.hf[0])
        unknown = {name for name in unknown if not _IGNORED.fullmatch(name)}
        if unknown:
            places = [name.replace("{l}", "N") for row in parameters(self.shape) for name in row.hf]
            raise has_no_place(f"{self.path}", min(unknown), places)
        assert dtype is not None
        return dtype

    def _check_untie(self) -> None:
        """Refuse to untie what has no second head that could be used."""
        if self._has_another_head():
            return
        found = "an untied model"
        if self.shape.share_embeddings_and_output_weights:
            head = OUTPUT.hf[0]
            found = f"a '{head}' that equals it" if head in self._source.sizes else f"no '{head}'"
        raise MinitronError(
            f"untie=true: expected a tied model with another output head beside its table, found {found} in {self.path}"
        )

    def _has_another_head(self) -> bool:
        """Whether the model is tied, and its file nevertheless has an output head that is not the table."""
        table, head = EMBEDDING.hf[0], OUTPUT.hf[0]
        names = self._source.sizes
        both = self.shape.share_embeddings_and_output_weights and table in names and head in names
        return both and not self._source.equal(head, table)

    @property
    def is_gguf(self) -> bool:
        """Whether the tokenizer must be made by :meth:`save_tokenizer`."""
        return not isinstance(self._source, HfFolder)

    def num_bytes(self) -> int:
        """Bytes of the model's tensors in :attr:`dtype`."""
        return self.shape.num_parameters() * self.dtype.itemsize

    def tensor(self, parameter: Parameter, layer: int | None = None, rows: slice | None = None) -> torch.Tensor:
        """One canonical tensor in its storage dtype, or the ``rows`` of its first dimension; tables have V rows."""
        names = [name.format(l=layer) for name in parameter.hf]
        tensor = None
        if isinstance(self._source, HfFolder) and len(names) > 1:
            tensor = self._source.joined(names, pieces(parameter, self.shape), parameter.size(self.shape))
        if tensor is None:
            tensor = fuse(parameter, [self._source.get(name) for name in names], self.shape)
        return tensor if rows is None else tensor[rows]

    def as_stored(self, tensor: torch.Tensor, parameter: Parameter, layer: int | None = None) -> torch.Tensor:
        """A canonical tensor of other values as this checkpoint would have it: rounded or quantised, part by part."""
        parts = unfuse(parameter, tensor, self.shape)
        names = [name.format(l=layer) for name in parameter.hf]
        return fuse(parameter, [self._source.rounded(*pair) for pair in zip(names, parts, strict=True)], self.shape)

    def fingerprint(self) -> str:
        """Fingerprint of the weights, equal to that of a ``.nemo`` with the same weights in the same dtype."""
        return fingerprint(self)

    def tokenizer_folder(self) -> Path | None:
        """The HF folder itself; None for a GGUF, whose tokenizer :meth:`save_tokenizer` writes, and without one."""
        return self._source.tokenizer_folder()

    def save_tokenizer(self, folder: Path) -> bool:
        """Write a GGUF's tokenizer into an existing folder, as HF's files; False for a HF folder, whose lie in it."""
        if not self.is_gguf:
            return False
        self._source.save_tokenizer(folder)
        return True

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
        return _open_folder(path)
    ggufs = gguf_parts.inside(path) if path.is_dir() else [path] if gguf_parts.is_gguf(path) else []
    if len(ggufs) != 1:
        raise MinitronError(f"{path}: expected a HF folder with config.json, or one .gguf file, found neither")
    from nemo_minitron.checkpoint.gguf import GgufFile

    return GgufFile(ggufs[0])


def _open_folder(path: Path) -> HfFolder:
    """A folder's safetensors, else its ``.bin`` files; in this order transformers looks as well."""
    for kind in (SafetensorsFolder, PytorchBinFolder):
        if next(shards(path, *kind.NAMES), None) is not None:
            opened: HfFolder = kind(path)
            return opened
    others = sorted(p.name for pattern in ("*.safetensors", "*.bin") for p in path.glob(pattern))
    found = f"{others[0]}, which has another name" if others else "none"
    raise MinitronError(f"{path}: expected model.safetensors, pytorch_model.bin, or numbered shards, found {found}")
