"""What a training is of, kept beside its checkpoints, so that nothing else is taken for its continuation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from nemo_minitron import parallel
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.distill.cache import keys_of, teacher_of
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import write_file
from nemo_minitron.registry import LOSSES

NAME = "run.json"
_LIMIT = 1 << 24
_NO_MATTER = {  # keys of model.data and distill that change speed and places, not a loss
    "data_prefix", "index_mapping_dir", "num_workers", "pin_memory", "persistent_workers", "mmap_bin_files",
    "skip_warmup", "num_dataset_builder_threads", "loss_memory_mib", "teacher_cache", "monitor",
}  # fmt: skip
_LATER = ("trainer.gradient_clip_val", "model.hidden_dropout", "model.attention_dropout")
"""Keys that records of earlier versions do not have."""
MODELS = ("model.restore_from_path", "model.kd_teacher_restore_from_path")
DATA = "model.data.data_prefix"


def content_of(path: str | Path) -> str:
    """Digest that tells the weights of two ``.nemo`` apart: of the checksums in it, else of all tensors."""
    with NemoReader(path) as reader:
        sums: Any = reader.checksums() or {"": reader.fingerprint()}
        return hashlib.sha256(json.dumps([str(reader.shape), sums], sort_keys=True).encode()).hexdigest()


def identity(
    command: str, cfg: DictConfig, job: DictConfig, teacher: str | None, contents: Mapping[str, str]
) -> dict[str, Any]:
    """All that must stay as it was when a training is resumed, by the key that says it.

    Models and data are given as ``{"is": what it is called, "content": digest}``. Number and grid of the processes,
    micro-batch, precision, validation and logging may change.

    Args:
        job: the model's config on this job. contents: :func:`data_fingerprint` by prefix.
    """
    found: dict[str, Any] = {"command": command}
    paths = dict(zip(MODELS, (cfg.model.restore_from_path, teacher), strict=True))
    for key, path in paths.items():
        found[key] = None if path is None else {"is": str(path), "content": content_of(path)}
    cache = (cfg.get("distill") or {}).get("teacher_cache")
    if (weights := _weights_of(teacher, cache)) is not None:  # a cache may stand for the teacher
        found[MODELS[1]] = {**(found[MODELS[1]] or {"is": f"the teacher of {cache}"}), "weights": weights}
    lists: Any = job.data.data_prefix
    lists = OmegaConf.to_container(lists, resolve=True)
    for split in ("train", "validation") if isinstance(lists, dict) else (None,):
        items: Any = lists if split is None else lists[split]
        what = [contents.get(item, item) if isinstance(item, str) else item for item in items]
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        found[DATA if split is None else f"{DATA}.{split}"] = {"is": str(items), "content": digest}
    found["model.data.seq_length"] = job.data.seq_length
    found["model.global_batch_size"], found["seed"] = job.global_batch_size, job.seed
    found["trainer.gradient_clip_val"] = cfg.trainer.get("gradient_clip_val") or None
    found |= {f"model.{name}": job.get(name) or 0.0 for name in ("hidden_dropout", "attention_dropout")}
    sections = {"model.data": job.data, "model.optim": job.get("optim"), "distill": cfg.get("distill")}
    for name, section in sections.items():
        found |= _flat(name, None if section is None else OmegaConf.to_container(section, resolve=True))
    if "distill.loss" in found:
        found["distill.loss"] = loss_identity(found["distill.loss"])
    return json.loads(json.dumps(found, default=str))


def _weights_of(teacher: str | None, cache: str | None) -> str | None:
    """Fingerprint of the weights that teach, by which a cache of their answers is known; None where nobody does.

    Digests that the file carries of its tensors are taken as they are, as in :func:`content_of`.
    """
    if teacher is None:
        return None if cache is None else teacher_of(cache)
    with NemoReader(teacher) as reader:
        return reader.fingerprint(trust=True)


def _differ(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    """Whether two records of a teacher, of which one may be known by a cache alone, are of two teachers."""
    for name in ("content", "weights"):
        one, other = (record and record.get(name) for record in (before, now))
        if one is not None and other is not None:
            return bool(one != other)
    return False


def loss_identity(name: str) -> str | dict[str, str]:
    """A distillation loss by its name, and by the content of its file where that is a user's own."""
    file = LOSSES.file_of(name)
    return name if file is None else {"is": name, "content": hashlib.sha256(file.read_bytes()).hexdigest()}


def _flat(name: str, value: Any) -> dict[str, Any]:
    if name.rsplit(".", 1)[-1] in _NO_MATTER:
        return {}
    if not isinstance(value, Mapping):
        return {name: value}
    return {key: item for part, inner in value.items() for key, item in _flat(f"{name}.{part}", inner).items()}


