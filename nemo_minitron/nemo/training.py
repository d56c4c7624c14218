"""One training run: trainer, experiment manager, model, best and last ``.nemo``; teacher fine-tuning and distillation
differ in the model class alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig, open_dict

from nemo_minitron import parallel, runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.archive import ArchiveWriter
from nemo_minitron.checkpoint.training_folder import check_checkpoint
from nemo_minitron.data.preprocess import read_facts
from nemo_minitron.data.splits import check_splits
from nemo_minitron.data.tokenizer import vocabulary_fingerprint
from nemo_minitron.data.tokens import prove_tokens
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.nemo import experiment
from nemo_minitron.nemo.keep_best import KeepBest
from nemo_minitron.nemo.restore import job_config, load_model
from nemo_minitron.nemo.resume import Start, decide, name_checkpoints
from nemo_minitron.nemo.run_record import KeepRecord, RunRecord, content_of, identity
from nemo_minitron.nemo.settings import settle
from nemo_minitron.nemo.trainer import build_trainer, plain

if TYPE_CHECKING:
    from nemo_minitron.nemo.model import MinitronGPTModel


def train(cfg: DictConfig, cls: type[MinitronGPTModel], monitor: str = "val_loss") -> MinitronGPTModel | None:
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
    cfg = settle(cfg)
    source = required(cfg, "model.restore_from_path")
    path = Path(required(cfg, "model.nemo_path"))
    model_cfg = plain(cfg.model)
    with open_dict(model_cfg):
        model_cfg.seed = cfg.get("seed", 1234)
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
        job, grid = job_config(reader, model_cfg)
        vocab_size = reader.shape.vocab_size
        if teacher is not None:
            cls.check_teacher(teacher, reader, model_cfg)  # type: ignore[attr-defined]
    with open_dict(model_cfg):
        data = model_cfg.data
        data.data_prefix, data.splits_string = check_splits(
            data.get("data_prefix"),
            data.get("splits_string"),
            int(data.seq_length),
            int(model_cfg.global_batch_size),
            cfg.trainer.get("limit_val_batches", 1.0),
        )
    if runtime.rank() == 0:
        for output in (path, keep.last_path):
            ArchiveWriter(output).abort()  # proves that it can be written, and leaves nothing
    runtime.init_distributed(*grid, seed=int(model_cfg.seed))
    prefixes = prefixes_of(model_cfg)
    contents = parallel.from_first(lambda: {prefix: prove_tokens(prefix, vocab_size) for prefix in prefixes})
    trainer = build_trainer(cfg, [keep])
    manager = plain(cfg.exp_manager)
    command = "distill" if hasattr(cls, "set_teacher") else "finetune"
    start = _start(command, cfg, job, manager, trainer, keep, teacher, contents, grid)
    if start.done:
        return None
    experiment.start(trainer, manager, start.step if start.checkpoint else None)
    if start.checkpoint is not None:
        trainer.ckpt_path = str(start.checkpoint)
    check_checkpoint(trainer.ckpt_path)
    model = load_model(source, trainer, model_cfg, cls)
    model.data_contents = contents
    check_tokens(model, prefixes, "model.data.data_prefix")
    if hasattr(model, "set_teacher"):
        model.set_teacher(teacher, cfg.get("distill", {}))
    if start.step == trainer.max_steps:
        _only_finish(trainer, model, keep)
    trainer.fit(model)
    if keep.record is not None and parallel.is_first():
        outputs = {str(output.absolute()): content_of(output) for output in (path, keep.last_path)}
        keep.record.write(finished={"step": trainer.global_step, "outputs": outputs})
    if trainer.is_global_zero:
        best = "no validation" if math.isinf(keep.best) else f"best {keep.monitor} {keep.best:.4f}"
        spent = f"{trainer.global_step} steps, {model.consumed_tokens:,} tokens"
        print(f"\n{spent}, {best} -> {path} (last: {keep.last_path})")
    return model


def _start(
    command: str,
    cfg: DictConfig,
    job: DictConfig,
    manager: DictConfig,
    trainer: Trainer,
    keep: KeepBest,
    teacher: str | None,
    contents: dict[str, str],
    grid: tuple[int, int],
) -> Start:
    """Decide where to begin, say so, and have the record of a run with checkpoints begun or continued."""
    name_checkpoints(manager)
    saves = bool(manager.get("create_checkpoint_callback", True))
    if not (saves or manager.get("resume_if_exists") or manager.get("resume_from_checkpoint")):
        return Start(Path(trainer.default_root_dir))
    sizes = [*grid, runtime.world_size() // (grid[0] * grid[1])]

    def begin() -> tuple[Start, dict[str, Any]]:
        asked = identity(command, cfg, job, teacher, contents)
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
        trainer.callbacks.append(KeepRecord(keep.record, start.step if start.checkpoint else None))  # type: ignore[attr-defined]
    return start


def _only_finish(trainer: Trainer, model: MinitronGPTModel, keep: KeepBest) -> None:
    """Have ``fit`` restore a run that took all its steps and write what is asked for; Lightning would do nothing."""

    def run() -> None:
        trainer.fit_loop.setup_data()
        keep.on_train_start(trainer, model)
        keep.on_train_end(trainer, model)

    trainer.fit_loop.run = run  # type: ignore[method-assign]


def prefixes_of(model_cfg: DictConfig) -> list[str]:
    """All token files that a run's ``model.data.data_prefix`` names, each once."""
    lists = plain(model_cfg.data).data_prefix
    items = [item for part in lists.values() for item in part or []] if isinstance(lists, Mapping) else list(lists)
    return list(dict.fromkeys(item for item in items if isinstance(item, str)))


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
