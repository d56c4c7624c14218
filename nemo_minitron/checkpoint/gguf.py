"""GGUF files of llama.cpp as a source of HF-named tensors, dequantised to float32 one at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_minitron.checkpoint import known
from nemo_minitron.checkpoint.gguf_header import check_header
from nemo_minitron.checkpoint.hf_rope import whole
from nemo_minitron.checkpoint.keys import has_no_place
from nemo_minitron.checkpoint.kinds import split_gguf
from nemo_minitron.checkpoint.tokenizer_open import foreign
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import one_line
from nemo_minitron.model import layout
from nemo_minitron.model.family import Family
from nemo_minitron.registry import FAMILIES

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def _places(family: Family) -> dict[str, str]:
    """HF's name of each tensor that a GGUF of this family can have, ``N`` for the layer."""
    known_to_hf = {name.replace("{l}", "N") for row in layout.layer_rows(family, family.qkv_bias) for name in row.hf}
    names = {
        f"blk.N.{own}.{kind}": f"model.layers.N.{theirs}.{kind}"
        for own, theirs in (_LAYER | dict(family.gguf_names)).items()
        for kind in ("weight", "bias")
    }
    top = {f"{own}.weight": f"{theirs}.weight" for own, theirs in _TOP.items()}
    return {own: theirs for own, theirs in names.items() if theirs in known_to_hf} | top


class GgufFile:
    """One GGUF of a family that names its architecture; implements ``hf.TensorSource``.

    llama.cpp stores a Llama's query and key rows permuted for an interleaved RoPE: row pairs (2i, 2i+1) of a head are
    HF's rows (i, i + d/2). Undone here, as transformers does when it loads a GGUF.

    Raises:
        MinitronError: not a GGUF, another architecture, or RoPE scaling (a GGUF keeps its result, not its numbers).
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._path = path
        check_header(path)
        try:
            self._reader = GGUFReader(str(path))
            self._family = self._read_family()
            self._check_keys()
        except (ValueError, OSError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise MinitronError(f"{path}: expected a GGUF file, found: {one_line(error)}") from None
        self._tensors, self._places = {}, _places(self._family)
        for tensor in self._reader.tensors:
            if tensor.name.startswith("rope_freqs"):
                raise MinitronError(
                    f"{path}: expected no RoPE scaling, found tensor '{tensor.name}'; its four numbers are not in a "
                    "GGUF, convert the model's HF folder instead"
                )
            self._tensors[self._hf_name(tensor.name)] = tensor
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
            "rope_theta": _short_float(self._value(f"{begins}.rope.freq_base", 10000.0)),
            "rope_scaling": None,
            "vocab_size": rows,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "torch_dtype": "float32",
        }
        for key in ("bos", "eos", "padding"):
            field = self._reader.get_field(f"tokenizer.ggml.{key}_token_id")
            if field is not None:
                config[f"{'pad' if key == 'padding' else key}_token_id"] = int(field.contents())
        return config

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
        parts = self._value("split.count", 0)
        if parts not in (0, 1):
            raise MinitronError(f"{self._path}: expected a whole GGUF, found {split_gguf(parts, self._path.name)}")
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
        if not self._family.gguf_permuted:
            return tensor
        if name.endswith("q_proj.weight"):
            return _unpermute(tensor, self.config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            return _unpermute(tensor, self.config["num_key_value_heads"])
        return tensor

    def equal(self, first: str, second: str) -> bool:
        return torch.equal(self.get(first), self.get(second))

    def tokenizer_folder(self) -> Path | None:
        return None

    def save_tokenizer(self, folder: Path) -> None:
        """Rebuild the HF tokenizer from the GGUF's metadata with transformers."""
        from transformers import AutoTokenizer
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it advises on a Llama tokenizer's "legacy" switch, which a GGUF does not have
        try:
            with (
                tempfile.TemporaryDirectory() as alone,
                foreign(f"{self._path}: expected a tokenizer that transformers reads"),
            ):
                # by itself: transformers would take configs that lie beside the file for its own
                (Path(alone) / "model.gguf").symlink_to(self._path.absolute())
                tokenizer = AutoTokenizer.from_pretrained(
                    alone, gguf_file="model.gguf", local_files_only=True, trust_remote_code=False
                )
        finally:
            logging.set_verbosity(verbosity)
        add_bos = self._reader.get_field("tokenizer.ggml.add_bos_token")
        if add_bos is not None and hasattr(tokenizer, "add_bos_token"):
            tokenizer.add_bos_token = bool(add_bos.contents())  # transformers assumes true for every Llama
        # transformers' conversion drops the special tokens that differ from its defaults for a Llama (it gives
        # SmolLM2 the beginning-of-text token as its end), so the file's own ids are set over them.
        for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
            field = self._reader.get_field(f"tokenizer.ggml.{key}_token_id")
            if field is not None:
                setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(field.contents())))
        # The legacy format would copy the GGUF itself under the name tokenizer.model.
        tokenizer.save_pretrained(str(folder), legacy_format=False)

    def close(self) -> None:
        """The reader maps the file and releases it with its last reference."""


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """(heads·d, H) with rows paired for llama.cpp's RoPE → HF's halves."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def _short_float(value: float) -> float:
    """The shortest decimal that rounds to the stored float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))
