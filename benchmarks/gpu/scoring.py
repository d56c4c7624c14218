"""Scoring and re-solving at the size of Llama-3.1-8B on one GPU: seconds a layer, memory, and what it comes to.

    python benchmarks/gpu/scoring.py --json OUT/gpu_scoring.json
    python benchmarks/gpu/scoring.py --tiny                                # the same code on a CPU

Weights are random, on the host, as they would be in a file that the system has cached; losses mean nothing. Parts:

* ``plain``: what ``minitron importance`` does without ranks by reconstruction, on a model of all 32 layers in memory,
  against bare forward passes over the same batches, in turns;
* ``resolve``: ranks by reconstruction and re-solved weights for hidden size 3,072 and ffn 9,216, on ``--layers`` of the
  32, with the streams of all but every third depth made again; what a layer takes, and from it what 32 do;
* ``agreement``: a small model ranked and re-solved on the GPU and on the CPU: units kept by both, and the difference of
  the two students' losses.

Each part is written to ``--json`` as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoint import LLAMA
from provenance import provenance

from nemo_minitron.model import layout
from nemo_minitron.model.layout import Parameter
from nemo_minitron.model.shape import ModelShape

TINY = LLAMA.replace(
    num_layers=4, hidden_size=64, ffn_hidden_size=224, num_attention_heads=4, num_query_groups=2, kv_channels=16,
    vocab_size=512, padded_vocab_size=512,
)  # fmt: skip


class Weights:
    """Random bf16 weights of a shape on the host, with a reader's interface; a layer's are made once."""

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        self.shape, self.dtype = shape, torch.bfloat16
        generator = torch.Generator(device).manual_seed(0)
        self._tensors: dict[tuple[str, int | None], Tensor] = {}
        for parameter in layout.parameters(shape):
            for layer in range(shape.num_layers) if parameter.per_layer else (None,):
                size = parameter.size(shape)
                tensor = torch.randn(size, device=device, generator=generator)
                tensor = 1 + 0.1 * tensor if len(size) == 1 else tensor * size[-1] ** -0.5
                if parameter is layout.PROJ_WEIGHT or parameter is layout.FC2_WEIGHT:
                    tensor *= (2 * shape.num_layers) ** -0.5
                self._tensors[parameter.key, layer] = tensor.bfloat16().cpu()

    def tensor(self, parameter: Parameter, layer: int | None = None) -> Tensor:
        return self._tensors[parameter.key, layer]

    def fingerprint(self) -> str:
        return "f" * 64


class Written(Weights):
    """A student in memory, with a writer's interface."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape, self.dtype, self._tensors = shape, torch.bfloat16, {}

    def write(self, parameter: Parameter, tensor: Tensor, layer: int | None = None) -> None:
        self._tensors[parameter.key, layer] = tensor.cpu()


