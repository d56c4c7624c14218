"""What a GPU machine without a network needs beside its own packages, as files in one folder.

    python benchmarks/gpu/bring.py OUT_FOLDER

The machine has Python 3.12 on x86-64 with torch 2.11, triton, numpy 2 and what usually stands beside them, most in
later versions than NeMo 2.4 knows. Wheels are taken as they are; what is published as source alone becomes a wheel here
if it is plain Python. Megatron-Core goes as source: ``setup.sh`` compiles its only C++ file there. Packages that NeMo
imports and nothing here calls are no files at all: ``setup.sh`` writes them as stubs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

WHEELS = {
    "nemo_toolkit==2.4.1": "the model class, its trainer strategy and its data sets",
    "lightning==2.4.0": "NeMo's trainer; the machine's 2.6 lacks names that NeMo imports",
    "hydra-core==1.3.2": "NeMo's configs, and ours",
    "omegaconf==2.3.0": "the same",
    "transformers==4.57.6": "NeMo imports names that 5 dropped; the model of lean.py",
    "tokenizers==0.22.2": "of transformers 4.57's range",
    "huggingface_hub==0.36.2": "the same",
    "torchao==0.18.0": "8-bit moments and stochastic rounding: model.optim.name=adamw_8bit",
    "webdataset": "imported by NeMo's common data sets",
    "braceexpand": "imported by webdataset",
    "ijson": "imported by NeMo's language models",
    "fiddle": "imported by NeMo's lightning package",
    "libcst": "imported by fiddle",
    "pangu==4.0.6.1": "imported by NeMo's tokenizers; later ones lack the name",
    "nltk": "imported by NeMo's metrics",
    "gguf": "reading SmolLM2's GGUF",
}
"""Requirement, and why it travels."""

SOURCES = {
    "rouge_score==0.1.2": "imported by NeMo's metrics; the wheels of it are of an old version",
    "antlr4-python3-runtime==4.9.3": "grammar of omegaconf; published as source alone, plain Python",
}
"""Made into wheels here."""

UNPACKED = {"megatron-core==0.13.1": "layers, parallel state and optimizer; wheels are for other Pythons"}
"""Carried as source."""

LIMIT_MIB = 55

PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (34, 28, 27, 24, 17, 12, 5)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="made; what it has already is kept")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    target = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", *platforms]
    missing = []
    if pip("download", *target, "-d", str(folder), *WHEELS):
        missing += [name for name in WHEELS if pip("download", *target, "-d", str(folder), name)]
    for requirement in SOURCES:
        if pip("wheel", "-w", str(folder), requirement):
            missing.append(requirement)
    for requirement in UNPACKED:
        if pip("download", f"--no-binary={requirement.partition('==')[0]}", "-d", str(folder), requirement):
            missing.append(requirement)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    print(f"{len(list(folder.iterdir()))} files, {size:.1f} MiB")
    if missing:
        raise SystemExit(f"not to be had: {', '.join(missing)}")
    if size > LIMIT_MIB:
        raise SystemExit(f"{folder}: expected at most {LIMIT_MIB} MiB, found {size:.1f}")


def pip(command: str, *words: str) -> int:
    """Exit code of pip on one requirement, without what that requires."""
    return subprocess.run([sys.executable, "-m", "pip", command, "-q", "--no-deps", *words]).returncode


if __name__ == "__main__":
    main()
