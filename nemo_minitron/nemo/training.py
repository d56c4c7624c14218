"""One training run: trainer, experiment manager, model, best and last ``.nemo``; teacher fine-tuning and distillation
differ in the model class alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_minitron import parallel, runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.archive import ArchiveWriter
from nemo_minitron.checkpoint.training_folder import check_checkpoint
from nemo_minitron.config.schema import DistillConfig, FinetuneConfig
from nemo_minitron.config.sections import Distill
from nemo_minitron.data.masks import prove_mask, with_masks
from nemo_minitron.data.preprocess import read_facts
from nemo_minitron.data.splits import check_splits
from nemo_minitron.data.tokens import prove_tokens
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.nemo import experiment
from nemo_minitron.nemo.keep_best import FinishLoop, KeepBest
from nemo_minitron.nemo.progress import TrainingProgress
from nemo_minitron.nemo.restore import job_config, load_model
from nemo_minitron.nemo.resume import Start, decide, name_checkpoints
from nemo_minitron.nemo.run_record import KeepRecord, RunRecord, content_of, identity
from nemo_minitron.nemo.settings import settle
from nemo_minitron.nemo.trainer import build_trainer, plain
from nemo_minitron.nemo.vocabulary import check_tokens

if TYPE_CHECKING:
    from nemo_minitron.nemo.model import MinitronGPTModel


def train(
    config: FinetuneConfig | DistillConfig, cls: type[MinitronGPTModel], monitor: str = Distill.monitor
) -> MinitronGPTModel | None:
    """Run one training from a command's full config and return the trained model; None where it is done already.

    Logs every named loss to TensorBoard and CSV under the experiment's folder. A run is resumed from its last
    checkpoint with ``exp_manager.resume_if_exists=true`` (weights, optimizer, schedule, data position, best so far).

    Raises:
        MinitronError: before any weight is read: a key is missing or contradicts the checkpoint, the grid does not fit,
            data are missing, damaged or of ids that the model does not have, the output cannot be written, a teacher
            has another vocabulary, what is to be resumed is another training; later: token files of another
            vocabulary, or a loss that is not finite.
    """
    runtime.prepare()
    cfg = settle(OmegaConf.create(dataclasses.asdict(config)))
    source, keep = required(cfg, "model.restore_from_path"), KeepBest(Path(required(cfg, "model.nemo_path")), monitor)
    model_cfg = _model_section(cfg)
    teacher = cls.teacher_path(cfg)
    _check_outputs(keep, source, teacher)
    with NemoReader(source) as reader:
        job, grid = job_config(reader, model_cfg)
        _check_attention(job)
        vocab_size = reader.shape.vocab_size
        if teacher is not None:
            cls.check_teacher(teacher, reader, model_cfg)
    _settle_splits(model_cfg, cfg.trainer.get("limit_val_batches", 1.0))
    if runtime.rank() == 0:
        for output in (keep.path, keep.last_path):
            ArchiveWriter(output).abort()  # proves that it can be written, and leaves nothing
    runtime.init_distributed(*grid, seed=int(model_cfg.seed))
    prefixes = prefixes_of(model_cfg)
    contents = parallel.from_first(lambda: {prefix: prove_tokens(prefix, vocab_size) for prefix in prefixes})
    masks = parallel.from_first(lambda: {prefix: prove_mask(prefix) for prefix in prefixes})
    keep_record = KeepRecord()
    shown = [TrainingProgress(cls.command, monitor)] if cfg.trainer.get("enable_progress_bar") is not False else []
    trainer = build_trainer(cfg, [*shown, keep, keep_record])
    manager = plain(cfg.exp_manager)
    run = partial(identity, cls.command, cfg, job, teacher, with_masks(contents, masks))
    start = _start(cls.command, run, manager, trainer, keep, keep_record, grid)
    if start.done:
        return None
    _say_what_counts(cls.command, [prefix for prefix, mask in masks.items() if mask is not None])
    experiment.start(trainer, manager, start.step if start.checkpoint else None)
    if start.checkpoint is not None:
        trainer.ckpt_path = str(start.checkpoint)
    check_checkpoint(trainer.ckpt_path)
    model = load_model(source, trainer, model_cfg, cls)
    model.data_contents = contents
    check_tokens(model, prefixes, "model.data.data_prefix")
    if isinstance(config, DistillConfig):
        model.set_teacher(teacher, config.distill)
    if start.step == trainer.max_steps:
        trainer.fit_loop = FinishLoop(trainer, keep)
    trainer.fit(model)
    _say_and_record(trainer, model, keep)
    return model


def _model_section(cfg: DictConfig) -> DictConfig:
    """The run's ``model`` section, with its seed and precision."""
    model_cfg = plain(cfg.model)
    with open_dict(model_cfg):
        model_cfg.seed = cfg.seed
        model_cfg.precision = cfg.trainer.get("precision", 32)
    if model_cfg.seed < 1:
        raise MinitronError(f"seed: expected at least 1, which Megatron-Core insists on, found {model_cfg.seed}")
    return model_cfg


