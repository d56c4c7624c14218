"""The two-model distillation step on NeMo's training loop; docs/distillation_step.md walks through one."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state
from omegaconf import DictConfig
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.config.sections import Distill
from nemo_minitron.data.tokenizer import vocabulary_fingerprint
from nemo_minitron.distill.cache import Identity, TeacherCache, architecture_of
from nemo_minitron.distill.fused import Head, TokenLosses, head_losses
from nemo_minitron.distill.hidden import HiddenTerm, Projection, distance, outputs_of
from nemo_minitron.distill.loss import Mix
from nemo_minitron.distill.sampled import Sampled
from nemo_minitron.distill.top_k import TopK
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.nemo import vocabulary
from nemo_minitron.nemo.anywhere import HeadlessGPT
from nemo_minitron.nemo.model import MinitronGPTModel
from nemo_minitron.nemo.restore import job_config, tokenizer_folder
from nemo_minitron.nemo.teacher import SHARED_WITH_STUDENT, Teacher


class MinitronDistillModel(MinitronGPTModel):
    """Student that learns from a frozen :class:`Teacher` on the same grid, or from the answers that one left in a
    cache. Sizes may differ in every dimension but the true vocabulary."""

    command = "distill"
    loss_names: tuple[str, ...] = ("loss", "kd_loss", "lm_loss", "top1_agreement")
    _train_ds: Any
    _validation_ds: Any

    def __init__(self, cfg: DictConfig, trainer: Trainer) -> None:
        super().__init__(cfg, trainer)
        self._teacher: list[Teacher] = []  # in a list, so that it is no submodule
        self._cache: TeacherCache | None = None
        self._teacher_path: str | Path | None = None
        self.mix = Mix()
        self.hidden_term = HiddenTerm()
        self.loss_memory_bytes: int | None = None
        self._projections: dict[tuple[int, int], Tensor] = {}
        self._student_layers: deque[dict[int, Tensor]] = deque()

    @classmethod
    def teacher_path(cls, cfg: DictConfig) -> str | None:
        """``model.kd_teacher_restore_from_path``, without which only a cache can teach."""
        if cfg.distill.teacher_cache is None:
            return required(cfg, "model.kd_teacher_restore_from_path")
        return cfg.model.get("kd_teacher_restore_from_path")

    @classmethod
    def check_teacher(cls, path: str | Path, student: NemoReader, run: DictConfig) -> None:
        """Refuse a teacher that cannot teach this student in this run, by the two files' configs and no weight.

        Raises:
            MinitronError: vocabularies differ in size; the teacher has fewer positions than a sequence is long, or
                fewer layers than there are pipeline stages.
        """
        with NemoReader(path) as teacher:
            vocabulary.check_sizes(teacher.shape.vocab_size, student.shape.vocab_size)
            asked = {key: run[key] for key in SHARED_WITH_STUDENT if key in run}
            asked |= {"global_batch_size": 0, "encoder_seq_length": run.data.get("seq_length")}
            if teacher.tokenizer_folder() is None:  # it will be taken for the student's
                asked["tokenizer"] = {"type": str(tokenizer_folder(student, run.get("tokenizer")))}
            if not teacher.shape.splits_over(int(run.get("tensor_model_parallel_size") or 1)):
                asked |= {"tensor_model_parallel_size": 1, "sequence_parallel": False}
            job_config(teacher, asked)

    def set_teacher(self, path: str | Path | None, distill: Distill) -> None:
        """Load the teacher and check that it can teach this student; with ``distill.teacher_cache`` that waits until
        it is known whether the cache has all answers.

        Raises:
            MinitronError: vocabularies or tokenizers differ, a key of ``distill`` has a value that cannot be, or
                what it asks for is not to be had together.
        """
        self.mix = Mix(**{item.name: getattr(distill, item.name) for item in fields(Mix)})
        self.hidden_term = HiddenTerm.of(distill)
        if distill.loss_memory_mib is not None:
            self.loss_memory_bytes = distill.loss_memory_mib << 20
        cache = distill.teacher_cache
        if self.hidden_term.pairs:
            self._check_hidden_term(cache)
        if cache is not None:
            self.mix.check_learns_from()
            self._cache = TeacherCache(cache, self._identity(path))
            self._teacher_path = path
            return
        if path is None:
            raise MinitronError("model.kd_teacher_restore_from_path is needed: the teacher .nemo")
        self._teacher = [Teacher(path, self)]
        self.hidden_term.check(self.shape.num_layers, self._teacher[0].shape.num_layers)

    def _check_hidden_term(self, cache: Any) -> None:
        """Refuse by name what hidden-state terms cannot go with."""
        if (self.cfg.get("pipeline_model_parallel_size", 1) or 1) > 1:
            raise MinitronError(
                f"distill.hidden_pairs needs model.pipeline_model_parallel_size=1, found "
                f"{self.cfg.pipeline_model_parallel_size}: a pair's layers may lie on different stages"
            )
        if cache is not None:
            raise MinitronError("distill.hidden_pairs needs the teacher itself: distill.teacher_cache keeps no layers")
        if self.cfg.get("activations_checkpoint_granularity") == "full":
            raise MinitronError(
                "distill.hidden_pairs needs layer outputs that model.activations_checkpoint_granularity=full throws "
                "away; selective works"
            )
        self.loss_names = (*type(self).loss_names, "hidden_loss")

    # ---- the cache --------------------------------------------------------------------------------------------------

    def _identity(self, path: str | Path | None) -> Identity:
        teacher = architecture = None
        if path is not None:
            with NemoReader(path) as reader:
                teacher, architecture = reader.fingerprint(), architecture_of(reader.shape)
        tokenizer = vocabulary.of_transformers(self.tokenizer)
        data = self.cfg.data
        lists = data.data_prefix
        parts: list[str] = [str(int(self.cfg.seed)), str(data.get("splits_string"))]
        by_split = isinstance(lists, (Mapping, DictConfig))  # then test data teach nobody
        for items in [lists[split] for split in ("train", "validation")] if by_split else [lists]:
            # weights, and what lies at the prefixes, in their order
            parts += [self.data_contents[item] if isinstance(item, str) else str(item) for item in items]
        drawn = self.mix.divergence.learns_from is Sampled
        return Identity(
            teacher=teacher,
            data=hashlib.sha256("\n".join(parts).encode()).hexdigest(),
            tokenizer="unknown" if tokenizer is None else vocabulary_fingerprint(tokenizer.get_vocab()),
            seq_length=int(data.seq_length),
            vocab_size=self.true_vocab_size,
            top_k=0 if drawn else self.mix.top_k,
            temperature=self.mix.temperature,
            samples=self.mix.teacher_samples if drawn else 0,
            reset_attention_mask=self.documents_apart,
            reset_position_ids=self.positions_restart,
            architecture=architecture,
        )

    def build_train_valid_test_datasets(self) -> Any:
        """The parent's; samples carry their number where a cache needs it, and the cache is filled."""
        datasets = super().build_train_valid_test_datasets()
        if self._cache is None:
            return datasets
        self._train_ds = _Numbered(self._train_ds)
        self._validation_ds = None if self._validation_ds is None else _Numbered(self._validation_ds)
        self._fill_cache(self._cache)
        return self._train_ds, self._validation_ds, self._test_ds

    def _fill_cache(self, cache: TeacherCache) -> None:
        """Have a teacher answer what the cache lacks, and let go of it."""
        steps, limit, batch = self.trainer.max_steps, self.trainer.limit_val_batches, self.cfg.global_batch_size
        wanted = {"train": (self._train_ds, min(len(self._train_ds), steps * batch))}
        if self._validation_ds is not None:
            whole = len(self._validation_ds)
            wanted["validation"] = (
                self._validation_ds, min(whole, limit * batch) if isinstance(limit, int) else whole
            )  # fmt: skip
        missing = sum(len(cache.missing(split, count)) for split, (_, count) in wanted.items())
        parallel.barrier()
        if not missing:
            return
        if self._teacher_path is None:
            raise MinitronError(
                f"distill.teacher_cache={cache.folder} lacks answers for this run ({missing} files); "
                "model.kd_teacher_restore_from_path must name the teacher to write them"
            )
        if torch.distributed.get_rank() == 0:
            size, total = cache.identity.bytes_per_token, sum(count for _, count in wanted.values())
            whole_size = size * total * cache.identity.seq_length
            print(f"teacher_cache: {size} bytes per token, {whole_size / 2**20:,.1f} MiB in all -> {cache.folder}")
            cache.create()
        teacher = Teacher(self._teacher_path, self)
        for split, (dataset, count) in wanted.items():
            teacher.fill(cache, split, dataset, count, int(self.cfg.micro_batch_size))
        parallel.barrier()

    # ---- one step ---------------------------------------------------------------------------------------------------

    def teacher_outputs(self, batches: list[dict[str, Tensor]]) -> None:
        """Have the teacher's answers ready for the step's micro-batches."""
        self._student_layers.clear()
        if not self._teacher:
            return
        (teacher,) = self._teacher
        pairs = self.hidden_term.pairs
        teacher.run(batches, [layer for _, layer in pairs])
        if pairs and teacher.shape.hidden_size != self.shape.hidden_size and not self._projections:
            self._fit_projections(teacher, batches)

    def student_output(self, model: HeadlessGPT, batch: dict[str, Tensor]) -> Tensor:
        if not self.hidden_term.pairs:
            return super().student_output(model, batch)
        (module,) = self.get_model_module_list()
        with outputs_of(module.decoder.layers, [layer for layer, _ in self.hidden_term.pairs]) as layers:
            output = super().student_output(model, batch)
        self._student_layers.append(layers)
        return output

    @torch.no_grad()
    def _fit_projections(self, teacher: Teacher, batches: list[dict[str, Tensor]]) -> None:
        """Fit maps from student to teacher on the first global batch of the run; checkpoints keep them."""
        fits = {pair: Projection() for pair in self.hidden_term.pairs}
        for batch, theirs in zip(batches, teacher.layer_outputs(), strict=True):
            with self.autocast():
                self.student_output(self.model, batch)
            ours = self._student_layers.pop()
            for (s, t), fit in fits.items():
                fit.add(ours[s], self._slice(theirs[t], ours[s]), self._slice(batch["loss_mask"].t(), ours[s]))
        groups = [parallel_state.get_data_parallel_group()]
        if self.cfg.get("sequence_parallel", False):
            groups.append(self.tensor_parallel_group)
        self._projections = {pair: fit.solve(*groups) for pair, fit in fits.items()}

    def _slice(self, whole: Tensor, like: Tensor) -> Tensor:
        """This rank's part of ``whole [s, …]`` where ``like`` is scattered along s and ``whole`` is not."""
        if whole.shape[0] == like.shape[0]:
            return whole
        return whole.chunk(parallel.size(self.tensor_parallel_group))[parallel_state.get_tensor_model_parallel_rank()]

    def losses(self, hidden: Tensor, batch: dict[str, Tensor], weights: Tensor) -> TokenLosses:
        """Distance to the teacher mixed with cross entropy, both heads inside; and that of hidden states."""
        (student,) = self.get_model_module_list()
        theirs: dict[int, Tensor] = {}
        teacher: Head | TopK | Sampled
        if self._cache is not None:
            split = "train" if torch.is_grad_enabled() else "validation"
            found = self._cache.read(split, batch["sample_id"], batch["tokens"])
            teacher = type(found)(*(x.to(hidden.device) for x in found))
        else:
            teacher, theirs = self._teacher[0].next_head()
        with self.autocast():
            found_losses = head_losses(
                student.head(hidden),
                batch["labels"],
                weights,
                teacher=teacher,
                mix=self.mix,
                memory_bytes=self.loss_memory_bytes,
                **self.head_place(),
            )
        if not self.hidden_term.pairs:
            return found_losses
        return self._with_hidden_term(found_losses, self._student_layers.popleft(), theirs, weights)

    def _with_hidden_term(
        self, losses: TokenLosses, ours: dict[int, Tensor], theirs: dict[int, Tensor], weights: Tensor
    ) -> TokenLosses:
        """Add the term; under sequence parallelism each rank has that of its own tokens, and their gradient."""
        term = self.hidden_term
        total = torch.zeros((), device=weights.device)
        for pair in term.pairs:
            x = ours[pair[0]]
            projection = self._projections.get(pair)
            projection = None if projection is None else projection.to(x.device)
            total = total + distance(x, self._slice(theirs[pair[1]], x), projection, term.kind)
        loss = losses.loss + term.weight * (total * self._slice(weights.t(), total)).sum()
        per_token = total.detach()
        if per_token.shape[0] != weights.shape[1]:
            per_token = parallel.all_gather(per_token, self.tensor_parallel_group)
        terms = dict(losses.terms)
        terms["hidden_loss"] = per_token.t()
        terms["loss"] = terms["loss"] + term.weight * per_token.t()
        return TokenLosses(loss, terms)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._projections:
            checkpoint["hidden_projections"] = self._projections

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._projections = checkpoint.get("hidden_projections", {})
        super().on_load_checkpoint(checkpoint)


class _Numbered:
    """A data set whose samples carry their number as ``sample_id``."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int | None) -> dict[str, Any]:
        return {**self._dataset[number], "sample_id": 0 if number is None else int(number)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))
