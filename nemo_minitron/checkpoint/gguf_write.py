"""Canonical tensors as one GGUF for llama.cpp, written by the ``gguf`` package's own header and quantiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from nemo_minitron.checkpoint import gguf_rope
from nemo_minitron.checkpoint.canonical import Taken, checked_cast, each_tensor, raw_bytes
from nemo_minitron.checkpoint.fuse import hf_part_rows, unfuse
from nemo_minitron.checkpoint.gguf_names import permute, permuted_heads, places
from nemo_minitron.checkpoint.gguf_vocab import Vocabulary, vocabulary
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import AllOrNothing, Staging
from nemo_minitron.jobs.processes import notice
from nemo_minitron.model.family import Family
from nemo_minitron.model.layout import VOCAB, Parameter
from nemo_minitron.model.shape import LinearScaling, ModelShape, RopeScaling
from nemo_minitron.registry import FAMILIES

if TYPE_CHECKING:
    from gguf import GGUFWriter

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
Q8_0 = "q8_0"
"""The one quantisation that is written; llama.cpp's own quantiser makes the others of a file in 16 bits."""


def gguf_family(shape: ModelShape) -> Family:
    """The family under whose architecture llama.cpp computes a model of this shape.

    Raises:
        MinitronError: none, or one whose RoPE scaling llama.cpp does not read; a window over the tokens, of which its
            architectures have none.
    """
    if shape.sliding_window is not None:
        raise MinitronError(
            f"format=gguf: sliding_window must be null, found {shape.sliding_window}: llama.cpp would let every token "
            "attend to all before it"
        )
    biases = (shape.qkv_bias, shape.proj_bias, shape.mlp_bias)
    alike = (one for one in FAMILIES.every() if one.layers == shape.family and one.has_biases(biases))
    family: Family | None = next((one for one in alike if one.gguf), None)
    if family is None:
        raise MinitronError(f"format=gguf: family '{shape.family}' has no architecture in a GGUF that we know")
    if isinstance(shape.rope_scaling, RopeScaling) and family.gguf not in gguf_rope.ARCHITECTURES:
        raise MinitronError(
            f"format=gguf: rope_scaling must be absent under the architecture {family.gguf}, for which llama.cpp reads "
            f"no factors; found {shape.rope_scaling}"
        )
    return family


