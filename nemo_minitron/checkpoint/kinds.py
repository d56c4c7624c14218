"""Checkpoints of kinds that are not read: what a folder is, and what to do with it."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.checkpoint import gguf_parts
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
    if (path / "context").is_dir() and (path / "weights").is_dir():
        return (
            "a checkpoint of NeMo 2 (context, weights); export it with NeMo 2 to a HF folder (llm.export_ckpt with "
            "target='hf') and convert that"
        )
    if has("run_config.yaml", "iter_*/run_config.yaml", "latest_train_state.pt"):
        return (
            "a checkpoint of Megatron-Bridge; export it with Megatron-Bridge to a HF folder (AutoBridge.export_ckpt) "
            "and convert that"
        )
    if has("latest_checkpointed_iteration.txt", "iter_*/common.pt", "iter_*/metadata.json", "iter_*/mp_rank_*"):
        return "a checkpoint of Megatron-LM; export it to a HF folder (with Megatron-Bridge) and convert that"
    if has("mp_rank_*", "common.pt", "__*_*.distcp"):
        return "the weights of a Megatron checkpoint without its config; export it to a HF folder and convert that"
    if has("consolidated*.pth", "consolidated*.safetensors"):
        return "weights in their maker's own format; take the HF folder of the same model, with its config.json"
    if has("*.safetensors", "pytorch_model*.bin"):
        return "weights without a config.json; take the whole folder of the model"
    ggufs = gguf_parts.inside(path)
    if len(ggufs) > 1:
        return f"{len(ggufs)} models as .gguf files; name one"
    return None
