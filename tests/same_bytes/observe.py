"""What files of the package hold, by meaning: scores, plans, tensors, losses. Nothing of the package is imported.

Whoever changes the format of scores or plans adds a reader of the new one to ``SCORES`` or ``PLANS``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import struct
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

INSTRUCTIONS = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that choose among a CPU's vector units."""
TIMINGS = ("timing", "per_second")
SIGNS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)

# ------------------------------------------------------------------------------------------------- scores and plans

AXES = ("ffn", "heads", "groups", "hidden")
STATISTICS = (
    "block_influence",
    "residual_cosine",
    "hidden_norms",
    "ffn_rms",
    "proj_rms",
    "norm_rms",
    "residual_rms",
    "stream_moment",
    "tokens",
    "sensitivity",
)
"""Arrays of scores beside the rankings of the four axes, and ``NAME`` of what is measured where it is there."""


def _scores_1(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Format 1: the published ranking under the axes' names, that by reconstruction with ``_rank`` added."""
    found = {f"minitron/{axis}": arrays[axis] for axis in AXES}
    found |= {f"reconstruction/{axis}": arrays[f"{axis}_rank"] for axis in AXES if f"{axis}_rank" in arrays}
    return found | {name: arrays[name] for name in STATISTICS if name in arrays}


def _scores_2(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Format 2: every ranking's axes under ``rankings/RANKING/AXIS``."""
    rankings = {name.removeprefix("rankings/"): array for name, array in arrays.items() if name.startswith("rankings/")}
    return rankings | {name: arrays[name] for name in STATISTICS if name in arrays}


SCORES: dict[str, Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]] = {
    "nemo_minitron.scores/1": _scores_1,
    "nemo_minitron.scores/2": _scores_2,
}
"""Format of a scores folder → its arrays by what they mean: ``RANKING/AXIS``, or one of ``STATISTICS``."""


def scores(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(facts, arrays by meaning) of a scores folder; numbers as float64, whatever they are stored as."""
    metadata = json.loads((folder / "scores.json").read_text())
    with np.load(folder / "arrays.npz", allow_pickle=False) as file:
        arrays = SCORES[metadata["format"]]({name: file[name] for name in file.files})
    names = ("source_fingerprint", "data_fingerprint", "calibration", "shape")
    return {name: metadata[name] for name in names}, {name: array.astype("<f8") for name, array in arrays.items()}


def _plan_1(document: dict[str, Any]) -> dict[str, Any]:
    """Format 1: indices as ranges, ``0-5 7``; axes but the first two by kept layer."""
    keep = document["keep"]
    kept = {name: _indices(keep[name]) for name in ("layers", "hidden")}
    rows = {name: {str(layer): _indices(row) for layer, row in keep[name].items()} for name in AXES[:3]}
    return {
        "source": document["source"],
        "target": document["target"],
        "keep": kept | rows,
        "compensation": document.get("compensation"),
    }


PLANS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"nemo_minitron.plan/1": _plan_1}
"""Format of a plan → source, target, kept indices, compensation; what else a plan says is not compared."""


def plan(path: Path) -> dict[str, Any]:
    """What a plan keeps."""
    document = yaml.safe_load(path.read_text())
    return PLANS[document["format"]](document)


def _indices(ranges: object) -> list[int]:
    found: list[int] = []
    for piece in str(ranges).split():
        first, _, last = piece.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


# ---------------------------------------------------------------------------------------------------------- tensors


def describe(array: np.ndarray, dtype: str | None = None) -> dict[str, Any]:
    """Type, size, SHA-256 of the little-endian bytes, and a sketch for machines that round otherwise.

    Args:
        array: values as they are stored, those of bfloat16 as its 16 bits. dtype: its name where numpy has none.
    """
    data = np.ascontiguousarray(array)
    values = (data.astype("<u4") << 16).view("<f4") if dtype == "bfloat16" else data
    return {
        "dtype": dtype or str(data.dtype),
        "shape": list(data.shape),
        "sha256": hashlib.sha256(data.astype(data.dtype.newbyteorder("<")).tobytes()).hexdigest(),
        "sketch": sketch(values),
    }


def sketch(values: np.ndarray) -> list[float]:
    """Norm of an array, and the sums of its values with four fixed patterns of signs; float64, to 7 digits."""
    flat = values.astype(np.float64).ravel()
    positions = np.arange(1, flat.size + 1, dtype=np.uint64)
    signs = [1.0 - 2.0 * (positions * np.uint64(factor) >> np.uint64(63)).astype(np.float64) for factor in SIGNS]
    sums = [np.linalg.norm(flat), *(pattern @ flat for pattern in signs)]
    return [float(f"{value:.7g}") for value in sums]


def nemo_tensors(path: Path) -> dict[str, dict[str, Any]]:
    """Tensors of a ``.nemo``, by torch's own reader of distributed checkpoints."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        reader = FileSystemReader(next(Path(folder).rglob(".metadata")).parent)
        state: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        load(state, storage_reader=reader, no_dist=True)
    found = {}
    for name, tensor in sorted(state.items()):
        half = tensor.dtype == torch.bfloat16
        found[name] = describe((tensor.view(torch.uint16) if half else tensor).numpy(), "bfloat16" if half else None)
    return found


def hf_tensors(folder: Path) -> dict[str, dict[str, Any]]:
    """Tensors of a HF folder, from the bytes of its safetensors files."""
    found = {}
    kinds: dict[str, tuple[str, str | None]] = {"F32": ("<f4", None), "BF16": ("<u2", "bfloat16")}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                stored, kind = kinds[entry["dtype"]]
                first, last = (8 + size + offset for offset in entry["data_offsets"])
                found[name] = describe(np.frombuffer(data[first:last], stored).reshape(entry["shape"]), kind)
    return dict(sorted(found.items()))


# ------------------------------------------------------------------------------------------------------- all of it


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of the files of a folder by name."""
    paths = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def members(path: Path, out: Path) -> dict[str, str]:
    """SHA-256 of a ``.nemo``'s config, in which ``out`` is no matter, and of all other members."""
    others = hashlib.sha256()
    with tarfile.open(path) as archive:
        content = {
            entry.name.removeprefix("./"): archive.extractfile(entry).read() for entry in archive if entry.isfile()
        }
    config = content.pop("model_config.yaml").replace(os.fsencode(out), b"OUT")
    for name in sorted(content):
        others.update(f"{name} {len(content[name])} ".encode() + content[name])
    return {"model_config.yaml": hashlib.sha256(config).hexdigest(), "others": others.hexdigest()}


def losses(folder: Path) -> dict[str, list[str]]:
    """Columns of a training's ``metrics.csv`` as their text, but for what clocks said."""
    (path,) = folder.rglob("metrics.csv")
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    names = sorted(name for name in rows[0] if not any(word in name for word in TIMINGS))
    told = [row for row in rows if any(row[name] for name in names if name != "step")]
    return {name: [row[name] for row in told] for name in names}


def evaluated(path: Path) -> str:
    """All digits of the loss that ``evaluate`` wrote."""
    return repr(json.loads(path.read_text())["val_loss"])


def searched(folder: Path) -> dict[str, str]:
    """Candidates of a search by name: role, predicted loss and a digest of what its plan keeps."""
    found = {}
    for entry in yaml.safe_load((folder / "candidates.yaml").read_text())["candidates"]:
        kept = json.dumps(plan(folder / entry["plan"])["keep"]) if "plan" in entry else ""
        digest = hashlib.sha256(kept.encode()).hexdigest()[:16]
        found[entry["name"]] = f"{entry['role']} {entry['predicted']} {digest}"
    return found


def facts() -> dict[str, str]:
    """What floating results depend on besides the code: those of one machine's are equal, bit by bit."""
    import torch

    found = {name: version(name) for name in ("torch", "numpy", "megatron-core", "nemo_toolkit")}
    found |= {"capability": torch.backends.cpu.get_cpu_capability(), "machine": platform.machine()}
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().partition("\n\n")[0] if cpuinfo.is_file() else ""
    entries = dict(map(str.strip, line.split(":", 1)) for line in first.splitlines() if ":" in line)
    names = ("model name", "cpu family", "model", "stepping")  # a virtual machine's name may say little
    found["cpu"] = ", ".join(f"{name} {entries[name]}" for name in names if name in entries)
    return found | {name: os.environ[name] for name in INSTRUCTIONS if name in os.environ}


def observe(out: Path) -> dict[str, Any]:
    """All that ``make.py`` left in a folder, as plain values; plans are there as files."""
    found: dict[str, Any] = {"facts": facts()}
    found["models"] = {name: hf_tensors(out / name) for name in ("llama", "qwen2", "synthesized")}
    found["nemo"] = {path.stem: nemo_tensors(path) for path in sorted(out.glob("*.nemo"))}
    found["students"] = {path.stem: nemo_tensors(path) for path in sorted((out / "students").glob("*.nemo"))}
    exports = [path for path in sorted((out / "exports").glob("*")) if path.is_dir()]
    changed = [path for path in exports if path.name not in ("llama", "llama_shards", "qwen2")]  # the models again
    found["exports"] = {path.name: hf_tensors(path) for path in changed}
    found["files"] = digests(out, "tokens*") | {
        f"{path.name}/{name}": digest for path in exports for name, digest in digests(path).items()
    }
    archives = [*sorted(out.glob("*.nemo")), *sorted((out / "students").glob("*.nemo"))]
    found["members"] = {path.stem: members(path, out) for path in archives}
    measured = {path.name: scores(path) for path in sorted((out / "scores").glob("*")) if path.is_dir()}
    found["scores_facts"] = {name: told for name, (told, _) in measured.items()}
    found["scores"] = {
        name: {meaning: describe(array) for meaning, array in sorted(arrays.items())}
        for name, (_, arrays) in measured.items()
    }
    trained = [path for path in sorted((out / "trained").glob("*")) if (path / "csv").is_dir()]
    found["losses"] = {path.name: losses(path) for path in trained}
    found["evaluated"] = {path.stem: evaluated(path) for path in sorted((out / "evaluated").glob("*.json"))}
    found["searched"] = searched(out / "searched")
    copied = [found["models"]["llama"], found["models"]["qwen2"], *found["nemo"].values(), *found["exports"].values()]
    copied += [tensors for name, tensors in found["students"].items() if name.endswith("_cut")]
    for array in (array for tensors in copied for array in tensors.values()):
        del array["sketch"]  # their bits are the same on every machine
    return found