class Clock:
    """Seconds between marks, with the device idle at each; peaks of memory since the last reset."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []
        self.reset()

    def reset(self) -> None:
        self.marks.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.mark()

    def mark(self, *_: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    @property
    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]

    def memory(self) -> dict[str, float]:
        found = {"host_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
        if self.device.type == "cuda":
            found["gpu_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            found["gpu_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6, help="layers of the model that is re-solved")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--parts", default="agreement,resolve,plain")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to rehearse on a CPU")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = TINY if arguments.tiny else LLAMA
    samples, length = (6, 64) if arguments.tiny else (arguments.samples, arguments.length)
    table: dict[str, Any] = {**provenance(), "torch": torch.__version__, "samples": samples, "length": length}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "agreement": lambda: agreement(device),
        "resolve": lambda: resolve(shape, arguments.layers, samples, length, device),
        "plain": lambda: plain(shape, length, device, 2 if arguments.tiny else 8),
    }
    for name in arguments.parts.split(","):
        start = time.perf_counter()
        try:
            table[name] = parts[name]() | {"part_seconds": time.perf_counter() - start}
        except Exception:  # the next part may still be measured
            table[name] = {"failed": traceback.format_exc()}
        print(name, json.dumps(table[name], indent=1).replace("\\n", "\n"), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(table, indent=2) + "\n")


# ---- ranks by reconstruction, re-solved weights ----------------------------------------------------------------------


def ranked(reader: Weights, tokens: Tensor, progress: Callable[[int], None] = lambda layers: None) -> Any:
    """Rankings by reconstruction, and what compensation needs."""
    from nemo_minitron.importance.reconstruction import measure
    from nemo_minitron.registry import METRICS

    rankings, found = measure(reader, tokens, {"reconstruction": METRICS.get("reconstruction")}, progress=progress)
    return rankings["reconstruction"], found


def student(
    reader: Weights, ranks: Any, found: Any, tokens: Tensor, target: dict[str, int], progress: Any = lambda layers: None
) -> Written:
    """The re-solved student of a target."""
    from nemo_minitron.importance.reconstruction import clipped
    from nemo_minitron.prune.choose import make_plan
    from nemo_minitron.prune.plan import Compensation
    from nemo_minitron.prune.resolve import compensate

    how = Compensation("of this benchmark", rotate="hidden_size" in target, rescale=True)
    plan = make_plan(
        reader.shape, SimpleNamespace(**ranks), target, source_fingerprint=reader.fingerprint(), compensation=how
    )
    writer = Written(plan.target)
    compensate(
        reader, plan, tokens, torch.from_numpy(clipped(found.sensitivity)).to(tokens.device), writer,
        stream_moment=torch.from_numpy(found.stream_moment), dtype=reader.dtype, progress=progress,
    )  # fmt: skip
    return writer


def resolve(shape: ModelShape, layers: int, samples: int, length: int, device: torch.device) -> dict[str, Any]:
    """Seconds of each layer, forward, backward and re-solved, and what they come to for all layers of ``shape``."""
    from nemo_minitron.importance import streams

    whole, shape = shape.num_layers, shape.replace(num_layers=min(layers, shape.num_layers))
    reader = Weights(shape, device)
    tokens = torch.randint(shape.vocab_size, (samples, length), device=device)
    steps, streams.Streams._steps = streams.Streams._steps, lambda *_: 3  # as where not all have room
    clock = Clock(device)
    try:
        ranks, found = ranked(reader, tokens, clock.mark)
    finally:
        streams.Streams._steps = steps  # type: ignore[method-assign]
    clock.mark()
    seconds, ranking_memory = clock.steps, clock.memory()
    forward, backward = seconds[1 : shape.num_layers], seconds[shape.num_layers + 1 : 2 * shape.num_layers]
    report: dict[str, Any] = {
        "layers": shape.num_layers,
        "forward_seconds": seconds[: shape.num_layers],
        "backward_seconds": seconds[shape.num_layers : 2 * shape.num_layers],
        "ranking_memory": ranking_memory,
    }
    wide = shape.hidden_size * 3 // 4, shape.ffn_hidden_size * 9 // 14
    clock.reset()
    student(reader, ranks, found, tokens, {"hidden_size": wide[0], "ffn_hidden_size": wide[1]}, clock.mark)
    clock.mark()
    solved = clock.steps
    layer = statistics.median(forward) + statistics.mean(backward) + statistics.median(solved[1:-1])
    # what is once: the head's gradient is in the first layer back, the table in the first solved, the head after it
    once = (
        seconds[shape.num_layers] - statistics.mean(backward) + solved[0] - statistics.median(solved[1:-1]) + solved[-1]
    )
    report |= {
        "solve_seconds": solved,
        "solve_memory": clock.memory(),
        "seconds_a_layer": layer,
        "seconds_once": once,
        f"seconds_of_{whole}_layers": whole * layer + once,
    }
    return report


def agreement(device: torch.device) -> dict[str, Any]:
    """A small model's units kept, and its students' losses, on this device and on the CPU."""
    from nemo_minitron.model.decoder import Rotary, read_head, read_layer
    from nemo_minitron.model.next_token import loss_sums

    shape = LLAMA.replace(
        num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, num_query_groups=4, kv_channels=32,
        vocab_size=1024, padded_vocab_size=1024,
    )  # fmt: skip
    reader = Weights(shape, torch.device("cpu"))
    tokens = torch.randint(shape.vocab_size, (32, 256), generator=torch.Generator().manual_seed(1))
    target = {"hidden_size": 192, "ffn_hidden_size": 448}
    kept, losses = [], []
    for place in (torch.device("cpu"), device):
        ranks, found = ranked(reader, tokens.to(place))
        kept.append([set(row.argsort()[-target["ffn_hidden_size"] :].tolist()) for row in ranks["ffn"]])
        small = student(reader, ranks, found, tokens.to(place), target)
        rotary, total = Rotary.of(small.shape, tokens.shape[1]), 0.0
        x = small.tensor(layout.EMBEDDING)[tokens].float()
        for number in range(small.shape.num_layers):
            x = read_layer(small, number).forward(x, rotary)
        norm, head = read_head(small)
        for sample, row in zip(x, tokens, strict=True):
            total += float(loss_sums(sample[:-1], row[1:], norm, head, shape.layernorm_epsilon)[0])
        losses.append(total / tokens[:, 1:].numel())
    same = [len(one & other) / len(one) for one, other in zip(*kept, strict=True)]
    return {"neurons_kept_by_both": same, "losses_cpu_device": losses}


# ---- plain importance against bare forward passes --------------------------------------------------------------------


def plain(shape: ModelShape, length: int, device: torch.device, batches: int) -> dict[str, Any]:
    """Medians of batches of one sample: the forward pass to logits, and with statistics collected."""
    from nemo_minitron.importance.collect import collect

    model = built(shape, length, device)
    tokens = torch.randint(shape.vocab_size, (batches, 1, length), device=device)
    positions = torch.arange(length, device=device)[None]
    clock = Clock(device)
    bare, scored = [], []
    with torch.no_grad():
        for turn in range(3):
            clock.mark()
            for batch in tokens:
                model(input_ids=batch, position_ids=positions, attention_mask=None)
            clock.mark()
            collect(model, list(tokens), shape)
            clock.mark()
            if turn:  # the first one warms up
                *_, one, other = clock.steps
                bare.append(one)
                scored.append(other)
    per_token = 1 / (batches * length)
    return {
        "bare_seconds": bare,
        "importance_seconds": scored,
        "ratio": statistics.median(scored) / statistics.median(bare),
        "bare_tokens_per_second": 1 / (statistics.median(bare) * per_token),
        **clock.memory(),
    }


def built(shape: ModelShape, length: int, device: torch.device) -> Any:
    """Megatron-Core's model of a shape with random bf16 weights, of the layers that this package builds without
    Transformer Engine."""
    from nemo_minitron import runtime

    runtime.init_distributed()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_minitron.nemo.spec import RMSNorm, layer_spec

    config = TransformerConfig(
        num_layers=shape.num_layers, hidden_size=shape.hidden_size, ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads, num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels, normalization="RMSNorm", layernorm_epsilon=shape.layernorm_epsilon,
        add_bias_linear=False, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        bias_activation_fusion=device.type == "cuda", bias_dropout_fusion=False, masked_softmax_fusion=False,
        persist_layer_norm=False, gradient_accumulation_fusion=False, hidden_dropout=0.0, attention_dropout=0.0,
        params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, bf16=True, use_cpu_initialization=False,
    )  # fmt: skip
    model = GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[layer_spec(False)] * shape.num_layers, layer_norm=RMSNorm
        ),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=length,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
    )
    return model.to(device, torch.bfloat16).eval()


if __name__ == "__main__":
    main()
