"""Where a run takes place: device, process groups, and Megatron-Core on machines without CUDA.

This is the only module that patches another library, and it does so by explicit call; devices never when CUDA is there.
Megatron-Core and NeMo 2.4 name the CUDA device in over sixty places (``torch.cuda.current_device()``,
``Tensor.cuda()``, ``device="cuda"``, CUDA random state); :func:`install_cpu` sends these to the CPU, which is enough
for NeMo's own ``MegatronGPTModel`` to build, train, validate, save and restore over gloo. NeMo 2.4 needs Megatron-Core
0.13; without NeMo all of this holds on 0.14, 0.15 and 0.16 too (``tests/test_megatron_versions.py``). With
transformers 5 its model class is imported as well (``tests/test_transformers_versions.py``).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing.managers import SyncManager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from nemo_minitron.config.keys import SEED
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs import lifeline
from nemo_minitron.jobs.processes import place, quiet, slurm_rendezvous

_CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_installed: list[TorchFunctionMode] = []
_solo: list[torch.distributed.ProcessGroup] = []


def has_cuda() -> bool:
    """Whether this process sees a CUDA device."""
    return torch.cuda.is_available() and torch.cuda.device_count() > 0


def device() -> torch.device:
    """Device that models of this process live on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else _CPU


def backend() -> str:
    """Collective backend for :func:`device`."""
    return "nccl" if has_cuda() else "gloo"


def prepare() -> None:
    """Make Megatron-Core and NeMo usable here; call once, before importing either.

    Sets the two environment variables that they read without a default, and redirects CUDA to the CPU where there
    is none. Idempotent.
    """
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "25.09")  # NeMo matches a pattern against it, None crashes
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron-Core asks for it under TP and SP
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # checkpoint saving forks after tokenizing
    os.environ.setdefault("NEMO_TESTING", "True")  # NeMo's logger: no per-rank log files in the working directory
    quiet()
    if place() is None:
        os.environ.pop("SLURM_NTASKS", None)  # else Lightning takes the shell of an allocation for one of its tasks
    if not has_cuda():
        install_cpu()
    _reduce_scatter_in_output_dtype()
    _queue_server_holds_on()
    if int(version("transformers").partition(".")[0]) >= 5:
        _name_what_transformers_5_dropped()


def _name_what_transformers_5_dropped() -> None:
    """Put back the two names without which NeMo 2.4's language models cannot be imported; neither is used by ours.

    One is the tokenizer of a question-answering data set, the other the folder below which NeMo puts files of BERT.
    transformers 5 makes its own module anew when ``processing_utils`` is imported, and what was set before is gone.
    """
    import transformers.processing_utils
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.models.bert import tokenization_bert

    class BasicTokenizer:
        """Stands for the class that is gone; for NeMo's question answering alone."""

        def __init__(self, *given: Any, **options: Any) -> None:
            raise MinitronError("transformers must be older than 5 for NeMo's question answering (BasicTokenizer)")

    fill_missing(tokenization_bert, BasicTokenizer=BasicTokenizer)
    fill_missing(transformers, TRANSFORMERS_CACHE=HF_HUB_CACHE)


def _queue_server_holds_on() -> None:
    """Megatron-Core's saver spawns a server for its queue, which knows nothing of its parent's end and outlives it."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def results_queue() -> Any:
        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
            with lifeline.starting():
                manager.start(lifeline.hold)
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    filesystem_async._get_write_results_queue = results_queue


def _reduce_scatter_in_output_dtype() -> None:
    """Reduce-scatter in the output's dtype.

    Under autocast and sequence parallel, Megatron-Core's local layers sum bf16 gradients into a float32 buffer.
    """
    from megatron.core.tensor_parallel import layers

    scatter = layers.dist_reduce_scatter_func
    if getattr(scatter, "casts", False):
        return

    def reduce_scatter(output: torch.Tensor, given: torch.Tensor, **options: Any) -> Any:
        return scatter(output, given.to(output.dtype), **options)

    reduce_scatter.casts = True  # type: ignore[attr-defined]
    layers.dist_reduce_scatter_func = reduce_scatter


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


class _CudaToCpu(TorchFunctionMode):
    """Rewrite every CUDA device argument to the CPU; ``Tensor.cuda()`` returns the tensor itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to and any(_is_cuda(a) for a in args[1:]):
            args = tuple(_CPU if _is_cuda(a) else a for a in args)
        return func(*args, **kwargs)


class _Autocast(torch.autocast):
    """``torch.autocast`` with "cuda" read as "cpu" (Megatron-Core's schedules spell the device out)."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def install_cpu() -> None:
    """Redirect CUDA to the CPU for the rest of this process.

    Raises:
        MinitronError: if a CUDA device is present; nothing is patched then.
    """
    if has_cuda():
        raise MinitronError("install_cpu: expected a machine without CUDA, found a CUDA device")
    if _installed:
        return
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda *a, **k: None
    cuda.synchronize = lambda *a, **k: None
    cuda.empty_cache = lambda *a, **k: None
    cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    torch.autocast = _Autocast  # type: ignore[misc]
    mode = _CudaToCpu()
    mode.__enter__()
    _installed.append(mode)

    import megatron.core.tensor_parallel.random as mcore_random

    mcore_random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)

    # these were decorated with device_type="cuda" on import; under CPU autocast their backward would run without it
    from megatron.core.tensor_parallel import layers

    for function in (layers.LinearWithGradAccumulationAndAsyncCommunication, layers.LinearWithFrozenWeight):
        function.forward = staticmethod(torch.amp.custom_fwd(function.forward.__wrapped__, device_type="cpu"))
        function.backward = staticmethod(torch.amp.custom_bwd(function.backward.__wrapped__, device_type="cpu"))


def rank() -> int:
    """Global rank of this process, as torchrun or Slurm gives it; 0 when alone."""
    where = place()
    return where.rank if where else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes in this job, as torchrun or Slurm gives it; 1 when alone."""
    where = place()
    return where.world_size if where else int(os.environ.get("WORLD_SIZE", "1"))


