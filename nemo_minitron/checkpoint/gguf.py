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
from nemo_minitron.checkpoint.kinds import split_gguf
from nemo_minitron.checkpoint.known import has_no_place
from nemo_minitron.checkpoint.tokenizer_open import foreign
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import one_line

_ARCHITECTURES = {"llama": "LlamaForCausalLM"}
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


class GgufFile:
    """One GGUF of architecture ``llama``; implements ``hf.TensorSource``.

    llama.cpp stores query and key rows permuted for its interleaved RoPE: row pairs (2i, 2i+1) of a head are HF's rows
    (i, i + d/2). Undone here, as transformers does when it loads a GGUF.

    Raises:
        MinitronError: not a GGUF, another architecture, or RoPE scaling (a GGUF keeps its result, not its numbers).
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._path = path
        check_header(path)
        try:
            self._reader = GGUFReader(str(path))
            self._check_keys()
        except (ValueError, OSError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise MinitronError(f"{path}: expected a GGUF file, found: {one_line(error)}") from None
        self._tensors = {}
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
        stem = name.removesuffix(".weight")
        if stem in _TOP and stem != name:
            return f"{_TOP[stem]}.weight"
        parts = stem.split(".")
        if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER and stem != name:
            return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight"
        layer = [f"blk.N.{own}.weight" for own in _LAYER]
        raise has_no_place(str(self._path), name, [*layer, *(f"{own}.weight" for own in _TOP)])

    def _value(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            if default is None:
                raise MinitronError(f"{self._path}: expected the metadata key {key}, found none")
            return default
        return field.contents()

    def _config(self) -> dict[str, Any]:
        architecture = self._value("general.architecture")
        heads, hidden = self._whole("llama.attention.head_count"), self._whole("llama.embedding_length")
        width = self._whole("llama.attention.key_length", hidden // heads)
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if self._whole(key, width) != width:
                raise MinitronError(
                    f"{self._path}: {key} must be the width of a head, {width}, found {self._whole(key)}"
                )
        table = self._tensors.get("model.embed_tokens.weight")
        rows = 0 if table is None else int(table.shape[1])
        if self._whole("llama.vocab_size", rows) != rows:
            raise MinitronError(
                f"{self._path}: llama.vocab_size must be the rows of token_embd.weight, {rows}, found "
                f"{self._whole('llama.vocab_size')}"
            )
        config: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[architecture]],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "hidden_size": hidden,
            "intermediate_size": self._whole("llama.feed_forward_length"),
            "num_hidden_layers": self._whole("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._whole("llama.attention.head_count_kv", heads),
            "head_dim": width,
            "max_position_embeddings": self._whole("llama.context_length"),
            "rms_norm_eps": _short_float(self._value("llama.attention.layer_norm_rms_epsilon")),
            "rope_theta": _short_float(self._value("llama.rope.freq_base", 10000.0)),
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

    def _check_keys(self) -> None:
        """Refuse what would change the forward pass; long texts and lists, which are a tokenizer's, are not opened."""
        architecture, parts = self._value("general.architecture"), self._value("split.count", 0)
        if architecture not in _ARCHITECTURES:
            raise MinitronError(
                f"{self._path}: architecture must be one of {', '.join(_ARCHITECTURES)} in a GGUF, found "
                f"'{architecture}'"
            )
        if parts not in (0, 1):
            raise MinitronError(f"{self._path}: expected a whole GGUF, found {split_gguf(parts, self._path.name)}")
        found = {}
        for key, field in self._reader.fields.items():
            plain = key in known.GGUF and len(field.data) == 1
            found[key] = field.contents() if plain else None
            if key in known.GGUF.only and not plain:
                raise MinitronError(f"{self._path}: {key} must be one value, found {len(field.data)}")
        known.GGUF.check(found, str(self._path))

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
