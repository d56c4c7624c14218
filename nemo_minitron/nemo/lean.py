"""AdamW with 8-bit moments for NeMo's registry of optimizers: ``model.optim.name=adamw_8bit``.

The algorithm is that of ``torchao.optim.AdamW8bit``: moments as codes of a dynamic map, a scale to every 256
(`arXiv 2110.02861 <https://arxiv.org/abs/2110.02861>`_), and stochastic rounding of bf16 parameters. Codes, map and
rounding are torchao's. Its optimizer is not taken, since it wants learning rates as tensors where NeMo's schedules set
numbers, compiles a kernel for each shape of parameter, draws from torch's generator what a resumed run must draw
again, and keeps moments in a class that Megatron-Core's checkpoints cannot hold. Importing this module imports torchao.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from nemo.core.config.optimizers import AdamWParams
from nemo.core.optim import optimizers
from torch import Tensor
from torch.optim import Optimizer
from torchao.optim.quant_utils import _fp32_to_bf16_sr as rounded_stochastically
from torchao.optim.quant_utils import create_dynamic_map, quantize_8bit_with_qmap, scale_tensor

from nemo_minitron import runtime
from nemo_minitron.nemo.settings import note
from nemo_minitron.values.model import LEAN

BLOCK = 256
"""Values that share a scale."""

LEAST = 4096
"""Parameters with fewer values, or a number that :data:`BLOCK` does not divide, have float32 moments."""

PIECE = 1 << 15
"""Blocks that are updated at once, so that what an update holds in float32 does not grow with the parameter."""

MOMENTS = ("exp_avg", "exp_avg_sq")

Fixed = tuple[float, float, float]
"""β₁, β₂ and ε."""


@dataclass
class LeanAdamWParams(AdamWParams):
    """Arguments of :class:`LeanAdamW` as NeMo's registry keeps them."""

    seed: int = 1


class LeanAdamW(Optimizer):
    """AdamW whose moments take one byte a value and four per 256 values; no copy of the parameters is kept.

    bf16 parameters are rounded stochastically, float32 ones not at all. Gradients are ``.grad`` in the parameters'
    dtype; the update is computed in float32. Small moments (:data:`LEAST`) are float32, of which there are few: in the
    parameters' bf16, as torchao has them, a second moment stays where it is once β₂ is near 1.

    A parameter's state is ``exp_avg`` and ``exp_avg_sq``, uint8 in its shape, and ``…_scale``, float32
    ``[values / 256]``; of small ones the first two alone, float32. The number of steps is its group's ``step``.

    Args:
        params, lr, betas, eps, weight_decay: as of ``torch.optim.AdamW``.
        seed: the rounding of a step is drawn from it and the step's number alone, so that data-parallel ranks stay
            alike and a resumed run rounds as one that was never stopped; torch's generators are left as they were.

    Raises:
        ValueError: ``amsgrad``, which needs a third moment.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        seed: int = 1,
    ) -> None:
        if amsgrad:
            raise ValueError("amsgrad needs a third moment, which this optimizer does not keep")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        self.seed = seed

    def begin(self) -> None:
        """Make the moments, all 0, of parameters that have none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = dict(_moments(parameter))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; return what ``closure`` returned, which is called before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin()
        for group in self.param_groups:
            group["step"] += 1
        with _drawing_from(self.seed, self.param_groups[0]["step"]):
            for group in self.param_groups:
                numbers, fixed = _numbers(group), (*group["betas"], group["eps"])
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        _update(parameter, self.state[parameter], numbers, fixed)
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take a state bit by bit, where torch would cast it to the parameters' dtype."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.begin()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, saved in state_dict["state"].items():
            for name, tensor in self.state[parameters[index]].items():
                tensor.copy_(saved[name])

    def sharded_state_dict(self) -> dict[str, Any]:
        """The state for Megatron-Core's checkpoints, of a grid without tensor or pipeline ranks.

        Tensors are named by the parameter's number, since a moment's scales have no shape that could be cut with the
        parameter; data-parallel ranks hold replicas.
        """
        self.begin()
        found, replica = self.state_dict(), parallel_state.get_data_parallel_rank(with_context_parallel=True)
        found["state"] = {
            index: {
                name: ShardedTensor.from_rank_offsets(f"optimizer.state.{name}.{index}", tensor, replica_id=replica)
                for name, tensor in state.items()
            }
            for index, state in found["state"].items()
        }
        found["param_groups"] = [
            group | {"params": LocalNonpersistentObject(group["params"])} for group in found["param_groups"]
        ]
        return found


def register() -> None:
    """Have NeMo know the optimizer by its name, ``adamw_8bit``."""
    if LEAN not in optimizers.AVAILABLE_OPTIMIZERS:
        optimizers.register_optimizer(LEAN, LeanAdamW, LeanAdamWParams)


