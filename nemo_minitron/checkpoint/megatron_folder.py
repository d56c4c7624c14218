"""Folders of NeMo 2, Megatron-Bridge and Megatron-LM (torch_dist of Megatron-Core 0.13 to 0.19), as canonical tensors.

All three hold the same sharded tensors and differ in where their config lies. Nothing of them is run: classes and
functions that they name are names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoint import tokenizer_files
from nemo_minitron.checkpoint.archive import open_archive, read_member
from nemo_minitron.checkpoint.canonical import fingerprint
from nemo_minitron.checkpoint.common_state import arguments, read_common
from nemo_minitron.checkpoint.distcp import Place, read_metadata
from nemo_minitron.checkpoint.hf_config import shape_from_hf
from nemo_minitron.checkpoint.kinds import refuse_other_megatron
from nemo_minitron.checkpoint.megatron_config import shape_from_args, shape_from_model
from nemo_minitron.checkpoint.megatron_place import BRIDGE, MEGATRON, MODEL_CONFIG, NEMO2, RUN_CONFIG, locate
from nemo_minitron.checkpoint.megatron_write import GENERATION_CONFIG, HF_CONFIG, SIDECAR
from nemo_minitron.checkpoint.sharded import ShardedModel
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import JSON_LIMIT, YAML_LIMIT, parse_json, parse_object_yaml
from nemo_minitron.jobs.processes import notice
from nemo_minitron.model.layout import Parameter
from nemo_minitron.model.shape import ModelShape, shape_of

_PREFIX = "module."  # NeMo 2's
_TOKENIZERS = {NEMO2: ("context/nemo_tokenizer/", "context/"), BRIDGE: ("tokenizer/", "hf/"), MEGATRON: ("tokenizer/",)}


class MegatronReader:
    """Lazy, read-only view of a Megatron checkpoint; a context manager.

    Attributes:
        path: what was opened.
        dress: ``nemo2``, ``bridge`` or ``megatron``.
        shape: V from the config where it says it, Vp from the stored table.
        dtype: the widest storage dtype among the model's tensors.
        hf_config: ``minitron/hf_config.json``, of a checkpoint that this package wrote, or ``hf/config.json``, which
            Megatron-Bridge leaves beside its weights where it is asked to; else None.
        generation_config: what a config of Megatron-Bridge or NeMo 2 has of it, or what lies beside it; else None.

    Args:
        model: NeMo's keys of a shape that the user gives. They are the shape of a checkpoint that says none; of the
            others, ``vocab_size`` and ``max_position_embeddings`` are taken over and all others must agree.

    Raises:
        MinitronError: a folder of another kind; another format than torch_dist; hostile files; tensors missing, unknown
            or of other sizes than the config says; a model that is not Llama-like.
    """

    def __init__(self, path: str | Path, model: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise MinitronError(f"{self.path}: expected a folder of NeMo 2, Megatron-Bridge or Megatron-LM, found none")
        refuse_other_megatron(self.path)
        self._place = locate(self.path)
        refuse_other_megatron(self._place.root)
        self.dress = self._place.dress
        self.hf_config: dict[str, Any] | None = None
        self.generation_config: dict[str, Any] | None = None
        self._fingerprint: str | None = None
        self._archive = open_archive(self._place.root)
        try:
            self._where = str(self._place.root)
            self._check_format()
            tensors, objects = read_metadata(self._archive, self._where, self._place.weights)
            if not tensors:
                raise MinitronError(f"{self._where}: expected the weights of a model, found a training's state alone")
            prefixes = [_PREFIX] if any(key.startswith(_PREFIX) for key in tensors) else []
            self._model = ShardedModel(self._archive, self._where, tensors, prefixes)
            self.shape = self._agreed(self._read_shape(objects, model or {}), model or {})
            self._read_hf_config()
            self.dtype = self._model.check(self.shape, _TIED_BY[self.dress])
        except BaseException:
            self._archive.close()
            raise

    def _check_format(self) -> None:
        """Refuse what is no torch_dist checkpoint of Megatron-Core's."""
        folder, names = self._place.weights, set(self._archive.names())
        described = f"{folder}metadata.json"
        if described not in names:
            found = "one that torch alone wrote (fsdp_dtensor, torch_dcp)" if f"{folder}.metadata" in names else "none"
            raise MinitronError(
                f"{self._where}: expected {described}, which Megatron-Core writes beside its weights, found {found}"
            )
        content = parse_json(read_member(self._archive, described, 1 << 20), f"{self._where}: {described}")
        backend = content.get("sharded_backend")
        if backend != "torch_dist" or f"{folder}.metadata" not in names:
            raise MinitronError(
                f"{self._where}: expected weights in the format torch_dist, found {backend!r:.80}; load them in "
                "Megatron and save them with --ckpt-format torch_dist"
            )

    def _read_shape(self, objects: Mapping[str, Place], model: Mapping[str, Any]) -> ModelShape:
        rows = self._model.table_rows
        if self.dress == MEGATRON:
            state = read_common(self._archive, objects, self._where)
            args = arguments(state, self._where)
            if args is not None:
                return shape_from_args(args, rows, f"{self._where}: args")
            if not model:
                raise MinitronError(
                    f"{self._where}: expected args in the common state, which say the model's shape, found none; give "
                    "the shape with model=NAME (conf/model/NAME.yaml) or model.num_layers=… and so on"
                )
            return shape_of({"vocab_size": rows, **model, "padded_vocab_size": rows})
        file = MODEL_CONFIG if self.dress == NEMO2 else RUN_CONFIG
        where = f"{self._where}: {file}"
        if file not in self._archive.names():
            raise MinitronError(f"{where}: expected it beside the weights, found none")
        config = parse_object_yaml(read_member(self._archive, file, YAML_LIMIT), where)
        name = "config" if self.dress == NEMO2 else "model"
        section = config.get(name)
        if not isinstance(section, Mapping):
            raise MinitronError(f"{where}: expected the mapping {name}, found {type(section).__name__}")
        if adapted := config.get("model_transform" if self.dress == NEMO2 else "peft"):
            raise MinitronError(
                f"{where}: expected a whole model, found adapters ({str(adapted)[:80]}); merge them into their model"
            )
        self.generation_config = _generation(section)
        return shape_from_model(section, rows, f"{where}: {name}")

    def _agreed(self, shape: ModelShape, model: Mapping[str, Any]) -> ModelShape:
        """``shape`` with what the user says of it."""
        asked = shape_of({**shape.to_dict(), **model, "padded_vocab_size": shape.padded_vocab_size}, shape.rope_scaling)
        taken = {name: getattr(asked, name) for name in ("vocab_size", "max_position_embeddings")}
        asked.check_same(shape.replace(**taken), "model: asked for")
        return asked

    def _read_hf_config(self) -> None:
        """Take over HF's configs, which Megatron-Bridge or this package left beside the weights, where they are of this
        model: ours may be of one that it was pruned from."""
        names, ours = set(self._archive.names()), f"{SIDECAR}{GENERATION_CONFIG}"
        if self.generation_config is None and ours in names:
            self.generation_config = parse_json(read_member(self._archive, ours, JSON_LIMIT), f"{self._where}: {ours}")
        for name in (f"{SIDECAR}{HF_CONFIG}", *(() if self.dress == NEMO2 else ("hf/config.json",))):
            if self.hf_config is None and name in names:
                self._take_hf_config(name)

    def _take_hf_config(self, name: str) -> None:
        where = f"{self._where}: {name}"
        config = parse_json(read_member(self._archive, name, JSON_LIMIT), where)
        try:
            theirs = shape_from_hf(config, where)
            length = theirs.max_position_embeddings  # the model's own, where Megatron knows that of the training
            vocab = self.shape.vocab_size
            if self.dress == NEMO2 and theirs.vocab_size < vocab:
                vocab = theirs.vocab_size  # NeMo 2 has that of the table alone
            mine = self.shape.replace(vocab_size=vocab, max_position_embeddings=length)
            mine.replace(padded_vocab_size=theirs.padded_vocab_size).check_same(theirs, f"{where}: expected")
        except MinitronError as error:
            if not name.startswith(SIDECAR):
                notice(f"{error}; it is not used")
            return
        self.hf_config, self.shape = config, mine

    def num_bytes(self) -> int:
        """Bytes of the model's tensors as stored."""
        return self._model.num_bytes()

    def tensor(self, parameter: Parameter, layer: int | None = None, rows: slice | None = None) -> torch.Tensor:
        """One canonical tensor in its storage dtype, or the ``rows`` of its first dimension."""
        return self._model.tensor(parameter, layer, rows)

    def fingerprint(self) -> str:
        """Fingerprint of the weights, equal to that of a ``.nemo`` with the same weights in the same dtype."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self)
        return self._fingerprint

    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer that lies in the checkpoint; None without one. What a config names is not opened."""
        for prefix in _TOKENIZERS[self.dress]:
            if (folder := tokenizer_files.unpack(self._archive, prefix=prefix)) is not None:
                return folder
        return None

    def save_tokenizer(self, folder: Path) -> bool:
        """Nothing: what it carries lies in files."""
        return False

    def close(self) -> None:
        """Release the files."""
        self._archive.close()

    def __enter__(self) -> MegatronReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_TIED_BY = {
    NEMO2: "share_embeddings_and_output_weights",
    BRIDGE: "share_embeddings_and_output_weights",
    MEGATRON: "untie_embeddings_and_output_weights",
}


def _generation(section: Mapping[str, Any]) -> dict[str, Any] | None:
    """``generation_config.json`` in a config that transformers' class was written into."""
    written = section.get("generation_config")
    content = written.get("config_dict") if isinstance(written, Mapping) else None
    return {str(key): value for key, value in content.items()} if isinstance(content, Mapping) else None
