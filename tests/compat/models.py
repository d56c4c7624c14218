"""Exports of every kind that we write, made the way users make them: HF folder → ``.nemo`` → student → HF folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoint import HfReader, NemoReader, NemoWriter, each_tensor
from nemo_minitron.checkpoint.nemo_config import with_kept_layers
from nemo_minitron.convert import convert
from nemo_minitron.model.decoder import Rotary, read_head, read_layer, rms_norm
from nemo_minitron.model.layout import EMBEDDING
from nemo_minitron.model.shape import LinearScaling, ModelShape, RopeScaling
from nemo_minitron.synthetic import make_llama
from tests.compat import versions
from tests.llamas import GQA

LLAMA3 = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
BASE = GQA.replace(rotary_base=1e6, max_position_embeddings=256)
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclasses.dataclass
class Case:
    """One export.

    Attributes:
        source: shape of the model that is pruned. changes: sizes of the student, none for the model itself.
        config: keys of the source's ``config.json``. spoil: what else is done to the source's folder.
        written: architecture that the export must have. dtype: of its weights.
    """

    written: str
    source: ModelShape = BASE
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    spoil: Callable[[Path], None] | None = None
    dtype: torch.dtype = torch.float32


def chat(folder: Path) -> None:
    """A chat template in both of its places, and how to generate."""
    edit(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    edit(folder / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.9)


def saved_by_5(folder: Path) -> None:
    """All of a folder as transformers 5 writes it."""
    chat(folder)
    versions.run("5.24.0", Path(__file__).with_name("save.py"), folder)
    config = json.loads((folder / "config.json").read_text())
    assert "rope_theta" not in config and config["rope_parameters"] and "torch_dtype" not in config
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["backend"] == "tokenizers" and len(tokenizer["extra_special_tokens"]) == 2
    assert tokenizer["tokenizer_class"] in ("TokenizersBackend", "Qwen2Tokenizer")


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")


TIED = BASE.replace(share_embeddings_and_output_weights=True)
QWEN2 = TIED.replace(qkv_bias=True)
QWEN3 = TIED.replace(family="qwen3")
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
CASES: dict[str, Case] = {
    "whole": Case("LlamaForCausalLM", spoil=chat),
    "explicit head_dim": Case("LlamaForCausalLM", changes={"hidden_size": 48, "num_layers": 2}),
    "uneven": Case("MistralForCausalLM", changes={"hidden_size": 52, "ffn_hidden_size": 40}),
    "uneven, tied, llama3": Case(
        "MistralForCausalLM", TIED.replace(rope_scaling=LLAMA3, rotary_base=5e5), {"hidden_size": 52}, spoil=chat
    ),
    "uneven, linear": Case("MistralForCausalLM", BASE.replace(rope_scaling=LinearScaling(8.0)), {"hidden_size": 52}),
    "llama3": Case("LlamaForCausalLM", BASE.replace(rope_scaling=LLAMA3, rotary_base=5e5), {"num_layers": 1}),
    "bfloat16": Case("LlamaForCausalLM", TIED, {"ffn_hidden_size": 40}, dtype=torch.bfloat16),
    "qwen2": Case("Qwen2ForCausalLM", QWEN2),
    "qwen2, hidden": Case(
        "LlamaForCausalLM", QWEN2, {"hidden_size": 48}, {"use_sliding_window": False, "sliding_window": 64}
    ),
    "qwen2, hidden, uneven": Case("Qwen2ForCausalLM", QWEN2, {"hidden_size": 52}),
    "qwen2, heads": Case("LlamaForCausalLM", QWEN2, {"num_attention_heads": 4}),
    "qwen3": Case("Qwen3ForCausalLM", QWEN3, {"num_layers": 2, "ffn_hidden_size": 40}),
    "qwen3, uneven": Case("Qwen3ForCausalLM", QWEN3, {"hidden_size": 52}, spoil=chat),
    "saved by 5": Case(
        "LlamaForCausalLM",
        BASE.replace(rope_scaling=LLAMA3, rotary_base=5e5),
        {"ffn_hidden_size": 64},
        spoil=saved_by_5,
    ),
    "saved by 5, uneven": Case(
        "MistralForCausalLM", TIED.replace(rope_scaling=LLAMA3), {"hidden_size": 52}, spoil=saved_by_5
    ),
    "qwen2 saved by 5": Case("Qwen2ForCausalLM", QWEN2, {"num_layers": 2}, spoil=saved_by_5),
    "mistral": Case("MistralForCausalLM", changes={"hidden_size": 48}, config=MISTRAL),
    "mistral, uneven": Case("MistralForCausalLM", changes={"hidden_size": 52}, config=MISTRAL),
}


def make(case: Case, folder: Path) -> tuple[Path, Path]:
    """The student's ``.nemo`` and its export, in ``folder``."""
    hf = make_llama(folder / "hf", case.source, dtype=case.dtype)
    edit(hf / "config.json", **case.config)
    if case.spoil is not None:
        case.spoil(hf)
    nemo = convert(hf, folder / "teacher.nemo")
    if case.changes:
        nemo = prune(nemo, case.changes, folder / "student.nemo")
    return nemo, convert(nemo, folder / "export", verify=True)


def prune(teacher: Path, changes: dict[str, Any], path: Path) -> Path:
    """The first of every unit, the last of the layers."""
    with NemoReader(teacher) as reader:
        shape = reader.shape.replace(**changes)
        kept = range(reader.shape.num_layers)[-shape.num_layers :]
        config, tokenizer = with_kept_layers(reader.config, kept), reader.tokenizer_folder()
        with NemoWriter(path, config, shape, reader.dtype, tokenizer=tokenizer) as writer:
            for parameter, layer in each_tensor(shape):
                tensor = reader.tensor(parameter, None if layer is None else kept[layer])
                writer.write(parameter, tensor[tuple(slice(0, n) for n in parameter.size(shape))], layer)
    return path


@torch.no_grad()
def logits(nemo: Path, tokens: list[int]) -> torch.Tensor:
    """Logits ``[s, V]`` of a ``.nemo`` by the decoder of this package, in float32."""
    with NemoReader(nemo) as reader:
        rotary = Rotary.of(reader.shape, len(tokens))
        x = reader.tensor(EMBEDDING)[torch.tensor([tokens])].float()
        for number in range(reader.shape.num_layers):
            x = read_layer(reader, number).forward(x, rotary)
        norm, head = read_head(reader)
        return (rms_norm(x, norm, reader.shape.layernorm_epsilon) @ head.T)[0]


def frequencies(shape: ModelShape) -> torch.Tensor:
    """Inverse frequencies of RoPE ``[d/2]`` in float64, by the formula of Llama 3.1."""
    plain = shape.rotary_base ** -(torch.arange(0, shape.kv_channels, 2, dtype=torch.float64) / shape.kv_channels)
    if shape.rope_scaling is None:
        return plain
    scaling = shape.rope_scaling
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    turns = scaling.original_max_position_embeddings * plain / (2 * torch.pi)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0, 1)
    return share * plain + (1 - share) * plain / scaling.factor


def shape_of(folder: Path) -> ModelShape:
    """Shape that an HF folder is read to have."""
    with HfReader(folder) as reader:
        return reader.shape