def _check_attention(job: DictConfig) -> None:
    """Refuse to keep documents apart where the attention kernel takes no mask of them."""
    if job.data.get("reset_attention_mask") and job.get("transformer_engine"):
        raise MinitronError(
            "model.data.reset_attention_mask=true: Transformer Engine's attention is causal over the whole sample and "
            "takes no mask of documents; set model.transformer_engine=false, and torch's attention is used"
        )


def _check_outputs(keep: KeepBest, source: str, teacher: str | None) -> None:
    """Refuse outputs that would replace what is read."""
    for name in filter(None, (source, teacher)):
        if Path(name).resolve() in (keep.path.resolve(), keep.last_path.resolve()):
            raise MinitronError(
                f"model.nemo_path: '{keep.path}' would replace '{name}', which is read; choose another name"
            )


def _settle_splits(model_cfg: DictConfig, limit_val_batches: int | float) -> None:
    """Have the data's prefixes and splits as Megatron takes them."""
    with open_dict(model_cfg):
        data = model_cfg.data
        data.data_prefix, data.splits_string = check_splits(
            data.get("data_prefix"),
            data.get("splits_string"),
            int(data.seq_length),
            int(model_cfg.global_batch_size),
            limit_val_batches,
        )


def _say_what_counts(command: str, masked: list[str]) -> None:
    """Say of how many tokens of each file with a mask a loss is: steps have fewer than batch and length make."""
    if runtime.rank() == 0:
        for prefix in masked:
            facts = read_facts(prefix)
            counted, tokens = facts["mask"]["counted"], facts["tokens"]
            print(f"{command}: a loss counts {counted:,} of the {tokens:,} tokens of {prefix}", flush=True)


def _say_and_record(trainer: Trainer, model: MinitronGPTModel, keep: KeepBest) -> None:
    """Say in a line what a training has done, and write it into the record that a later run of the same finds."""
    if keep.record is not None and parallel.is_first():
        outputs = {str(output.absolute()): content_of(output) for output in (keep.path, keep.last_path)}
        keep.record.write(finished={"step": trainer.global_step, "outputs": outputs})
    if trainer.is_global_zero:
        best = "no validation" if math.isinf(keep.best) else f"best {keep.monitor} {keep.best:.4f}"
        spent = f"{trainer.global_step} steps, {model.consumed_tokens:,} tokens"
        print(f"{spent}, {best} -> {keep.path} (last: {keep.last_path})")


def _start(
    command: str,
    identify: Callable[[], dict[str, Any]],
    manager: DictConfig,
    trainer: Trainer,
    keep: KeepBest,
    keep_record: KeepRecord,
    grid: tuple[int, int],
) -> Start:
    """Decide where to begin, say so, and have the record of a run with checkpoints begun or continued.

    Args:
        identify: makes the :func:`identity` of this run; called on rank 0 alone.
    """
    name_checkpoints(manager)
    saves = bool(manager.get("create_checkpoint_callback", True))
    if not (saves or manager.get("resume_if_exists") or manager.get("resume_from_checkpoint")):
        return Start(Path(trainer.default_root_dir))
    sizes = [*grid, runtime.world_size() // (grid[0] * grid[1])]

    def begin() -> tuple[Start, dict[str, Any]]:
        asked = identify()
        start = decide(manager, trainer, asked, sizes, (keep.path, keep.last_path))
        record = RunRecord(start.folder)
        if saves and not start.done and not (start.checkpoint and record.read()):
            record.write(identity=asked, grid=sizes, max_steps=trainer.max_steps)
        if start.line:
            print(f"{command}: {start.line}", flush=True)
        return start, record.content

    start, content = parallel.from_first(begin)
    if saves:
        keep.record = RunRecord(start.folder)
        keep.record.content = content
        keep_record.begin(keep.record, start.step if start.checkpoint else None)
    return start


def prefixes_of(model_cfg: DictConfig) -> list[str]:
    """All token files that a run's ``model.data.data_prefix`` names, each once."""
    lists = plain(model_cfg.data).data_prefix
    items = [item for part in lists.values() for item in part or []] if isinstance(lists, Mapping) else list(lists)
    return list(dict.fromkeys(item for item in items if isinstance(item, str)))
