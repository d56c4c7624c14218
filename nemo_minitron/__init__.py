"""nemo_minitron: prune a pretrained Llama-type model and distil the original into it, on NVIDIA NeMo.

The stages are functions of this package (:mod:`nemo_minitron.api`): ``nemo_minitron.prune(…)``. Some share their name
with the package that does the work; as a module, that one can be called as well, so that either is found under it.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
import warnings
from typing import Any

# Megatron-Core says it three times on import; that neither is needed is said by the README
warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (are|is) not installed")

__version__ = "0.1.0"

_CALLS = (
    *("synthesize", "convert", "preprocess", "finetune", "importance", "search", "prune", "distill", "evaluate"),
    *("generate", "report", "run"),
)
"""Functions of :mod:`nemo_minitron.api`; type checkers and editors know them from ``__init__.pyi``."""


def __getattr__(name: str) -> Any:
    """Import what is asked for only then; ``import nemo_minitron`` alone is to be quick."""
    if name in _CALLS:
        return getattr(importlib.import_module("nemo_minitron.api"), name)
    if name == "MinitronError":
        return importlib.import_module("nemo_minitron.errors").MinitronError
    raise AttributeError(f"module 'nemo_minitron' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_CALLS, "MinitronError"})


class _Package(types.ModuleType):
    """This package, which makes modules that bear the name of a call callable when they are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLS and type(value) is types.ModuleType:
            value.__class__ = _callable(name)
        super().__setattr__(name, value)


@functools.cache
def _callable(name: str) -> type[types.ModuleType]:
    def call(module: types.ModuleType, *args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module("nemo_minitron.api"), name)(*args, **kwargs)

    return type("CallableModule", (types.ModuleType,), {"__call__": call})


sys.modules[__name__].__class__ = _Package
