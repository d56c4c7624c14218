"""GGUF files of llama.cpp as a source of HF-named tensors, dequantised to float32 one at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_minitron.checkpoint import gguf_rope, gguf_tokenizer, known
from nemo_minitron.checkpoint.gguf_header import check_header
from nemo_minitron.checkpoint.gguf_names import permuted_heads, places, unpermute
from nemo_minitron.checkpoint.gguf_parts import check_parts, files_of
from nemo_minitron.checkpoint.hf_rope import whole
from nemo_minitron.checkpoint.keys import has_no_place
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import one_line
from nemo_minitron.model.family import Family
from nemo_minitron.registry import FAMILIES

_BIASES = {"attention_bias": "self_attn.q_proj", "mlp_bias": "mlp.up_proj"}
"""Where a bias is by which HF's keys, of families that have them, are set."""


class GgufFile:
    """One GGUF of a family that names its architecture, in one file or in parts; implements ``hf.TensorSource``.

    llama.cpp stores a Llama's query and key rows permuted for an interleaved RoPE
    (:func:`nemo_minitron.checkpoint.gguf_names.permute`), which is undone here, as transformers does when it loads a
    GGUF. An ``output.weight`` makes the model untied, whatever its HF config said.

    Raises:
        MinitronError: not a GGUF, parts that are missing or do not belong together, another architecture, RoPE factors
            of another scaling than Llama 3.1's, values of a kind that the gguf package does not dequantise.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._path, files = path, files_of(path)
        for file in files:
            check_header(file)
        try:
            readers = [GGUFReader(str(file)) for file in files]
            self._reader = readers[0]
            self._family = self._read_family()
            check_parts(files, readers)
            self._check_keys()
        except (ValueError, OSError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise MinitronError(f"{path}: expected a GGUF file, found: {one_line(error)}") from None
        self._tensors: dict[str, Any] = {}
        self._factors: Any = None
        self._places = places(self._family)
        for tensor in (tensor for reader in readers for tensor in reader.tensors):
            if not dequantised(tensor.tensor_type):
                kind = tensor.tensor_type.name
                raise MinitronError(f"{path}: tensor '{tensor.name}' has values of kind {kind}, which are not read")
            if tensor.name == gguf_rope.TENSOR and self._family.gguf in gguf_rope.ARCHITECTURES:
                self._factors = tensor
                continue
            name = self._hf_name(tensor.name)
            if name in self._tensors:
                raise MinitronError(f"{path}: tensor '{tensor.name}' must be in one part, found it in two")
            self._tensors[name] = tensor
        try:
            self.config = self._config()
        except (TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as error:
            raise MinitronError(f"{path}: expected numbers in its metadata, found: {one_line(error)}") from None
        self.generation_config: dict[str, Any] | None = None
        self.sizes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
        self.dtypes = dict.fromkeys(self._tensors, torch.float32)

    def _hf_name(self, name: str) -> str:
        layer = name.split(".")[1] if name.startswith("blk.") else ""
        place = self._places.get(name.replace(f"blk.{layer}.", "blk.N.", 1) if layer else name)
        if place is None:
            raise has_no_place(str(self._path), name, self._places)
        return place.replace(".N.", f".{layer}.", 1)

    def _value(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            if default is None:
                raise MinitronError(f"{self._path}: expected the metadata key {key}, found none")
            return default
        return field.contents()

    def _config(self) -> dict[str, Any]:
        family, begins = self._family, self._family.gguf
        heads, hidden = self._whole(f"{begins}.attention.head_count"), self._whole(f"{begins}.embedding_length")
        width = self._whole(f"{begins}.attention.key_length", hidden // heads)
        for key in (f"{begins}.attention.value_length", f"{begins}.rope.dimension_count"):
            if self._whole(key, width) != width:
                raise MinitronError(
                    f"{self._path}: {key} must be the width of a head, {width}, found {self._whole(key)}"
                )
        table = self._tensors.get("model.embed_tokens.weight")
        rows = 0 if table is None else int(table.shape[1])
        if self._whole(f"{begins}.vocab_size", rows) != rows:
            raise MinitronError(
                f"{self._path}: {begins}.vocab_size must be the rows of token_embd.weight, {rows}, found "
                f"{self._whole(f'{begins}.vocab_size')}"
            )
        base = _short_float(self._value(f"{begins}.rope.freq_base", 10000.0))
        config: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "hidden_act": "silu",
            **{key: value for key, value in family.hf_fresh.items() if value is not None and key != "pretraining_tp"},
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "hidden_size": hidden,
            "intermediate_size": self._whole(f"{begins}.feed_forward_length"),
            "num_hidden_layers": self._whole(f"{begins}.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._whole(f"{begins}.attention.head_count_kv", heads),
            "head_dim": width,
            "max_position_embeddings": self._whole(f"{begins}.context_length"),
            "rms_norm_eps": _short_float(self._value(f"{begins}.attention.layer_norm_rms_epsilon")),
            "rope_theta": base,
            "rope_scaling": self._scaling(base, width),
            "vocab_size": rows,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "torch_dtype": "float32",
            **{key: f"model.layers.0.{_BIASES[key]}.bias" in self._tensors for key in family.hf_biases},
        }
        for key in ("bos", "eos", "padding"):
            field = self._reader.get_field(f"tokenizer.ggml.{key}_token_id")
            if field is not None:
                config[f"{'pad' if key == 'padding' else key}_token_id"] = int(field.contents())
        return config

    def _scaling(self, base: float, width: int) -> dict[str, Any] | None:
        """HF's section for what the file says of scaling, if anything."""
        from gguf.quants import dequantize

        begins = self._family.gguf
        names = {"type": "scaling.type", "factor": "scaling.factor", "scale_linear": "scale_linear"}
        fields = {key: self._reader.get_field(f"{begins}.rope.{name}") for key, name in names.items()}
        said_of_it = {key: None if field is None else field.contents() for key, field in fields.items()}
        by_keys = gguf_rope.linear(said_of_it, str(self._path))
        if self._factors is None:
            return None if by_keys is None else {"rope_type": "linear", "factor": by_keys.factor}
        if by_keys is not None:
            raise MinitronError(f"{self._path}: expected one RoPE scaling, found linear and '{gguf_rope.TENSOR}'")
        context = self._whole(f"{begins}.context_length")
        said = self._whole(f"{begins}.rope.scaling.original_context_length", 8192)
        numbers = self._reader.get_field(gguf_rope.NUMBERS)
        tensor = np.array(dequantize(self._factors.data, self._factors.tensor_type), dtype=np.float32)
        scaling = gguf_rope.recovered(
            tensor,
            base,
            width,
            None if numbers is None else numbers.contents(),
            (said, 8192, context),
            str(self._path),
        )
        return None if scaling is None else {"rope_type": "llama3", **dataclasses.asdict(scaling)}

    def _read_family(self) -> Family:
        """The family whose GGUF this is."""
        architecture = self._value("general.architecture")
        family: Family | None = next((one for one in FAMILIES.every() if one.gguf == architecture), None)
        if family is None:
            names = ", ".join(one.gguf for one in FAMILIES.every() if one.gguf)
            raise MinitronError(f"{self._path}: architecture must be one of {names} in a GGUF, found '{architecture}'")
        return family

    def _check_keys(self) -> None:
        """Refuse what would change the forward pass; long texts and lists, which are a tokenizer's, are not opened."""
        found, keys = {}, known.GGUF.renamed("llama.", f"{self._family.gguf}.")
        for key, field in self._reader.fields.items():
            plain = key in keys and len(field.data) == 1
            found[key] = field.contents() if plain else None
            if key in keys.only and not plain:
                raise MinitronError(f"{self._path}: {key} must be one value, found {len(field.data)}")
        keys.check(found, str(self._path))

    def _whole(self, key: str, default: int | None = None) -> int:
        """A size; where it is a list of one for each layer, these must be the same."""
        value = self._value(key, default)
        values = set(value) if isinstance(value, list) else {value}
        if len(values) != 1:
            raise MinitronError(f"{self._path}: {key} must be the same for every layer, found {sorted(values)!r:.80}")
        return whole({key: values.pop()}, key, str(self._path))

    def get(self, name: str) -> torch.Tensor:
        from gguf.quants import dequantize

        stored = self._tensors[name]
        values = np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32)
        tensor = torch.from_numpy(values).reshape(self.sizes[name])
        config = self.config
        heads = permuted_heads(self._family, name, config["num_attention_heads"], config["num_key_value_heads"])
        return unpermute(tensor, heads) if heads else tensor

    def rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Quantised and dequantised again, for the kinds that are written."""
        from gguf.quants import dequantize, quantize

        kind = self._tensors[name].tensor_type
        return torch.from_numpy(dequantize(quantize(tensor.float().numpy(), kind), kind).astype(np.float32))

    def equal(self, first: str, second: str) -> bool:
        return torch.equal(self.get(first), self.get(second))

    def tokenizer_folder(self) -> Path | None:
        return None

    def save_tokenizer(self, folder: Path) -> None:
        """Write the HF tokenizer that the metadata describes (:mod:`nemo_minitron.checkpoint.gguf_tokenizer`)."""
        gguf_tokenizer.save(self._reader, str(self._family.gguf), self._path, folder)

    def close(self) -> None:
        """The reader maps the file and releases it with its last reference."""


def dequantised(kind: Any) -> bool:
    """Whether the gguf package has values of a kind (``GGMLQuantizationType``) as numbers."""
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except (NotImplementedError, KeyError):
        return False
    return True


def _short_float(value: float) -> float:
    """The shortest decimal that rounds to the stored float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))
