"""The two-model distillation step on NeMo's training loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from megatron.core.pipeline_parallel import get_forward_backward_func
from omegaconf import DictConfig
from torch import Tensor

from nemo_minitron.distill.losses import TokenLosses, distillation_losses
from nemo_minitron.errors import MinitronError
from nemo_minitron.nemo.model import MinitronGPTModel
from nemo_minitron.nemo.restore import load_model
from nemo_minitron.nemo.trainer import autocast

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_SHARED_WITH_STUDENT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "sequence_parallel",
    "micro_batch_size",
    "global_batch_size",
    "encoder_seq_length",
    "precision",
    "megatron_amp_O2",
    "transformer_engine",
    "seed",
    "optim",
)


class MinitronDistillModel(MinitronGPTModel):
    """Student that learns from a frozen teacher on the same grid.

    The teacher runs with the RoPE scaling, norms and epsilon of its own checkpoint; it has no gradients, no optimizer
    state and no DDP buffers, and is not a submodule, so neither checkpoints nor ``.to()`` of the student see it.
    Sizes may differ in every dimension but the true vocabulary.
    """

    loss_names = ("loss", "kd_loss", "lm_loss", "top1_agreement")

    def __init__(self, cfg: DictConfig, trainer: Trainer) -> None:
        super().__init__(cfg, trainer)
        self._teacher: list[GPTModel] = []  # in a list, so that it is no submodule
        self._teacher_hidden: deque[Tensor] = deque()
        self.distill: dict[str, Any] = {}

    def set_teacher(self, path: str | Path, distill: DictConfig | dict[str, Any]) -> None:
        """Load the teacher and check that it can teach this student.

        Raises:
            MinitronError: vocabularies or tokenizers differ.
        """
        run = {key: self.cfg[key] for key in _SHARED_WITH_STUDENT if key in self.cfg}
        teacher = load_model(path, self.trainer, run)
        if teacher.true_vocab_size != self.true_vocab_size:
            raise MinitronError(
                f"model.kd_teacher_restore_from_path: the teacher's vocabulary has {teacher.true_vocab_size} tokens, "
                f"the student's {self.true_vocab_size}; distillation compares them token by token"
            )
        if teacher.tokenizer is not None and self.tokenizer is not None:
            _check_tokenizers(teacher.tokenizer, self.tokenizer)
        self._teacher = teacher.get_model_module_list()
        for module in self._teacher:
            module.requires_grad_(False).eval()
            module.post_process = False  # its forward then ends with the final norm; the head runs with the loss
        self.distill = dict(distill)

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
            hidden = model(input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=None)
            return hidden, lambda output, non_loss_data: output

        self._teacher_hidden = deque(
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(batches),
                model=teacher,
                num_microbatches=len(batches),
                seq_length=batches[0]["tokens"].shape[1],
                micro_batch_size=batches[0]["tokens"].shape[0],
                forward_only=True,
                collect_non_loss_data=True,
            )
        )

    @torch.no_grad()
    def _teacher_logits(self) -> Tensor:
        """Logits ``[b, s, Vp/tp]`` of the next micro-batch from the kept hidden states (last stage)."""
        (teacher,) = self._teacher
        weight = teacher.shared_embedding_or_output_weight() if teacher.share_embeddings_and_output_weights else None
        with autocast(self.cfg.precision):
            logits, _ = teacher.output_layer(self._teacher_hidden.popleft(), weight=weight)
        return logits.transpose(0, 1)

    def losses(self, logits: Tensor, batch: dict[str, Tensor]) -> TokenLosses:
        """KL to the teacher mixed with cross entropy, per token."""
        return distillation_losses(
            logits,
            self._teacher_logits(),
            batch["labels"],
            temperature=float(self.distill.get("temperature", 1.0)),
            kd_weight=float(self.distill.get("kd_weight", 1.0)),
            lm_weight=float(self.distill.get("lm_weight", 0.0)),
            vocab_size=self.true_vocab_size,
            vocab_start=self.vocab_start,
            group=self.tensor_parallel_group,
        )


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
