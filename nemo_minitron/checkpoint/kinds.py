"""Checkpoints of kinds that are not read: what a folder is, and what to do with it."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.checkpoint import gguf_parts
from nemo_minitron.checkpoint.megatron_place import BRIDGE, MEGATRON, NEMO2, dress_of
from nemo_minitron.errors import MinitronError


def refuse_other_kinds(path: Path, wanted: str) -> None:
    """Name the kind of a checkpoint that is not read here; return where it is none that is known.

    Args:
        wanted: what the caller reads, in the message.

    Raises:
        MinitronError: saying what lies there and how it becomes something that is read.
    """
    if path.is_file():
        found = _file(path)
    elif path.is_dir():
        found = _folder(path)
    else:
        return
    if found is not None:
        raise MinitronError(f"{path}: expected {wanted}, found {found}")


def _file(path: Path) -> str | None:
    match path.suffix:
        case ".safetensors" | ".bin" | ".pt" | ".pth" | ".json":
            return "one file of a folder; name the folder"
        case ".ckpt":
            return "a training checkpoint; name the .nemo that the training saved"
    return None


def _folder(path: Path) -> str | None:
    def has(*patterns: str) -> bool:
        return any(next(path.glob(pattern), None) is not None for pattern in patterns)

    if has("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        return (
            "a PEFT adapter, which is not applied; merge it into its model with PEFT (merge_and_unload, then "
            "save_pretrained) and convert the result"
        )
    if has("config.json"):
        return "a HF folder; make a .nemo of it with `minitron convert`" if has("*.safetensors", "*.bin") else None
    if (dress := dress_of(path)) is not None:
        kind = {NEMO2: "NeMo 2 (context, weights)", BRIDGE: "Megatron-Bridge", MEGATRON: "Megatron-LM"}[dress]
        return f"a checkpoint of {kind}; make a .nemo of it with `minitron convert`"
    if has("consolidated*.pth", "consolidated*.safetensors"):
        return "weights in their maker's own format; take the HF folder of the same model, with its config.json"
    if has("*.safetensors", "pytorch_model*.bin"):
        return "weights without a config.json; take the whole folder of the model"
    ggufs = gguf_parts.inside(path)
    if len(ggufs) > 1:
        return f"{len(ggufs)} models as .gguf files; name one"
    return None


def refuse_other_megatron(path: Path) -> None:
    """Name what a folder of Megatron's holds instead of a whole model in torch_dist; return where nothing shows it.

    Raises:
        MinitronError: saying what lies there and how it becomes something that is read.
    """

    def has(*patterns: str) -> bool:
        return any(next(path.glob(pattern), None) is not None for pattern in patterns)

    found = None
    if has("weights/adapter_metadata.json", "adapter_metadata.json", "adapter_config.json"):
        found = "adapters without their model; merge them into it (NeMo 2: llm.peft.merge_lora) and name the result"
    elif has("mp_rank_*", "release/mp_rank_*", "iter_*/mp_rank_*"):
        found = (
            "the legacy format of one file for each rank (mp_rank_*); load it in Megatron-LM on the grid that saved "
            "it, with --ckpt-convert-format torch_dist and --ckpt-convert-save FOLDER, and name that"
        )
    elif has("*.zarr*", "*/.zarray", "weights/*/.zarray"):
        found = "weights in the format zarr; load them in their Megatron and save them with --ckpt-format torch_dist"
    if found is not None:
        raise MinitronError(f"{path}: expected a torch_dist checkpoint of Megatron, found {found}")
