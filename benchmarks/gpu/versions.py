"""Imports what the GPU benchmarks stand on, and says which versions they get; the last step of ``setup.sh``."""

from __future__ import annotations

import time
from importlib.metadata import version

PACKAGES = "torch triton numpy nemo_toolkit lightning transformers tokenizers torchao hydra-core scipy pandas pyarrow"


def main() -> None:
    start = time.perf_counter()
    from nemo_minitron import runtime

    runtime.prepare()
    import torchao.optim  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    from nemo_minitron.nemo.distillation import MinitronDistillModel  # noqa: F401

    print(", ".join(f"{name} {version(name)}" for name in PACKAGES.split()))
    print(f"imports: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
