"""A teacher's answers on disk: some tokens of every position, written once, so that training needs no teacher.

A folder holds ``cache.json``, what the answers are of (:class:`Identity`), and per split ``SPLIT/NUMBER.npy``: a shard
of consecutive samples, one record each. A record is ``key`` (8 bytes of a hash of the sample's tokens), ``tokens
[s, K]`` and ``log_probs [s, K]`` (float16); and, for the likeliest tokens (:class:`TopK`), ``log_tail [s]`` (float32),
the log-probability of all others together, or, for tokens that were drawn (:class:`Sampled`), ``log_each [s]``
(float16): the weight of those that are not always drawn. Ids of drawn tokens take 2, 3 or 4 bytes.

Samples are keyed by their index in the data set, whatever batch size, grid or order they are read in; the hash in each
record is compared with the tokens at hand, so that another order of the data cannot go unnoticed.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.distill.sampled import Sampled
from nemo_minitron.distill.top_k import TopK
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.arrays import ArrayFile
from nemo_minitron.files.staging import write_file
from nemo_minitron.files.text import read_json
from nemo_minitron.model.shape import ModelShape

SHARD = 64
"""Samples in a file: what a killed run loses at most per data-parallel rank."""

_MOST_METADATA = 1 << 16
_ABSENT: dict[str, Any] = {
    "top_k": 0,
    "samples": 0,
    "reset_attention_mask": False,
    "reset_position_ids": False,
    "architecture": None,
}
"""What a ``cache.json`` means that does not say it, as earlier versions' do not."""
_ROUNDING = 0.05
"""Most that float16 may take the logarithm of a sum of probabilities from 0."""


