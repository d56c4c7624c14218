"""The two-model distillation step on NeMo's training loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core.pipeline_parallel import get_forward_backward_func
from nemo.utils import AppState
from omegaconf import DictConfig
from torch import Tensor

from nemo_minitron import runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.distill.fused import Head, TokenLosses, head_losses
from nemo_minitron.distill.losses import Mix
from nemo_minitron.errors import MinitronError
from nemo_minitron.nemo.model import HeadlessGPT, MinitronGPTModel
from nemo_minitron.nemo.restore import job_config, load_model

_SHARED_WITH_STUDENT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "sequence_parallel",
    "micro_batch_size",
    "encoder_seq_length",
    "precision",
    "megatron_amp_O2",
    "transformer_engine",
    "seed",
    "optim",
)


class MinitronDistillModel(MinitronGPTModel):
    """Student that learns from a frozen teacher on the same grid.

    Where the student's TP does not divide the teacher's groups or heads, the teacher runs whole on each
    tensor-parallel rank (its memory and time are then not shared out); layers go over pipeline stages unequally where
    they must.

    The teacher runs with the RoPE scaling, norms and epsilon of its own checkpoint; it has no gradients, no optimizer
    state and no DDP buffers, and is not a submodule, so neither checkpoints nor ``.to()`` of the student see it.
    Sizes may differ in every dimension but the true vocabulary.
    """

    loss_names = ("loss", "kd_loss", "lm_loss", "top1_agreement")

    def __init__(self, cfg: DictConfig, trainer: Trainer) -> None:
        super().__init__(cfg, trainer)
        self._teacher: list[HeadlessGPT] = []  # in a list, so that it is no submodule
        self._teacher_hidden: deque[Tensor] = deque()
        self._teacher_grid: Callable[[], AbstractContextManager[None]] = nullcontext
        self.mix = Mix()
        self.loss_memory_bytes: int | None = None

    @staticmethod
    def check_teacher(path: str | Path, student: NemoReader, run: DictConfig) -> None:
        """Whether a teacher can teach this student in this run, by the two files' configs and no weight.

        Raises:
            MinitronError: vocabularies differ in size; the teacher has fewer positions than a sequence is long, or
                fewer layers than there are pipeline stages.
        """
        with NemoReader(path) as teacher:
            _check_vocabularies(teacher.shape.vocab_size, student.shape.vocab_size)
            asked = {key: run[key] for key in _SHARED_WITH_STUDENT if key in run}
            asked |= {"global_batch_size": 0, "encoder_seq_length": run.data.get("seq_length")}
            if not _splits(path, int(run.get("tensor_model_parallel_size") or 1)):
                asked |= {"tensor_model_parallel_size": 1, "sequence_parallel": False}
            job_config(teacher, asked)

    def set_teacher(self, path: str | Path, distill: DictConfig | dict[str, Any]) -> None:
        """Load the teacher and check that it can teach this student.

        Raises:
            MinitronError: vocabularies or tokenizers differ, or a key of ``distill`` has a value that cannot be.
        """
        self.mix = Mix(**{f.name: distill[f.name] for f in fields(Mix) if f.name in distill})
        if distill.get("loss_memory_mib") is not None:
            self.loss_memory_bytes = int(distill["loss_memory_mib"]) << 20
        run = {key: self.cfg[key] for key in _SHARED_WITH_STUDENT if key in self.cfg} | {"global_batch_size": 0}
        if not _splits(path, self.cfg.get("tensor_model_parallel_size", 1) or 1):
            # its heads or groups do not divide over the student's ranks
            self._teacher_grid = runtime.whole_on_each_rank
            run |= {"tensor_model_parallel_size": 1, "sequence_parallel": False}
        with self._teacher_grid(), _own_app_state():
            teacher = load_model(path, self.trainer, run)
        _check_vocabularies(teacher.true_vocab_size, self.true_vocab_size)
        if teacher.tokenizer is not None and self.tokenizer is not None:
            _check_tokenizers(teacher.tokenizer, self.tokenizer)
        self._teacher = teacher.get_model_module_list()
        for module in self._teacher:
            module.requires_grad_(False).eval()

    @torch.no_grad()
    def teacher_outputs(self, batches: list[dict[str, Tensor]]) -> None:
        """Run the teacher forward over the step's micro-batches and keep its final hidden states.

        Megatron's own schedule, forward only: under pipeline parallelism the last stage ends up with one
        ``[s, b, H_t]`` per micro-batch (``[s/tp, b, H_t]`` with sequence parallel), never with logits, and the
        student's schedule then runs as it always does.
        """
        (teacher,) = self._teacher

        def forward_step(iterator: Iterator, model: torch.nn.Module) -> tuple[Tensor, Any]:
            batch = next(iterator)
            hidden = model(
                input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=None, hidden_only=True
            )
            return hidden, lambda output, non_loss_data: output

        with self._teacher_grid():
            hidden = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(batches),
                model=teacher,
                num_microbatches=len(batches),
                seq_length=batches[0]["tokens"].shape[1],
                micro_batch_size=batches[0]["tokens"].shape[0],
                forward_only=True,
                collect_non_loss_data=True,
            )
        self._teacher_hidden = deque(hidden)

    def _teacher_head(self) -> Head:
        """Kept hidden states of the next micro-batch with the teacher's output weight (last stage).

        Of a teacher that is whole on each rank, this rank's rows of the vocabulary only; its table may end before the
        student's padding does.
        """
        (teacher,) = self._teacher
        head = teacher.head(self._teacher_hidden.popleft())
        if self._teacher_grid is nullcontext:
            return head
        return Head(head.hidden, head.weight[self.vocab_start : self.vocab_start + self.vocab_part])

    def losses(self, hidden: Tensor, batch: dict[str, Tensor], weights: Tensor) -> TokenLosses:
        """Distance to the teacher mixed with cross entropy; both heads run inside."""
        (student,) = self.get_model_module_list()
        with self.autocast():
            return head_losses(
                student.head(hidden),
                batch["labels"],
                weights,
                teacher=self._teacher_head(),
                mix=self.mix,
                memory_bytes=self.loss_memory_bytes,
                **self.head_place(),
            )


def _check_vocabularies(teacher: int, student: int) -> None:
    if teacher != student:
        raise MinitronError(
            f"model.kd_teacher_restore_from_path: the teacher's vocabulary has {teacher} tokens, the student's "
            f"{student}; distillation compares them token by token"
        )


def _splits(path: str | Path, tensor_parallel: int) -> bool:
    """Whether the checkpoint's heads, groups and neurons divide over the ranks (its vocabulary is padded anew)."""
    with NemoReader(path) as reader:
        shape = reader.shape
    sizes = (shape.num_query_groups, shape.num_attention_heads, shape.ffn_hidden_size)
    return all(size % tensor_parallel == 0 for size in sizes)


@contextmanager
def _own_app_state() -> Iterator[None]:
    """Keep what NeMo remembers of the student's grid and step while another model is built."""
    state = AppState()
    before = dict(state.__dict__)
    try:
        yield
    finally:
        state.__dict__.update(before)


def _check_tokenizers(teacher: Any, student: Any) -> None:
    """Same vocabulary, token for token: equal sizes alone would let a permuted vocabulary through."""
    if not all(hasattr(getattr(t, "tokenizer", None), "get_vocab") for t in (student, teacher)):
        return  # not from transformers: sizes have been compared
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours != theirs:
        token = next(iter(sorted(t for t in {**ours, **theirs} if ours.get(t) != theirs.get(t))))
        raise MinitronError(
            f"teacher and student tokenizers differ: token {token!r} is {theirs.get(token)} for the teacher and "
            f"{ours.get(token)} for the student"
        )
