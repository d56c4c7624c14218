"""Speed of a model as a server has it: a prompt is read in one pass, then one token after another is made.

b batch, s tokens of a pass, V vocabulary, tp tensor-parallel ranks.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_minitron import parallel, runtime
from nemo_minitron.evaluate.energy import Meter
from nemo_minitron.jobs.progress import progress_bar
from nemo_minitron.nemo.scoring import forward_micro_batch

if TYPE_CHECKING:
    from megatron.core.inference.contexts import StaticInferenceContext

    from nemo_minitron.nemo.model import MinitronGPTModel


def throughput(
    model: MinitronGPTModel,
    batch_size: int,
    prefill_tokens: int,
    decode_tokens: int,
    repeats: int,
    seed: int,
    meter: Meter | None = None,
) -> dict[str, Any]:
    """Median speed of ``repeats`` runs over random tokens, after one that warms up.

    Every data-parallel rank serves a batch of its own at the same time; tokens are those of all of them. Any TP and PP,
    without sequence parallel, which cannot divide one token. Megatron-Core's own key-value cache is used.

    Args:
        batch_size: sequences that one replica of the model serves together.
        prefill_tokens: length of the prompt, read in one pass; logits of its last token alone.
        decode_tokens: passes of one token after it.
        meter: of energy, if that is wanted too.

    Returns:
        Settings, tokens/s of both phases, milliseconds from pass to pass while decoding, bytes of the key-value cache
        and peak bytes of the rank that needs most (on CUDA of this measurement alone, else of the process's life), and
        with a meter that works ``joules_per_token`` of both phases.
    """
    from megatron.core import parallel_state

    (module,) = model.get_model_module_list()
    module.eval()
    runtime.reset_peak_memory()
    length = prefill_tokens + decode_tokens
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.true_vocab_size, (batch_size, length), generator=generator).to(runtime.device())
    replicas = parallel_state.get_data_parallel_world_size()
    seconds, joules, cache = _measure(model, tokens, prefill_tokens, repeats, meter)
    made = {
        "prefill": batch_size * prefill_tokens * replicas,
        "decode": batch_size * decode_tokens * replicas,
    }
    middle = {phase: statistics.median(values) for phase, values in seconds.items()}
    most = torch.tensor([cache, runtime.peak_memory_bytes()], device=runtime.device())
    cache, peak = parallel.all_reduce(most, parallel.world(), "max").tolist()
    found = {
        "batch_size": batch_size,
        "prefill_tokens": prefill_tokens,
        "decode_tokens": decode_tokens,
        "repeats": repeats,
        "prefill_tokens_per_second": made["prefill"] / middle["prefill"],
        "decode_tokens_per_second": made["decode"] / middle["decode"],
        "decode_milliseconds_per_step": 1000 * middle["decode"] / decode_tokens,
        "kv_cache_bytes": cache,
        "peak_memory_bytes": peak,
    }
    if meter is not None and (total := meter.of_the_job(list(joules.values()))) is not None:
        found["joules_per_token"] = {
            phase: value / (repeats * made[phase]) for phase, value in zip(joules, total, strict=True)
        }
    return found


def _measure(
    model: MinitronGPTModel, tokens: Tensor, prefill_tokens: int, repeats: int, meter: Meter | None
) -> tuple[dict[str, list[float]], dict[str, float], int]:
    """Seconds of each run and joules of all, by phase, over ``tokens [b, s]``; and bytes of the key-value cache."""
    from megatron.core.inference.contexts import StaticInferenceContext

    seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
    joules = {"prefill": 0.0, "decode": 0.0}
    cache = 0
    with progress_bar(repeats + 1, "throughput", "run", show=torch.distributed.get_rank() == 0) as bar:
        for number in range(repeats + 1):
            context = StaticInferenceContext(*tokens.shape)
            context.materialize_only_last_token_logits = True
            for phase, passes in (
                ("prefill", [tokens[:, :prefill_tokens]]),
                ("decode", _single(tokens, prefill_tokens)),
            ):
                before, start = meter.read() if meter else None, _now()
                for part in passes:
                    step(model, part, context)
                end = _now()
                if number:
                    seconds[phase].append(end - start)
                    joules[phase] += meter.since(before) if meter and before is not None else 0.0
            cache = sum(t.nbytes for pair in context.key_value_memory_dict.values() for t in pair)
            bar.update()
    return seconds, joules, cache


def step(model: MinitronGPTModel, tokens: Tensor, context: StaticInferenceContext) -> Tensor | None:
    """Run ``tokens [b, s]`` after those that ``context`` holds, and keep them there.

    Returns:
        ``[b, 1, Vp]`` logits of the last token, whole on every rank of the last pipeline stage (``[b, s, Vp]`` if the
        context asks for all of them), None elsewhere. A server gathers them to choose a token; Megatron-Core 0.14 and
        later know no other inference.
    """
    (stage,) = model.get_model_module_list()
    offset = context.sequence_len_offset
    logits = forward_micro_batch(
        stage, tokens, lambda last: last, start=offset, inference_context=context, runtime_gather_output=True
    )
    context.sequence_len_offset += tokens.shape[1]
    context.enable_decode_mode()
    return logits


def _single(tokens: Tensor, start: int) -> list[Tensor]:
    return [tokens[:, i : i + 1] for i in range(start, tokens.shape[1])]


def _now() -> float:
    """Seconds at which every rank has come here with its device at rest."""
    runtime.synchronize()
    parallel.barrier()
    return time.perf_counter()