def check_world_size(tensor_parallel: int = 1, pipeline_parallel: int = 1) -> None:
    """Refuse a grid that this job's processes do not fill.

    Raises:
        MinitronError: naming the three numbers.
    """
    size = world_size()
    if size % (tensor_parallel * pipeline_parallel):
        raise MinitronError(
            f"world size ({size}) must be a multiple of model.tensor_model_parallel_size ({tensor_parallel}) x "
            f"model.pipeline_model_parallel_size ({pipeline_parallel}); start as many processes with trainer.devices"
        )


def init_distributed(tensor_parallel: int = 1, pipeline_parallel: int = 1, seed: int = SEED) -> None:
    """Initialise torch.distributed (NCCL or gloo) and Megatron's groups, before any model is built.

    Megatron-Core's local modules look up real process groups while they are built, earlier than NeMo's
    strategy would create them. Data parallelism takes what is left: DP = world / (TP x PP).

    Raises:
        MinitronError: if the world size is not a multiple of TP x PP, or groups of another grid already exist.
    """
    prepare()
    from megatron.core import parallel_state
    from megatron.core import tensor_parallel as tp

    check_world_size(tensor_parallel, pipeline_parallel)
    size = world_size()
    if not torch.distributed.is_initialized():
        # alone there is nobody to meet: no port that another run holds, nothing left in the environment of children
        store = torch.distributed.HashStore() if size == 1 else None
        if size > 1 and "LOCAL_RANK" not in os.environ:  # Slurm; its batch script may have said where to meet
            host, port = slurm_rendezvous()
            os.environ.setdefault("MASTER_ADDR", host)
            os.environ.setdefault("MASTER_PORT", str(port))
        where = place()
        if has_cuda():
            torch.cuda.set_device(where.local_rank if where else 0)
        torch.distributed.init_process_group(backend(), store=store, rank=rank(), world_size=size)
    if parallel_state.model_parallel_is_initialized():
        found = (
            torch.distributed.get_world_size(parallel_state.get_tensor_model_parallel_group()),
            torch.distributed.get_world_size(parallel_state.get_pipeline_model_parallel_group()),
        )
        if found != (tensor_parallel, pipeline_parallel):
            raise MinitronError(
                f"expected a TP x PP grid of {(tensor_parallel, pipeline_parallel)}, this process has groups of {found}"
            )
    else:
        parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel)
    seed_everything(seed)
    tp.random.initialize_rng_tracker(force_reset=True)
    tp.model_parallel_cuda_manual_seed(seed)


@contextmanager
def whole_on_each_rank() -> Iterator[None]:
    """Let each tensor-parallel rank build or run a model alone, as if TP were 1; other groups stay as they are.

    Megatron-Core asks its global state for the tensor-parallel group while a model is built and while it runs,
    so a second model of another TP in the same job needs that state exchanged around both. All ranks must enter
    together the first time, when the groups of one are made.
    """
    from megatron.core import parallel_state

    if not _solo:
        group, _ = torch.distributed.new_subgroups(group_size=1)
        _solo.append(group)
    alone = {
        "_TENSOR_MODEL_PARALLEL_GROUP": _solo[0],
        "_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS": [torch.distributed.get_rank()],
        "_MPU_TENSOR_MODEL_PARALLEL_WORLD_SIZE": 1,
        "_MPU_TENSOR_MODEL_PARALLEL_RANK": 0,
    }
    before = {name: getattr(parallel_state, name) for name in alone}
    try:
        for name, value in alone.items():
            setattr(parallel_state, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(parallel_state, name, value)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def peak_memory_bytes() -> int:
    """Peak memory of this process in bytes: of the allocator on CUDA, resident set size otherwise."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Resident set of this process now, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_bytes() -> int:
    """Memory of this process's device: of the GPU, or of the machine."""
    if has_cuda():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory() -> None:
    """Have what this process frees serve its next tensors until it ends, instead of going back to the kernel.

    glibc asks the kernel for every large piece, which clears it page by page: up to half of a walk's CPU time, where
    each sample makes and drops the same tensors. Nothing is changed beside a GPU, with another C library, or where the
    environment sets malloc itself (``MALLOC_*``, ``GLIBC_TUNABLES``).
    """
    set_outside = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if has_cuda() or set_outside or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(option, value)


def reset_peak_memory() -> None:
    """Begin a new peak on CUDA; the resident set size of a process has one peak for its whole life."""
    if has_cuda():
        torch.cuda.reset_peak_memory_stats()


def synchronize() -> None:
    """Wait until the device has done what it was given; the CPU has."""
    if has_cuda():
        torch.cuda.synchronize()


def fill_missing(module: Any, **names: Any) -> None:
    """Define ``names`` in ``module`` where it lacks them: what NeMo takes from Apex, or from an older transformers."""
    for name, value in names.items():
        if not hasattr(module, name):
            setattr(module, name, value)