class RunRecord:
    """``run.json`` in a folder of checkpoints. Written by rank 0 alone.

    Keys: ``identity``, ``grid`` ``[TP, PP, DP]`` it began on, ``max_steps``, ``samples`` (hashes of some of the first
    training samples by their number), ``best`` (contents of the best models written), ``finished`` (``step`` and
    ``outputs``, content by path).
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.content: dict[str, Any] = {}

    def read(self) -> bool:
        """Whether there is one; it is then ``content``.

        Raises:
            MinitronError: it is damaged.
        """
        if not self.path.is_file():
            return False
        try:
            if self.path.stat().st_size > _LIMIT:
                raise ValueError(f"found {self.path.stat().st_size} bytes")
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or not isinstance(found.get("identity"), dict):
                raise ValueError("it has no identity")
        except (OSError, ValueError, RecursionError) as error:
            raise MinitronError(f"{self.path}: expected the record of a training: {error}") from None
        self.content = found
        return True

    def write(self, **changes: Any) -> None:
        """Change some keys."""
        self.content |= changes
        write_file(self.path, json.dumps(self.content, indent=1) + "\n")

    def best_contents(self) -> Sequence[str]:
        """Contents of the best models, each of which was the best of its time."""
        return self.content.get("best") or []

    def add_best(self, content: str) -> None:
        self.write(best=[*self.best_contents(), content])

    def check_identity(self, asked: Mapping[str, Any]) -> None:
        """Refuse what is not the recorded training.

        Raises:
            MinitronError: naming the first key that differs, both values and the ways out.
        """
        recorded: dict[str, Any] = self.content["identity"]
        for key in [*asked, *(key for key in recorded if key not in asked)]:
            before, now = recorded.get(key), asked.get(key)
            if before == now or (key in _LATER and key not in recorded):
                continue
            if key == MODELS[1] and not _differ(before, now):
                continue
            if isinstance(before, dict) and isinstance(now, dict):
                if before.get("content") == now.get("content") is not None:
                    continue
                same_name = before.get("is") == now.get("is")
                found = f"{now.get('is')} {'has other content now' if same_name else 'is not ' + str(before.get('is'))}"
            else:
                found = f"{_said(now)} is not {_said(before)}"
            raise MinitronError(
                f"{key}: {found}, with which the training in {self.path.parent} began; resume with that, or begin "
                "anew with exp_manager.resume_if_exists=false or in another exp_manager.explicit_log_dir"
            )


def _said(value: Any) -> str:
    return str(value.get("is")) if isinstance(value, dict) else str(value)


class KeepRecord(Callback):
    """Write the record when the data are known, and compare their order when another number of steps is asked for.

    Nothing is done in a run without checkpoints, which has no record (:meth:`begin` is not called).
    """

    def __init__(self) -> None:
        self._record: RunRecord | None = None
        self._resumed_at: int | None = None

    def begin(self, record: RunRecord, resumed_at: int | None) -> None:
        """Take the run's record; ``resumed_at`` is the step that it goes on from, None where it begins anew."""
        self._record, self._resumed_at = record, resumed_at

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse a resumption under which the first steps would have been taken on other samples.

        Raises:
            MinitronError: naming ``trainer.max_steps``.
        """
        record, model = self._record, cast(Any, module)
        if record is None or model._train_ds is None:
            return
        dataset, batch = model._train_ds, int(model.cfg.global_batch_size)
        parallel.from_first(lambda: self._compare(record, dataset, batch, trainer.max_steps))

    def _compare(self, record: RunRecord, dataset: Any, batch: int, max_steps: int) -> None:
        count = len(dataset)
        numbers = sorted({0, *(2**k for k in range(40)), *range(0, max(count, 1), max(1, count // 32))})
        if self._resumed_at is not None and record.content.get("max_steps") != max_steps:
            before = record.content.get("samples") or {}
            for number, known in before.items():
                taken = int(number) < self._resumed_at * batch
                if taken and (int(number) >= count or _hash(dataset, int(number)) != known):
                    raise MinitronError(
                        f"trainer.max_steps: over {max_steps} steps the data would have been walked in another order "
                        f"than over the {record.content.get('max_steps')} that the training in "
                        f"{record.path.parent} was laid out for, which is at step {self._resumed_at}; resume with "
                        "that number, or begin a new training from its result (model.restore_from_path) elsewhere"
                    )
        samples = {str(number): _hash(dataset, number) for number in numbers if number < count}
        record.write(samples=samples, max_steps=max_steps)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        # NeMo keeps the checkpoint that a run resumed from for ever; as any earlier one it goes when the next is there
        if self._record is not None:
            trainer.ckpt_path = None


def _hash(dataset: Any, number: int) -> str:
    return f"{int(keys_of(dataset[number]['tokens'][None])[0]):016x}"