@dataclass(frozen=True)
class Identity:
    """What a cache is valid for. ``teacher``, ``data`` and ``tokenizer`` are fingerprints; ``teacher`` None accepts
    whichever teacher made it. Which tokens count in a loss is none of it: there are answers for every token."""

    teacher: str | None
    data: str
    tokenizer: str
    seq_length: int
    vocab_size: int
    top_k: int
    """Likeliest tokens of each position; 0 where tokens are drawn."""
    temperature: float
    samples: int = 0
    """Tokens drawn at each position; 0 where the likeliest are kept."""
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    architecture: str | None = None
    """What the teacher computes with its weights, see :func:`architecture_of`; None accepts any, and any accepts it."""

    def facts(self) -> dict[str, str | int | float | None]:
        """What ``cache.json`` says: all but what is not so."""
        return {name: value for name, value in asdict(self).items() if value or name not in _ABSENT}

    @property
    def bytes_per_token(self) -> int:
        """Rounded up: a sample's hash goes with its tokens."""
        return -(-self.record().itemsize // self.seq_length)

    def record(self) -> np.dtype:
        """Layout of one sample; token ids take two bytes where the vocabulary allows."""
        s, k = self.seq_length, min(self.samples or self.top_k, self.vocab_size)
        tokens: tuple[Any, ...] = (np.uint16 if self.vocab_size <= 1 << 16 else np.uint32, (s, k))
        last: tuple[Any, ...] = ("log_tail", np.float32, (s,))
        if self.samples:
            last = ("log_each", np.float16, (s,))
            if 1 << 16 < self.vocab_size <= 1 << 24:
                tokens = (np.uint8, (s, k, 3))
        return np.dtype([("key", np.uint64), ("tokens", *tokens), ("log_probs", np.float16, (s, k)), last])


class TeacherCache:
    """Reader and writer of a cache folder.

    Raises:
        MinitronError: the folder holds answers of something else (both fingerprints are named), or none and
            ``identity`` does not say of which teacher they are to be.
    """

    def __init__(self, folder: str | Path, identity: Identity) -> None:
        self.folder = Path(folder)
        self.identity = identity
        self._shards: dict[tuple[str, int], np.ndarray] = {}
        manifest = self.folder / "cache.json"
        if manifest.is_file():
            self._check(read_json(manifest, _MOST_METADATA))
        elif identity.teacher is None:
            raise MinitronError(
                f"distill.teacher_cache={folder} holds no answers yet; model.kd_teacher_restore_from_path must name "
                "the teacher to write them"
            )

    def _check(self, found: Mapping[str, object]) -> None:
        found = _ABSENT | dict(found)
        for name, expected in asdict(self.identity).items():
            if expected is None or (name == "architecture" and found[name] is None):
                continue
            if found.get(name) != expected:
                raise MinitronError(
                    f"distill.teacher_cache={self.folder} is of another {name}: it has {found.get(name)!s:.200}, this "
                    f"run {expected}; name another folder, or remove it"
                )

    def create(self) -> None:
        """Write ``cache.json`` if it is not there; one process only."""
        if not (self.folder / "cache.json").is_file():
            write_file(self.folder / "cache.json", json.dumps(self.identity.facts(), indent=2).encode() + b"\n")

    def missing(self, split: str, samples: int) -> list[int]:
        """Numbers of the shards that are still to be written for the first ``samples`` samples."""
        return [n for n in range(-(-samples // SHARD)) if not self._path(split, n).is_file()]

    def write(self, split: str, number: int, batches: Sequence[tuple[Tensor, TopK | Sampled]]) -> None:
        """Write shard ``number`` from micro-batches of its samples in order: tokens ``[b, s+1 or s]`` and answers."""
        records = np.zeros(sum(len(tokens) for tokens, _ in batches), self.identity.record())
        start = 0
        for tokens, known in batches:
            rows = records[start : start + len(tokens)]
            rows["key"] = keys_of(tokens)
            rows["log_probs"] = known.log_probs.cpu().numpy()
            if isinstance(known, TopK):
                rows["tokens"], rows["log_tail"] = known.tokens.cpu().numpy(), known.log_tail.cpu().numpy()
            else:
                rows["tokens"] = _packed(known.tokens.cpu().numpy(), rows["tokens"])
                # the last one is certain only where all are, and then its own probability does as well
                rows["log_each"] = known.log_weights[..., -1].cpu().numpy()
            start += len(tokens)
        stream = io.BytesIO()
        np.save(stream, records)
        write_file(self._path(split, number), stream.getvalue())

    def read(self, split: str, samples: Tensor, tokens: Tensor) -> TopK | Sampled:
        """Answers ``[b, s, K]`` and ``[b, s]`` for samples ``[b]`` whose tokens are ``[b, s]``; their mass
        is 1.

        Raises:
            MinitronError: a sample is not in the cache, was of other tokens, or has answers that are none: ids beyond
                the vocabulary, or probabilities or weights that do not sum to 1.
        """
        found = np.stack([self._record(split, int(n)) for n in samples])
        keys = keys_of(tokens)
        for number, ours, theirs in zip(samples.tolist(), keys, found["key"], strict=True):
            if ours != theirs:
                raise MinitronError(
                    f"distill.teacher_cache={self.folder}: {split} sample {number} is of other tokens: it has "
                    f"{int(theirs):016x}, this run {int(ours):016x}; data, seed, seq_length or the number of epochs "
                    "are not those that it was written for"
                )
        log_probs = torch.from_numpy(found["log_probs"].astype(np.float64))
        if self.identity.samples:
            index = _unpacked(found["tokens"], log_probs.dim())
            each = torch.from_numpy(found["log_each"].astype(np.float64)).unsqueeze(-1)
            weights = torch.maximum(log_probs, each)  # certain tokens are those whose probability is above 1/c
            mass = weights.logsumexp(-1)
            self._check_answers(split, samples, index, mass)
            return Sampled(log_probs, index, weights - mass.unsqueeze(-1))
        log_tail = torch.from_numpy(found["log_tail"].astype(np.float64))
        # float16 rounds: give both together a mass of 1 again
        mass = torch.logaddexp(log_probs.logsumexp(-1), log_tail)
        index = torch.from_numpy(found["tokens"].astype(np.int64))
        self._check_answers(split, samples, index, mass)
        return TopK(log_probs - mass.unsqueeze(-1), index, log_tail - mass)

    def _check_answers(self, split: str, samples: Tensor, index: Tensor, mass: Tensor) -> None:
        for number, ids, masses in zip(samples.tolist(), index, mass, strict=True):
            where = f"{self._path(split, number // SHARD)}: sample {number}"
            if ids.max() >= self.identity.vocab_size:
                raise MinitronError(
                    f"{where}: expected ids below the vocabulary's {self.identity.vocab_size}, found {int(ids.max())}; "
                    "remove the file, and the teacher writes it again"
                )
            if not (masses.abs() < _ROUNDING).all():  # NaN too
                raise MinitronError(
                    f"{where}: expected probabilities that sum to 1, found others; remove the file, and the teacher "
                    "writes it again"
                )

    def _record(self, split: str, sample: int) -> Any:
        number, row = divmod(sample, SHARD)
        shard = self._shards.get((split, number))
        if shard is None:
            path = self._path(split, number)
            if not path.is_file():
                raise MinitronError(f"distill.teacher_cache={self.folder}: {split} sample {sample} is not in it")
            if len(self._shards) > 256:  # files held open
                self._shards.clear()
            shard = self._shards[split, number] = self._open(path)
        if row >= len(shard):
            raise MinitronError(f"distill.teacher_cache={self.folder}: {split} sample {sample} is not in it")
        return shard[row]

    def _open(self, path: Path) -> np.ndarray:
        """A shard, mapped; its type and size checked against the file's own first."""
        record = self.identity.record()
        with ArrayFile(path, SHARD * record.itemsize + _MOST_METADATA) as file:
            dtype, size = file.describe()
            if dtype != record:
                raise MinitronError(f"{path}: expected records of {record!s:.200}, found {dtype!s:.200}")
            if len(size) != 1 or size[0] > SHARD:
                raise MinitronError(f"{path}: expected at most {SHARD} records, found an array of size {list(size)}")
            return file.map()

    def _path(self, split: str, number: int) -> Path:
        return self.folder / split / f"{number:08d}.npy"


def architecture_of(shape: ModelShape) -> str:
    """What a model of this shape computes with its weights, as far as their sizes do not say it, in a line."""
    heads = f"{shape.num_attention_heads}/{shape.num_query_groups} heads of {shape.kv_channels}"
    rope = f"RoPE {shape.rotary_base:g} {shape.rope_scaling}"
    return f"{shape.family}, {heads}, {rope}, epsilon {shape.layernorm_epsilon:g}, window {shape.sliding_window}"


def teacher_of(folder: str | Path) -> str | None:
    """Fingerprint of the weights whose answers a cache folder holds; None where it holds none yet."""
    manifest = Path(folder) / "cache.json"
    if not manifest.is_file():
        return None
    found = read_json(manifest, _MOST_METADATA).get("teacher")
    return None if found is None else str(found)


def keys_of(tokens: Tensor) -> np.ndarray:
    """A 64-bit hash of each row of token ids ``[b, s]``."""
    rows = tokens.cpu().numpy().astype("<i8")
    return np.array(
        [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in rows], np.uint64
    )


def _packed(ids: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Ids ``[b, s, K]`` as a record has them: numbers of its size, or three bytes each, the lowest first."""
    if like.ndim == ids.ndim:
        return ids
    return np.ascontiguousarray(ids.astype("<u4")).view(np.uint8).reshape(*ids.shape, 4)[..., :3]


def _unpacked(stored: np.ndarray, dims: int) -> Tensor:
    """What :func:`_packed` made, int64 ``[b, s, K]`` of ``dims`` dimensions."""
    ids = torch.from_numpy(stored.astype(np.int64))
    return ids if ids.dim() == dims else ids[..., 0] + (ids[..., 1] << 8) + (ids[..., 2] << 16)
