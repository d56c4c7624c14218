"""One training step of NeMo's GPT model, and the hooks by which a subclass trains for something else.

Differences from NeMo's own step: the loss is one mean over all unmasked tokens of the global batch; padded vocabulary
rows never enter a softmax; several named losses are logged. docs/distillation_step.md walks through a step from top to
bottom, with the shapes of all tensors.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from omegaconf import DictConfig
from torch import Tensor

from nemo_minitron import parallel, runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.config.sections import Distill
from nemo_minitron.distill.fused import TokenLosses, head_losses
from nemo_minitron.errors import MinitronError
from nemo_minitron.nemo.anywhere import AnywhereGPTModel, HeadlessGPT
from nemo_minitron.nemo.documents import CARRIED, attention_mask


class MinitronGPTModel(AnywhereGPTModel):
    """Trains on the next token, with one global token mean; ``minitron finetune``.

    A subclass that learns from something else fills the hooks: the class is asked for a teacher before anything is
    read (:meth:`teacher_path`, :meth:`check_teacher`), the model is given it once (:meth:`set_teacher`), and each step
    calls :meth:`teacher_outputs` once, :meth:`student_output` per micro-batch and stage, :meth:`losses` per micro-batch
    on the last stage. All are called on every rank, :meth:`losses` on every rank of the last stage.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer) -> None:
        super().__init__(cfg, trainer)
        self._validation_terms: list[tuple[dict[str, Tensor], Tensor]] = []
        self.consumed_tokens = 0
        self._step_started: float | None = None

    # ---- hooks ------------------------------------------------------------------------------------------------------

    command: ClassVar[str] = "finetune"
    """Command whose training this is, for messages and the record of a run."""

    loss_names: tuple[str, ...] = ("loss", "lm_loss")
    """Names of :meth:`losses`' terms, in order; all ranks need them, only the last pipeline stage computes them."""

    @classmethod
    def teacher_path(cls, cfg: DictConfig) -> str | None:
        """Path of the second model that a run of this config reads; None where there is none.

        Raises:
            MinitronError: the config must name one.
        """
        return None

    @classmethod
    def check_teacher(cls, path: str | Path, student: NemoReader, run: DictConfig) -> None:
        """Refuse a teacher that cannot teach this student in this run, by the two files' configs and no weight.

        Args:
            path: what :meth:`teacher_path` returned. run: the run's ``model`` section.
        """

    def set_teacher(self, path: str | Path | None, distill: Distill) -> None:
        """Take what ``distill`` says of the losses, and load the teacher; once, after the weights."""

    def teacher_outputs(self, batches: list[dict[str, Tensor]]) -> None:
        """Have ready what :meth:`losses` needs for a step's micro-batches; called before the student's schedule runs,
        in training and validation.

        Args:
            batches: ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, each ``[b, s]``, on the device; also
                ``documents [b, s]`` where those of a sample are kept apart.
        """

    def student_output(self, model: HeadlessGPT, batch: dict[str, Tensor]) -> Tensor:
        """This stage's output for a micro-batch: hidden states ``[s, b, H]``, final ones on the last stage."""
        return model(**self.model_inputs(batch), hidden_only=True)

    def model_inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """What a model of this run, student or teacher, is called with for a micro-batch, on every rank alike.

        Attention is causal over the whole sample (no mask: the kernel knows), or over each document of it.
        """
        documents = batch.get("documents")
        return {
            "input_ids": batch["tokens"],
            "position_ids": batch["position_ids"],
            "attention_mask": None if documents is None else attention_mask(documents),
            "rotary_positions": batch["position_ids"] if self.positions_restart else None,
        }

    def get_batch(self, data_iterator: Any, tuning: bool) -> dict[str, Any]:
        """The parent's, which drops what it does not know, with what :data:`CARRIED` names."""
        data = next(data_iterator)
        data = data[0] if isinstance(data, tuple) else data
        return super().get_batch(iter([data]), tuning) | {name: data[name] for name in CARRIED if name in data}

    def losses(self, hidden: Tensor, batch: dict[str, Tensor], weights: Tensor) -> TokenLosses:
        """Loss Σ weights·L and named terms of this micro-batch (last pipeline stage only).

        Args:
            hidden: ``[s, b, H]``, or ``[s/tp, b, H]`` under sequence parallelism: the output with ``hidden_only``.
            batch: ``labels [b, s]``.
            weights: ``[b, s]``.
        """
        (module,) = self.get_model_module_list()
        with self.autocast():
            return head_losses(module.head(hidden), batch["labels"], weights, **self.head_place())

    # ---- one step ---------------------------------------------------------------------------------------------------

    def fwd_bwd_step(self, dataloader_iter: Iterator, forward_only: bool, first_val_step: bool | None = None) -> Tensor:
        """Run Megatron's schedule over one global batch; return its mean loss on every rank.

        One normalisation: the sum over all unmasked tokens of the global batch divided by their number, across
        micro-batches and data-parallel ranks. The schedule divides by the number of micro-batches and the gradient
        reduction by the data-parallel size, so the local sum is scaled by both before backward. The parent averages
        micro-batch means, which weights short sequences wrongly.
        """
        started = time.perf_counter()
        batches = [self._on_device(self.get_batch(dataloader_iter, False)) for _ in range(get_num_microbatches())]
        data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        tokens = torch.stack([b["loss_mask"].float().sum() for b in batches]).sum()
        tokens = parallel.all_reduce(tokens, data_group)
        scale = len(batches) * torch.distributed.get_world_size(data_group) / tokens.clamp(min=1.0)
        self.teacher_outputs(batches)
        per_batch = self._run_schedule(batches, scale, forward_only)
        terms = self._reduce_terms(per_batch, data_group)
        if forward_only:
            self._validation_terms.append((terms, tokens))
        else:
            self._log_step(terms, tokens, started)
        self._step_started = None if forward_only else started
        return (terms["loss"] / tokens.clamp(min=1.0)).to(torch.float32)

    def _run_schedule(
        self, batches: list[dict[str, Tensor]], scale: Tensor, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        """Run forward, and backward unless ``forward_only``, over the micro-batches and pipeline stages.

        Args:
            scale: what each micro-batch's summed loss is multiplied by before backward.

        Returns:
            Per micro-batch the summed terms by name; none before the last stage.
        """
        for module in self.get_model_module_list():
            module.config.no_sync_func = module.config.grad_sync_func = module.config.param_sync_func = None
            if self.use_mcore_dist_optim:
                module.config.finalize_model_grads_func = finalize_model_grads

        def forward_step(iterator: Iterator, model: HeadlessGPT) -> tuple[Tensor, Any]:
            batch = next(iterator)
            output = self.student_output(model, batch)

            def reduce(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                mask = batch["loss_mask"].float()
                found = self.losses(hidden, batch, mask)
                return found.loss * scale, {name: (value * mask).sum() for name, value in found.terms.items()}

            return output, reduce

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            forward_only=forward_only,
            seq_length=batches[0]["tokens"].shape[1],
            micro_batch_size=batches[0]["tokens"].shape[0],
        )

    def _reduce_terms(self, per_batch: list[dict[str, Tensor]], data_group: Any) -> dict[str, Tensor]:
        """Sum terms over micro-batches and data-parallel ranks, and give them to every pipeline stage."""
        sums = torch.zeros(len(self.loss_names), device=runtime.device())
        for terms in per_batch or []:
            sums += torch.stack([terms[name].float() for name in self.loss_names])
        sums = parallel.all_reduce(sums, data_group)
        sums = parallel.all_reduce(sums, parallel_state.get_pipeline_model_parallel_group())
        return dict(zip(self.loss_names, sums.unbind(), strict=True))

    def _log_step(self, terms: dict[str, Tensor], tokens: Tensor, started: float) -> None:
        """Log a training step's terms as means over its ``tokens``, the tokens so far, and their rate."""
        for name, value in terms.items():
            if name != "loss":  # the parent logs the sum as reduced_train_loss
                self._log_finite(f"train_{name}", value / tokens.clamp(min=1.0))
        self.consumed_tokens += int(tokens)
        self.log("tokens", float(self.consumed_tokens), rank_zero_only=True, batch_size=1)
        if self._step_started is not None:  # from step to step, so that the optimizer's time is in it
            rate = float(tokens) / (started - self._step_started)
            self.log("tokens_per_second", rate, rank_zero_only=True, batch_size=1)

    def _log_finite(self, name: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise MinitronError(f"{name} is {value.item()} at step {self.trainer.global_step}: training stopped")
        self.log(name, value, prog_bar=True, rank_zero_only=True, batch_size=1)

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(runtime.device(), non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}

    def on_validation_epoch_end(self) -> Tensor:
        """Log each named loss as ``val_…``: one mean over all validation tokens; ``val_loss`` is next-token CE.

        Raises:
            MinitronError: a loss is not finite, or none of the tokens counts.
        """
        tokens = torch.stack([tokens for _, tokens in self._validation_terms]).sum()
        if not tokens:
            raise MinitronError(
                "trainer.limit_val_batches: none of the tokens that validate counts in a loss; expected some, as more "
                "batches, or longer samples (model.data.seq_length), have"
            )
        means = {
            name: torch.stack([terms[name] for terms, _ in self._validation_terms]).sum() / tokens
            for name in self.loss_names
        }
        self._validation_terms.clear()
        self.validation_step_outputs.clear()
        for name, value in means.items():
            if name != "loss":
                self._log_finite(f"val_{name}", value)
        self._log_finite("val_loss", means["lm_loss"])
        return means["lm_loss"]

    # ---- what a resumed run must know --------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        # Lightning saves this counter before the step that ends with a validation is counted: a resumed run's curves
        # would be drawn one step too early
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["consumed_tokens"] = self.consumed_tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.consumed_tokens = checkpoint.get("consumed_tokens", 0)
        super().on_load_checkpoint(checkpoint)
