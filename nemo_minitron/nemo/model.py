"""NeMo's ``MegatronGPTModel`` for Llama-type checkpoints, without Apex, Transformer Engine or CUDA where they lack.

Differences from the parent, each for a reason stated at its place: layer specs are chosen lazily; the loss is one
mean over all unmasked tokens of the global batch; padded vocabulary rows never enter a softmax; several named losses
are logged.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel, mcore_model_customize
from nemo.collections.nlp.modules.common.megatron import build_model as nemo_build_model
from nemo.collections.nlp.modules.common.megatron import utils as nemo_utils
from omegaconf import DictConfig
from torch import Tensor

from nemo_minitron import parallel, runtime
from nemo_minitron.checkpoint.tokenizer_open import foreign
from nemo_minitron.distill.fused import Head, TokenLosses, head_losses
from nemo_minitron.errors import MinitronError
from nemo_minitron.nemo.index_cache import with_index
from nemo_minitron.nemo.spec import RMSNorm, has_transformer_engine, layer_spec


class _NoSuchNorm(torch.nn.Module):
    """Stands for Apex's fused norms in ``isinstance`` tests when Apex is absent."""


def _name_what_apex_would() -> None:
    """Give NeMo the Megatron-Core equivalents of the Apex symbols that it uses without importing."""
    runtime.fill_missing(
        nemo_build_model,
        set_defaults_if_not_set_tensor_model_parallel_attributes=(
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes
        ),
    )
    runtime.fill_missing(nemo_utils, listify_model=lambda model: model if isinstance(model, list) else [model])


class _Unpadded:
    """A tokenizer without a padding token, for datasets of unpadded blocks.

    Megatron-Core 0.13's GPTDataset takes every padding token out of the loss and out of the input, and writes that
    into a mask that it keeps for all samples: where padding is the end-of-text token, as it often is, no model learns
    to end, and the share of tokens that count shrinks with every document (6% within 40 steps of SmolLM2).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        if name == "pad":
            raise AttributeError(name)
        return getattr(self._tokenizer, name)


class HeadlessGPT(GPTModel):
    """Megatron's GPTModel that can stop at its final norm: the output head then runs together with the loss."""

    _hidden_only = False

    def forward(self, *args: Any, hidden_only: bool = False, **kwargs: Any) -> Tensor:
        """As the parent's; with ``hidden_only`` the last stage returns ``[s, b, H]`` (``[s/tp, b, H]`` under sequence
        parallelism) in place of logits."""
        self._hidden_only = hidden_only
        return super().forward(*args, **kwargs)

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._hidden_only:
            return hidden_states
        return super()._postprocess(hidden_states, *args, **kwargs)

    def head(self, hidden: Tensor) -> Head:
        """Hidden states with this rank's rows of the output weight, tied or not (last stage only)."""
        tied = self.share_embeddings_and_output_weights
        return Head(hidden, self.shared_embedding_or_output_weight() if tied else self.output_layer.weight)


