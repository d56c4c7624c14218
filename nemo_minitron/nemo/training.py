"""One training run: trainer, experiment manager, model, best and last ``.nemo``; teacher fine-tuning and distillation
differ in the model class alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig, open_dict

from nemo_minitron import runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.archive import ArchiveWriter
from nemo_minitron.checkpoint.training_folder import check_checkpoint
from nemo_minitron.data.blocks import split_lists
from nemo_minitron.data.preprocess import read_facts
from nemo_minitron.data.tokenizer import vocabulary_fingerprint
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.nemo import weights
from nemo_minitron.nemo.restore import job_config, load_model
from nemo_minitron.nemo.trainer import build_trainer, plain

if TYPE_CHECKING:
    from nemo_minitron.nemo.model import MinitronGPTModel


class KeepBest(Callback):
    """Save the best model so far after each validation, and the last one when training ends.

    ``path`` receives the best by ``monitor`` (lower is better), ``NAME.last.nemo`` beside it the last; both in the
    dtype of the checkpoint that the run started from. A run without validation has its last model in both.
    """

    def __init__(self, path: Path, monitor: str = "val_loss") -> None:
        self.path, self.monitor, self.best = path, monitor, math.inf

    @property
    def last_path(self) -> Path:
        return self.path.with_name(self.path.name.removesuffix(".nemo") + ".last.nemo")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.global_step == 0:
            return
        if self.monitor not in trainer.callback_metrics:
            raise MinitronError(
                f"distill.monitor={self.monitor!r} is not logged; known: {sorted(trainer.callback_metrics)}"
            )
        value = float(trainer.callback_metrics[self.monitor])
        if value < self.best:
            self.best = value
            self._save(module, self.path)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(module, self.last_path)
        if math.isinf(self.best):
            self._save(module, self.path)

    @staticmethod
    def _save(module: LightningModule, path: Path) -> None:
        weights.save(module, path, module.storage_dtype)  # type: ignore[arg-type]


def train(cfg: DictConfig, cls: type[MinitronGPTModel], monitor: str = "val_loss") -> MinitronGPTModel:
    """Run one training from a command's full config and return the trained model.

    Logs every named loss to TensorBoard and CSV under the experiment's folder. A run is resumed from its last
    checkpoint with ``exp_manager.resume_if_exists=true`` (weights, optimizer, schedule, data position).

    Raises:
        MinitronError: before any weight is read and anything is written: a key is missing or contradicts the
            checkpoint, the grid does not fit, data are missing, the output cannot be written, a teacher has another
            vocabulary; later: token files of another vocabulary, or a loss that is not finite.
    """
    runtime.prepare()
    source = required(cfg, "model.restore_from_path")
    path = Path(required(cfg, "model.nemo_path"))
    model_cfg = plain(cfg.model)
    with open_dict(model_cfg):
        model_cfg.seed = cfg.get("seed", 1234)
        model_cfg.data.data_prefix = split_data(model_cfg.data.get("data_prefix"))
        model_cfg.precision = cfg.trainer.get("precision", 32)
    if model_cfg.seed < 1:
        raise MinitronError(f"seed: expected at least 1, which Megatron-Core insists on, found {model_cfg.seed}")
    keep = KeepBest(path, monitor)
    teacher = None
    if hasattr(cls, "set_teacher"):
        teacher = cfg.model.get("kd_teacher_restore_from_path")
        if cfg.get("distill", {}).get("teacher_cache") is None:
            teacher = required(cfg, "model.kd_teacher_restore_from_path")
    for name in filter(None, (source, teacher)):
        if Path(name).resolve() in (path.resolve(), keep.last_path.resolve()):
            raise MinitronError(f"model.nemo_path: '{path}' would replace '{name}', which is read; choose another name")
    with NemoReader(source) as reader:
        job_config(reader, model_cfg)
        if teacher is not None:
            cls.check_teacher(teacher, reader, model_cfg)  # type: ignore[attr-defined]
    if runtime.rank() == 0:
        for output in (path, keep.last_path):
            ArchiveWriter(output).abort()  # proves that it can be written, and leaves nothing
    trainer = build_trainer(cfg, [keep])
    folder = exp_manager(trainer, cfg.get("exp_manager"))
    if folder is not None:
        trainer.loggers = [*trainer.loggers, CSVLogger(str(folder), name="", version="csv")]
    check_checkpoint(trainer.ckpt_path)
    model = load_model(source, trainer, model_cfg, cls)
    lists = plain(model_cfg.data).data_prefix
    for items in lists.values() if isinstance(lists, Mapping) else [lists]:
        check_tokens(model, [item for item in items if isinstance(item, str)], "model.data.data_prefix")
    if hasattr(model, "set_teacher"):
        model.set_teacher(teacher, cfg.get("distill", {}))
    trainer.fit(model)
    if trainer.is_global_zero:
        best = "no validation" if math.isinf(keep.best) else f"best {keep.monitor} {keep.best:.4f}"
        spent = f"{trainer.global_step} steps, {model.consumed_tokens:,} tokens"
        print(f"\n{spent}, {best} -> {path} (last: {keep.last_path})")
    return model


def check_tokens(model: MinitronGPTModel, prefixes: Sequence[str], key: str) -> None:
    """Refuse token files that were made with another vocabulary than the checkpoint's.

    Known where ``minitron preprocess`` left its record beside them; other tools' files are taken as they are.

    Raises:
        MinitronError: naming the key and the file.
    """
    tokenizer: Any = getattr(model.tokenizer, "tokenizer", None)
    if not hasattr(tokenizer, "get_vocab"):
        return
    ours = vocabulary_fingerprint(tokenizer.get_vocab())
    for prefix in prefixes:
        if not Path(f"{prefix}.json").is_file():
            continue
        theirs = read_facts(prefix)["tokenizer"]
        if theirs["fingerprint"] != ours:
            raise MinitronError(
                f"{key}: '{prefix}' was tokenized with another vocabulary ({theirs['vocab_size']} tokens) than the "
                f"checkpoint's ({len(tokenizer)}); run minitron preprocess with tokenizer.type=CHECKPOINT.nemo"
            )


def split_data(data_prefix: Any) -> Any:
    """Check ``model.data.data_prefix`` and complete it: without a test split NeMo asks for one, validation serves."""
    lists = split_lists(data_prefix)
    if isinstance(lists, dict) and not lists.get("test"):
        lists = {**lists, "test": lists["validation"]}
    return lists
