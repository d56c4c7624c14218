"""What the fuzzer feeds and the seeds exercise: every reader of an untrusted file, by the first byte of the input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from nemo_minitron.checkpoint import HfReader, NemoReader, each_tensor
from nemo_minitron.checkpoint.record import RecordError, describe, names_in
from nemo_minitron.convert import convert
from nemo_minitron.data.blocks import token_blocks
from nemo_minitron.distill.cache import Identity, TeacherCache
from nemo_minitron.distill.top_k import TopK
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import parse_json, parse_plain_yaml, parse_yaml
from nemo_minitron.importance.scores import Scores
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.plan import Plan
from nemo_minitron.synthetic import make_llama
from tests.importance.made import made, write_format_1

TINY = ModelShape(
    num_layers=1,
    hidden_size=4,
    ffn_hidden_size=4,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=2,
    vocab_size=8,
    padded_vocab_size=8,
    max_position_embeddings=16,
)
CACHE = Identity("t", "d", "k", seq_length=2, vocab_size=8, top_k=2, temperature=1.0)
SAMPLES = torch.zeros(2, 2, dtype=torch.long)


class Readers:
    """Good files of a tiny model in ``folder``, and for each kind of input a reader of the model with it in place."""

    def __init__(self, folder: Path) -> None:
        self._nemo, self._hf, self._file = folder / "nemo", folder / "hf", folder / "input"
        make_llama(self._hf, TINY)
        for file in self._hf.glob("*token*"):
            file.unlink()  # what transformers does with a tokenizer is not ours to fuzz
        (folder / "bin").mkdir()
        self._bin = folder / "bin" / "pytorch_model.bin"
        shutil.copy(self._hf / "config.json", folder / "bin")
        torch.save(load_file(self._hf / "model.safetensors"), self._bin)
        convert(self._hf, self._nemo)
        convert(self._hf, folder / "m.nemo")
        self.good = {
            0: (folder / "m.nemo").read_bytes(),
            1: (self._nemo / "model_weights" / ".metadata").read_bytes(),
            2: (self._nemo / "model_weights" / "__0_0.distcp").read_bytes()[:1400],
            3: (self._hf / "model.safetensors").read_bytes(),
            4: (self._hf / "config.json").read_bytes(),
            5: (self._nemo / "model_config.yaml").read_bytes(),
            7: (self._nemo / "model_weights" / "common.pt").read_bytes(),
            18: self._bin.read_bytes(),
        }
        self._others = folder / "others"
        self._others.mkdir()
        self.good |= _write_others(self._others)
        self._kinds: list[Callable[[bytes], None]] = [
            self._whole,
            lambda data: self._member(self._nemo / "model_weights" / ".metadata", data),
            self._record,
            lambda data: self._member(self._hf / "model.safetensors", data),
            lambda data: self._member(self._hf / "config.json", data),
            lambda data: self._member(self._nemo / "model_config.yaml", data),
            self._gguf,
            lambda data: self._member(self._nemo / "model_weights" / "common.pt", data),
            lambda data: self._other("plan.yaml", data, lambda path: Plan.load(path)),
            lambda data: self._other("scores.json", data, lambda path: Scores.load(path.parent)),
            lambda data: self._other("arrays.npz", data, lambda path: Scores.load(path.parent)),
            lambda data: self._other("cache.json", data, lambda path: TeacherCache(path.parent, CACHE)),
            lambda data: self._other("train/00000000.npy", data, lambda path: _read_cache(path.parent.parent)),
            lambda data: self._other("tokens.idx", data, lambda path: token_blocks(path.with_suffix(""), 2)),
            _json,
            _yaml,
            lambda data: self._other("old/scores.json", data, lambda path: Scores.load(path.parent)),
            lambda data: self._other("old/arrays.npz", data, lambda path: Scores.load(path.parent)),
            self._pickled,
        ]

    def read(self, data: bytes) -> bool:
        """Read one input, whose first byte says what it is; whether it was accepted.

        Anything that is raised but ``MinitronError`` is a defect.
        """
        if not data:
            return False
        try:
            self._kinds[data[0] % len(self._kinds)](data[1:])
            return True
        except (MinitronError, RecordError):
            return False

    def _whole(self, data: bytes) -> None:
        self._file.write_bytes(data)
        _read_all(NemoReader(self._file))

    def _pickled(self, data: bytes) -> None:
        self._bin.write_bytes(data)
        _read_all(HfReader(self._bin.parent))

    def _gguf(self, data: bytes) -> None:
        path = self._file.with_suffix(".gguf")
        path.write_bytes(data)
        _read_all(HfReader(path))

    def _other(self, name: str, data: bytes, read: Callable[[Path], object]) -> None:
        path = self._others / name
        path.write_bytes(data)
        try:
            read(path)
        finally:
            path.write_bytes(self.good[OTHERS[name]])

    def _record(self, data: bytes) -> None:
        def read(start: int, size: int) -> bytes:
            if not 0 <= start <= start + size <= len(data):
                raise RecordError("bounds")
            return data[start : start + size]

        names_in(read, len(data), 1 << 20)
        view = describe(read, len(data))
        assert view.start + view.span * view.dtype.itemsize <= len(data)

    def _member(self, path: Path, data: bytes) -> None:
        kept = path.with_name(path.name + ".kept")
        if not kept.exists():
            shutil.copy(path, kept.with_name("kept.tmp"))
            kept.with_name("kept.tmp").rename(kept)
        path.write_bytes(data)
        try:
            _read_all(NemoReader(self._nemo) if self._nemo in path.parents else HfReader(self._hf))
        finally:
            shutil.copy(kept, path)


def _read_all(reader: HfReader | NemoReader) -> None:
    with reader:
        for parameter, layer in each_tensor(reader.shape):
            reader.tensor(parameter, layer)


OTHERS = {
    "plan.yaml": 8,
    "scores.json": 9,
    "arrays.npz": 10,
    "cache.json": 11,
    "train/00000000.npy": 12,
    "tokens.idx": 13,
    "old/scores.json": 16,
    "old/arrays.npz": 17,
}
"""Files that are no checkpoints, and the first byte of an input for them."""


def _write_others(folder: Path) -> dict[int, bytes]:
    """One good file of each of :data:`OTHERS`, and JSON and YAML by themselves."""
    Plan.identity(TINY, "f").save(folder / "plan.yaml")
    facts = {"source_fingerprint": "w", "data_fingerprint": "d"}
    (folder / "old").mkdir()
    write_format_1(made(TINY, lambda size: np.full(size, 0.5), **facts), folder / "old")
    scores = made(TINY, lambda size: np.full(size, 0.5), reconstruction=True, **facts)
    others = {"taylor": scores.published, "mine": {"hidden": np.full(TINY.hidden_size, 2.0)}}
    dataclasses.replace(scores, rankings=scores.rankings | others).write(folder)
    cache = TeacherCache(folder, CACHE)
    cache.create()
    halves = torch.full((2, 2, 2), 0.5).log()
    answers = TopK(halves, torch.zeros(2, 2, 2), torch.full((2, 2), -50.0))
    cache.write("train", 0, [(SAMPLES, answers)])
    np.arange(6, dtype="<u2").tofile(folder / "tokens.bin")
    head = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x08" + (2).to_bytes(8, "little") + (3).to_bytes(8, "little")
    body = [np.array([3, 3], "<i4"), np.array([0, 6], "<i8"), np.array([0, 1, 2], "<i8")]
    (folder / "tokens.idx").write_bytes(head + b"".join(part.tobytes() for part in body))
    good = {kind: (folder / name).read_bytes() for name, kind in OTHERS.items()}
    return good | {14: b'{"a": [1, 2.5, null, {"b": "c\\u00e9"}]}', 15: b"a: {b: 0-3 5, 7: [x, 'y', 1e3, ~, true]}\n"}


def _read_cache(folder: Path) -> None:
    TeacherCache(folder, CACHE).read("train", torch.arange(2), SAMPLES)


def _json(data: bytes) -> None:
    json.dumps(parse_json(data, "input"))


def _yaml(data: bytes) -> None:
    parse_plain_yaml(data, "input")
    parse_yaml(data, "input")