class GgufWriter(AllOrNothing):
    """Streams canonical tensors into one GGUF; a context manager with the guarantees of :class:`NemoWriter`.

    Names, order of rows, and metadata are those of llama.cpp's own converter. Matrices are of the writer's dtype or
    quantised, norms and biases float32. The header is laid out from the shape alone, so that each tensor goes straight
    to its place, in any order, and memory holds one. Of a padded table the V true rows are written.

    Args:
        dtype: float32, float16 or bfloat16, of matrices.
        quantization: ``q8_0`` in place of ``dtype``: blocks of 32 values, each with a float16 scale. Matrices whose
            rows are no multiple of 32 values are float16 then, and that is said.
        tokenizer: folder whose tokenizer becomes metadata; without one the file has none, which is said.
        token_ids: ``bos_token_id`` and its like, where they differ from the tokenizer's.
        name: ``general.name``; the file's stem when None.
        check: called with the path of the finished file before it is renamed into place.

    Raises:
        MinitronError: a family, RoPE or tokenizer that a GGUF cannot say, by name.
    """

    def __init__(
        self,
        path: str | Path,
        shape: ModelShape,
        dtype: torch.dtype,
        *,
        quantization: str | None = None,
        tokenizer: Path | None = None,
        token_ids: Mapping[str, int | None] | None = None,
        name: str | None = None,
        check: Callable[[Path], None] | None = None,
    ) -> None:
        self.destination, self.shape, self.dtype, self._check = Path(path), shape, dtype, check
        self._kind = _kind(dtype, quantization)
        self._family = gguf_family(shape)
        self._rows = shape.replace(padded_vocab_size=shape.vocab_size)
        self._taken = Taken(shape, self.destination)
        tensors = self._plan()
        vocab = None if tokenizer is None else vocabulary(tokenizer, shape.vocab_size)
        if vocab is None:
            notice(f"{self.destination}: written without a tokenizer, which llama.cpp needs for text")
        room = sum(size for _, _, size in tensors.values())
        self._staging = Staging(path, room=room)
        self._file: IO[bytes] | None = None
        try:
            self._start(tensors, vocab, dict(token_ids or {}), name or self.destination.stem)
        except BaseException:
            self.abort()
            raise

    def _plan(self) -> dict[str, tuple[tuple[int, ...], str, int]]:
        """Size, kind and bytes of each tensor, by its name in the file."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        self._names = {hf: own for own, hf in places(self._family).items()}
        tensors, uneven = {}, []
        for parameter, layer in each_tensor(self._rows):
            for hf, rows in zip(parameter.hf, hf_part_rows(parameter, self._rows), strict=True):
                size = (rows, *parameter.size(self._rows)[1:])
                kind = "F32" if len(size) == 1 else self._kind
                per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
                if size[-1] % per_block:
                    uneven.append(size[-1])
                    kind, (per_block, block_bytes) = "F16", (1, 2)
                tensors[self._name(hf, layer)] = (size, kind, math.prod(size) // per_block * block_bytes)
        if uneven:
            notice(
                f"{self.destination}: {len(uneven)} matrices with rows of {', '.join(map(str, sorted(set(uneven))))} "
                "values, no multiple of 32, are F16 instead of Q8_0"
            )
        if isinstance(self.shape.rope_scaling, RopeScaling):
            tensors[gguf_rope.TENSOR] = ((self.shape.kv_channels // 2,), "F32", 2 * self.shape.kv_channels)
        return tensors

    def _name(self, hf: str, layer: int | None) -> str:
        own = self._names[hf.replace("{l}", "N")]
        return own if layer is None else own.replace(".N.", f".{layer}.", 1)

    def _start(
        self,
        tensors: Mapping[str, tuple[tuple[int, ...], str, int]],
        vocab: Vocabulary | None,
        token_ids: Mapping[str, int | None],
        name: str,
    ) -> None:
        """Write the header and leave room for the tensors."""
        from gguf import GGMLQuantizationType, GGUFWriter

        writer = GGUFWriter(self._staging.path, str(self._family.gguf))
        self._describe(writer, name)
        _add_tokenizer(writer, vocab, token_ids, self.shape.vocab_size)
        self._places: dict[str, tuple[int, tuple[int, ...], str]] = {}
        offset = 0
        for own, (size, kind, count) in tensors.items():
            writer.add_tensor_info(own, size, np.dtype(np.float32), count, raw_dtype=GGMLQuantizationType[kind])
            self._places[own] = (offset, size, kind)
            offset += writer.ggml_pad(count, writer.data_alignment)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        self._file = self._staging.path.open("r+b")
        self._begin = writer.ggml_pad(self._staging.path.stat().st_size, writer.data_alignment)
        self._file.truncate(self._begin + offset)
        if isinstance(self.shape.rope_scaling, RopeScaling):
            factors = gguf_rope.factors(self.shape.rope_scaling, self.shape.rotary_base, self.shape.kv_channels)
            self._put(gguf_rope.TENSOR, factors)

    def _describe(self, writer: GGUFWriter, name: str) -> None:
        from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

        shape = self.shape
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(LlamaFileType[_FILE_TYPES[self._kind]])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.add_block_count(shape.num_layers)
        writer.add_context_length(shape.max_position_embeddings)
        writer.add_embedding_length(shape.hidden_size)
        writer.add_feed_forward_length(shape.ffn_hidden_size)
        writer.add_head_count(shape.num_attention_heads)
        writer.add_head_count_kv(shape.num_query_groups)
        writer.add_key_length(shape.kv_channels)
        writer.add_value_length(shape.kv_channels)
        writer.add_rope_dimension_count(shape.kv_channels)
        writer.add_rope_freq_base(shape.rotary_base)
        writer.add_layer_norm_rms_eps(shape.layernorm_epsilon)
        writer.add_vocab_size(shape.vocab_size)
        if isinstance(scaling := shape.rope_scaling, LinearScaling):
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(scaling.factor)
        elif scaling is not None:
            numbers = [scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor]
            writer.add_array(gguf_rope.NUMBERS, [*numbers, float(scaling.original_max_position_embeddings)])

    def write(self, parameter: Parameter, tensor: torch.Tensor, layer: int | None = None) -> None:
        """Write one canonical tensor as HF's parts, with llama.cpp's order of rows."""
        name = self._taken.check(parameter, tensor, layer)
        if parameter.axes[0] == VOCAB:
            tensor = tensor[: self.shape.vocab_size]
        for hf, part in zip(parameter.hf, unfuse(parameter, tensor, self._rows), strict=True):
            heads = permuted_heads(self._family, hf, self.shape.num_attention_heads, self.shape.num_query_groups)
            self._put(self._name(hf, layer), permute(part, heads) if heads else part, name)
        self._taken.add(name)

    def _put(self, own: str, tensor: torch.Tensor, name: str | None = None) -> None:
        offset, _, kind = self._places[own]
        assert self._file is not None
        self._file.seek(self._begin + offset)
        if kind in _DTYPES:
            self._file.write(raw_bytes(checked_cast(tensor, _DTYPES[kind], name or own)))
        else:
            from gguf import GGMLQuantizationType
            from gguf.quants import quantize

            values = checked_cast(tensor, torch.float32, name or own).numpy()
            largest = float(np.abs(values).max(initial=0.0))
            if largest / 127 > 65504:  # of float16, in which the scale of a block is
                raise MinitronError(f"tensor '{name}' must have values below {127 * 65504} for Q8_0, found {largest:g}")
            self._file.write(quantize(values, GGMLQuantizationType[kind]).tobytes())

    def commit(self) -> None:
        """Check that the file is whole, and have it appear."""
        self._taken.check_all()
        assert self._file is not None
        self._file.close()
        if self._check is not None:
            self._check(self._staging.path)
        self._staging.commit()

    def abort(self) -> None:
        """Leave no trace."""
        with suppress(OSError):  # what is still to be flushed may not fit either
            if self._file is not None:
                self._file.close()
        self._staging.abort()


def _kind(dtype: torch.dtype, quantization: str | None) -> str:
    """Name of the kind of matrices, as ggml has it."""
    if quantization is not None:
        if str(quantization).lower() != Q8_0:
            raise MinitronError(
                f"quantization must be {Q8_0} or null, found {quantization!r:.80}; for others run llama-quantize on "
                "the file in 16 bits"
            )
        return "Q8_0"
    kind = next((name for name, one in _DTYPES.items() if one == dtype), None)
    if kind is None:
        raise MinitronError(f"precision must be 32, bf16 or 16 in a GGUF, found {dtype}")
    return kind


def _add_tokenizer(
    writer: GGUFWriter, vocab: Vocabulary | None, token_ids: Mapping[str, int | None], rows: int
) -> None:
    if vocab is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model(vocab.model)
    if vocab.pre is not None:
        writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    if vocab.scores:
        writer.add_token_scores(vocab.scores)
    writer.add_token_types(vocab.kinds)
    if vocab.merges:
        writer.add_token_merges(vocab.merges)
    ids: dict[str, Any] = {
        name: number
        for name in ("bos", "eos", "padding")
        if (number := token_ids.get(f"{'pad' if name == 'padding' else name}_token_id")) is not None
    }
    for name, number in (vocab.ids | ids).items():
        if isinstance(number, int) and 0 <= number < rows:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, flag in vocab.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)
    if vocab.chat_template:
        writer.add_chat_template(vocab.chat_template)