class MinitronGPTModel(MegatronGPTModel):
    """A Llama in NeMo: builds on any device, trains with one global token mean.

    Construct it after :func:`runtime.init_distributed`. Grids: any TP x PP, sequence parallel, data parallel;
    ``context_parallel_size > 1`` is refused on restore.
    """

    tokenizer: Any  # NeMo's own class gives it no type

    def __init__(self, cfg: DictConfig, trainer: Trainer) -> None:
        _name_what_apex_would()
        super().__init__(cfg, trainer=trainer)
        self._validation_terms: list[tuple[dict[str, Tensor], Tensor]] = []
        self.consumed_tokens = 0
        self.data_contents: dict[str, str] = {}
        self._step_started: float | None = None

    # ---- construction -------------------------------------------------------------------------------------------

    def model_provider_func(self, pre_process: bool, post_process: bool) -> HeadlessGPT:
        """Build this stage's GPTModel; the parent builds every known layer spec, which fails without TE.

        RoPE scaling of the checkpoint is applied by NeMo's ``mcore_model_customize`` for teacher and student alike
        (NeMo's own distillation script forgets it for the student).
        """
        use_te = bool(self.cfg.get("transformer_engine", False)) and has_transformer_engine()
        spec = layer_spec(use_te)
        if not use_te:
            layers = get_num_layers_to_build(self.transformer_config)
            spec = TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)
        model = HeadlessGPT(
            config=self.transformer_config,
            transformer_layer_spec=spec,
            vocab_size=self.padded_vocab_size,
            max_sequence_length=self.cfg.encoder_seq_length,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=self.cfg.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_percent=self.cfg.get("rotary_percentage", 1.0),
            seq_len_interpolation_factor=self.cfg.get("seq_len_interpolation_factor", None),
            rotary_base=self.cfg.get("rotary_base", 10000),
        )
        mcore_model_customize(self.cfg, model)
        return model

    def _build_tokenizer(self) -> None:
        """The parent's, of the section that :mod:`nemo_minitron.nemo.restore` makes; failures are one message."""
        section = self.cfg.tokenizer
        with foreign(f"{section.type or section.model}: expected a tokenizer that NeMo loads"):
            super()._build_tokenizer()

    def _build_vocab(self) -> None:
        """Pad the checkpoint's true vocabulary V, not the tokenizer's: a table may have rows no token uses."""
        known = self.cfg.get("minitron", {}).get("vocab_size")
        self.true_vocab_size = int(known or self.cfg.get("override_vocab_size") or self.tokenizer.vocab_size)
        if self.tokenizer is not None and self.tokenizer.vocab_size > self.true_vocab_size:
            raise MinitronError(
                f"model.tokenizer.type: the tokenizer has {self.tokenizer.vocab_size} tokens, "
                f"the checkpoint's vocabulary only {self.true_vocab_size}"
            )
        self.padded_vocab_size = self._vocab_size_with_padding(
            orig_vocab_size=self.true_vocab_size,
            make_vocab_size_divisible_by=self.cfg.get("make_vocab_size_divisible_by", 128),
            tensor_model_parallel_size=self.cfg.get("tensor_model_parallel_size", 1),
        )

    def build_train_valid_test_datasets(self) -> Any:
        """The parent's datasets, none of whose tokens is padding, with an index of just these data."""
        tokenizer, limit = self.tokenizer, self.trainer.limit_val_batches
        self.tokenizer = _Unpadded(tokenizer)
        self.trainer.limit_val_batches = limit or 1  # Megatron has no blend of no samples
        self.trainer.limit_test_batches = 1
        try:
            return with_index(self, super().build_train_valid_test_datasets, self.data_contents)
        finally:
            self.tokenizer, self.trainer.limit_val_batches = tokenizer, limit
            self.trainer.limit_test_batches = 0

    def setup_test_data(self, cfg: DictConfig) -> None:
        """Nothing is tested here: ``minitron evaluate`` does."""
        self._test_dl = None

    def _reconfigure_limit_batches(self, limit_batches: int | float, dataloader: Any, mode: str) -> None:
        """The trainer's limits in micro-batches.

        The parent takes the remainder of a share where that of its batches is meant, so that half of them is none, and
        multiplies the batches of the sanity check twice, once per mode.
        """
        micro = get_num_microbatches()
        if isinstance(limit_batches, float) and dataloader is not None:
            limit_batches = int(limit_batches * (len(dataloader) // micro))
        if mode == "train":
            self.trainer.limit_train_batches = limit_batches * micro
        else:
            self.trainer.limit_val_batches = limit_batches * micro
            self.trainer.num_sanity_val_steps *= micro

    def _extract_consumed_samples_from_ckpt(self, ckpt_path: str) -> int:
        """Samples before a checkpoint that is named after its step; the parent reads a number that was rounded to a
        float32, and takes none where it finds none."""
        steps = re.findall(r"step=(\d+)", str(ckpt_path))
        if not steps or self.cfg.get("rampup_batch_size") is not None:
            return super()._extract_consumed_samples_from_ckpt(ckpt_path)
        return int(steps[-1]) * int(self.cfg.global_batch_size)

    def setup_transformer_engine_cp_groups(self) -> None:
        """Context-parallel streams exist only on CUDA."""
        if runtime.has_cuda():
            super().setup_transformer_engine_cp_groups()

    # ---- one training or validation step --------------------------------------------------------------------------

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

    def student_output(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """This stage's output for a micro-batch: hidden states ``[s, b, H]``, final ones on the last stage."""
        return model(
            input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=None, hidden_only=True
        )

    def autocast(self) -> torch.autocast:
        """The schedules' own autocast, which they leave before a loss is computed."""
        config = self.transformer_config
        return torch.autocast(runtime.device().type, dtype=config.autocast_dtype, enabled=config.enable_autocast)

    def head_place(self) -> dict[str, Any]:
        """Where this rank's rows of the output head lie, as the fused losses take it."""
        return {
            "vocab_size": self.true_vocab_size,
            "vocab_start": self.vocab_start,
            "group": self.tensor_parallel_group,
        }

    def teacher_outputs(self, batches: list[dict[str, Tensor]]) -> None:
        """Hook for distillation: called with the micro-batches of a step before the student's schedule runs."""

    @property
    def tensor_parallel_group(self) -> torch.distributed.ProcessGroup | None:
        """The tensor-parallel group, or None when it has one member."""
        group = parallel_state.get_tensor_model_parallel_group()
        return group if torch.distributed.get_world_size(group) > 1 else None

    @property
    def vocab_part(self) -> int:
        """Vocabulary rows of one tensor-parallel rank, padding included."""
        return self.padded_vocab_size // parallel_state.get_tensor_model_parallel_world_size()

    @property
    def vocab_start(self) -> int:
        """First vocabulary row of this tensor-parallel rank."""
        return parallel_state.get_tensor_model_parallel_rank() * self.vocab_part

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

        for module in self.get_model_module_list():
            module.config.no_sync_func = module.config.grad_sync_func = module.config.param_sync_func = None
            if self.use_mcore_dist_optim:
                from megatron.core.distributed import finalize_model_grads

                module.config.finalize_model_grads_func = finalize_model_grads

        def forward_step(iterator: Iterator, model: torch.nn.Module) -> tuple[Tensor, Any]:
            batch = next(iterator)
            output = self.student_output(model, batch)

            def reduce(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                mask = batch["loss_mask"].float()
                found = self.losses(hidden, batch, mask)
                return found.loss * scale, {name: (value * mask).sum() for name, value in found.terms.items()}

            return output, reduce

        per_batch = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            forward_only=forward_only,
            seq_length=batches[0]["tokens"].shape[1],
            micro_batch_size=batches[0]["tokens"].shape[0],
        )
        terms = self._reduce_terms(per_batch, data_group)
        if forward_only:
            self._validation_terms.append((terms, tokens))
        else:
            for name, value in terms.items():
                if name != "loss":  # the parent logs the sum as reduced_train_loss
                    self._log_finite(f"train_{name}", value / tokens.clamp(min=1.0))
            self.consumed_tokens += int(tokens)
            self.log("tokens", float(self.consumed_tokens), rank_zero_only=True, batch_size=1)
            if self._step_started is not None:  # from step to step, so that the optimizer's time is in it
                rate = float(tokens) / (started - self._step_started)
                self.log("tokens_per_second", rate, rank_zero_only=True, batch_size=1)
        self._step_started = None if forward_only else started
        return (terms["loss"] / tokens.clamp(min=1.0)).to(torch.float32)

    loss_names: tuple[str, ...] = ("loss", "lm_loss")
    """Names of :meth:`losses`' terms, in order; all ranks need them, only the last pipeline stage computes them."""

    def _reduce_terms(self, per_batch: list[dict[str, Tensor]], data_group: Any) -> dict[str, Tensor]:
        """Sum terms over micro-batches and data-parallel ranks, and give them to every pipeline stage."""
        sums = torch.zeros(len(self.loss_names), device=runtime.device())
        for terms in per_batch or []:
            sums += torch.stack([terms[name].float() for name in self.loss_names])
        sums = parallel.all_reduce(sums, data_group)
        sums = parallel.all_reduce(sums, parallel_state.get_pipeline_model_parallel_group())
        return dict(zip(self.loss_names, sums.unbind(), strict=True))

    def _log_finite(self, name: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise MinitronError(f"{name} is {value.item()} at step {self.trainer.global_step}: training stopped")
        self.log(name, value, prog_bar=True, rank_zero_only=True, batch_size=1)

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(runtime.device(), non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}

    def on_validation_epoch_end(self) -> Tensor:
        """Log each named loss as ``val_…``: one mean over all validation tokens; ``val_loss`` is next-token CE."""
        tokens = torch.stack([tokens for _, tokens in self._validation_terms]).sum().clamp(min=1.0)
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

    # ---- what the parent does with Apex ---------------------------------------------------------------------------

    def setup_optimizer_param_groups(self) -> None:
        """Two groups: matrices with weight decay, norms and biases without (the parent asks Apex for norm classes)."""
        decay: list[Tensor] = []
        plain: list[Tensor] = []
        for parameter in self.parameters():
            (decay if parameter.dim() > 1 else plain).append(parameter)
        self._optimizer_param_groups = (
            {"params": decay, "is_expert": False},
            {"params": plain, "weight_decay": 0.0, "is_expert": False},
        )

    def allreduce_gradients(self) -> None:
        """Average gradients over data-parallel ranks; alone, the parent would copy them all there and back."""
        if parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1:
            super().allreduce_gradients()

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clip by the global norm over TP and PP ranks in plain torch where Apex' kernels are missing."""
        clip = float(self.trainer.gradient_clip_val or 0.0)
        if clip <= 0.0 or self.with_distributed_adam or self.megatron_amp_O2:
            super().configure_gradient_clipping(*args, **kwargs)
            return
        norm = clip_gradients(self.parameters(), clip)
        self.log("grad_norm", norm, rank_zero_only=True, batch_size=1)

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """Parameters of the student alone, whatever else hangs on this module."""
        modules = self.model if isinstance(self.model, list) else [self.model]
        return itertools.chain.from_iterable(module.parameters() for module in modules)


@torch.no_grad()
def clip_gradients(parameters: Iterator[torch.nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place so that their global L2 norm is at most ``max_norm``; return the norm before.

    Each parameter is counted once: duplicates over the tensor-parallel group (norms, biases) on its rank 0 only, the
    tied output embedding (``shared``) on the first pipeline stage only. Same rule as Megatron's
    ``clip_grad_norm_fp32``.
    """
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    found = [(p, p.grad) for p in parameters if p.grad is not None]
    total = torch.zeros((), device=runtime.device(), dtype=torch.float64)
    for p, grad in found:
        if param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p):
            total += torch.linalg.vector_norm(grad, dtype=torch.float64) ** 2
    norm = parallel.all_reduce(total, parallel_state.get_model_parallel_group()).sqrt()
    factor = float(max_norm / (norm + 1e-6))
    if factor < 1.0:
        for _, grad in found:
            grad.mul_(factor)
    return norm.float()
