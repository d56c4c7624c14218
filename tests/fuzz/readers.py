"""What the fuzzer feeds and the seeds exercise: every reader of an untrusted file, by the first byte of the input."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from nemo_minitron.checkpoint import HfReader, NemoReader, each_tensor
from nemo_minitron.checkpoint.record import RecordError, describe, names_in
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.shape import ModelShape
from nemo_minitron.synthetic import make_llama

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


class Readers:
    """Good files of a tiny model in ``folder``, and for each kind of input a reader of the model with it in place."""

    def __init__(self, folder: Path) -> None:
        self._nemo, self._hf, self._file = folder / "nemo", folder / "hf", folder / "input"
        make_llama(self._hf, TINY)
        for file in self._hf.glob("*token*"):
            file.unlink()  # what transformers does with a tokenizer is not ours to fuzz
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
        }
        self._kinds: list[Callable[[bytes], None]] = [
            self._whole,
            lambda data: self._member(self._nemo / "model_weights" / ".metadata", data),
            self._record,
            lambda data: self._member(self._hf / "model.safetensors", data),
            lambda data: self._member(self._hf / "config.json", data),
            lambda data: self._member(self._nemo / "model_config.yaml", data),
            self._gguf,
            lambda data: self._member(self._nemo / "model_weights" / "common.pt", data),
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

    def _gguf(self, data: bytes) -> None:
        path = self._file.with_suffix(".gguf")
        path.write_bytes(data)
        _read_all(HfReader(path))

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