def _moments(parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    small = parameter.numel() < LEAST or parameter.numel() % BLOCK != 0
    for name in MOMENTS:
        yield name, torch.zeros_like(parameter, dtype=torch.float32 if small else torch.uint8)
        if not small:
            yield f"{name}_scale", torch.zeros(parameter.numel() // BLOCK, device=parameter.device)


def _numbers(group: Mapping[str, Any]) -> Tensor:
    """What a step's update is made with, ``[3]`` on the parameters' device, so that it is not compiled in: the share
    that weights keep, the rate with the first moment's bias in it, the root of the second moment's bias."""
    (beta1, beta2), rate, step = group["betas"], float(group["lr"]), group["step"]
    found = [1 - rate * group["weight_decay"], rate / (1 - beta1**step), (1 - beta2**step) ** 0.5]
    return torch.tensor(found, dtype=torch.float32, device=group["params"][0].device)


def _update(parameter: Tensor, state: Mapping[str, Tensor], numbers: Tensor, fixed: Fixed) -> None:
    gradient, moments = parameter.grad, [state[name] for name in MOMENTS]
    assert gradient is not None
    if len(state) == len(MOMENTS):
        values, *updated = _adamw(parameter, gradient, moments[0], moments[1], numbers, fixed)
        for moment, value in zip(moments, updated, strict=True):
            moment.copy_(value)
        parameter.copy_(_in(parameter.dtype, values))
        return
    scales, maps = [state[f"{name}_scale"] for name in MOMENTS], _maps(parameter.device)
    rows, codes = parameter.detach().view(-1, BLOCK), [moment.view(-1, BLOCK) for moment in moments]
    update, gradient = _compiled(parameter.device, parameter.dtype, fixed), gradient.reshape(-1, BLOCK)
    for start in range(0, len(rows), PIECE):
        piece = slice(start, start + PIECE)
        held = [(c[piece], scale[piece], of) for c, scale, of in zip(codes, scales, maps, strict=True)]
        update(rows[piece], gradient[piece], held, numbers, fixed)


def _adamw(
    parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, numbers: Tensor, fixed: Fixed
) -> tuple[Tensor, Tensor, Tensor]:
    """New values of a parameter and its moments in float32, all of one shape."""
    (kept, rate, root), (beta1, beta2, eps) = numbers.unbind(), fixed
    gradient = gradient.float()
    first, second = first.lerp(gradient, 1 - beta1), second.lerp(gradient.square(), 1 - beta2)
    return parameter.float() * kept - rate * first / (second.sqrt() / root + eps), first, second


def _adamw_8bit(
    parameter: Tensor, gradient: Tensor, held: Sequence[tuple[Tensor, Tensor, Tensor]], numbers: Tensor, fixed: Fixed
) -> None:
    """Update blocks in place: parameter and gradient ``[n, 256]``, and of each moment codes ``[n, 256]``, scales
    ``[n]`` and what the codes mean, ``[256]``."""
    (first, second) = (codes_map[codes.int()] * scale.view(-1, 1) for codes, scale, codes_map in held)
    values, *updated = _adamw(parameter, gradient, first, second, numbers, fixed)
    for (codes, scale, codes_map), moment in zip(held, updated, strict=True):
        scaled, new_scale = scale_tensor(moment, BLOCK)
        codes.copy_(quantize_8bit_with_qmap(scaled, codes_map))
        scale.copy_(new_scale)
    parameter.copy_(_in(parameter.dtype, values))


def _in(dtype: torch.dtype, values: Tensor) -> Tensor:
    return rounded_stochastically(values) if dtype == torch.bfloat16 else values


@contextmanager
def _drawing_from(seed: int, step: int) -> Iterator[None]:
    """Have torch's generators begin anew for a step, and be as they were after it."""
    mixed = (seed * 0x9E3779B1 + step) % 2**63  # of a CPU's seed the lower 32 bits count
    with torch.random.fork_rng([torch.cuda.current_device()] if runtime.has_cuda() else []):
        torch.default_generator.manual_seed(mixed)
        if runtime.has_cuda():
            torch.cuda.manual_seed(mixed)
        yield


@cache
def _maps(device: torch.device) -> tuple[Tensor, Tensor]:
    """Values of the codes of a first and a second moment, ``[256]`` each, ascending."""
    signed, unsigned = (torch.tensor(create_dynamic_map(signed=sign), device=device) for sign in (True, False))
    return signed, unsigned


@cache
def _compiled(device: torch.device, dtype: torch.dtype, fixed: Fixed) -> Callable[..., None]:
    """:func:`_adamw_8bit`, compiled once for any number of blocks, where a compiler works.

    Without one, dozens of elementwise operations are made one after the other, which a note says.
    """
    if torch._dynamo.config.disable:  # TORCH_COMPILE_DISABLE=1
        return _adamw_8bit
    compiled = torch.compile(_adamw_8bit, fullgraph=True)
    rows, gradient = (torch.zeros(16, BLOCK, dtype=dtype, device=device) for _ in range(2))
    held = [
        (torch.zeros(16, BLOCK, dtype=torch.uint8, device=device), torch.zeros(16, device=device), codes_map)
        for codes_map in _maps(device)
    ]
    for tensor in (rows, gradient, *(tensor for moment in held for tensor in moment[:2])):
        torch._dynamo.mark_dynamic(tensor, 0)
    try:
        compiled(rows, gradient, held, torch.ones(3, device=device), fixed)
    except Exception as error:  # what a missing or broken compiler raises differs from one backend to the next
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        note(f"model.optim.name={LEAN} runs uncompiled, and more slowly: {reason}")
        return _adamw_8bit
    return compiled
