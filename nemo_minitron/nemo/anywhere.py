"""NeMo's ``MegatronGPTModel``, which builds and optimizes without Apex, Transformer Engine or CUDA where they lack.

Differences from the parent, each for a reason stated at its place: layer specs are chosen lazily; the vocabulary is
padded as the checkpoint has it; no token of the data is padding; parameter groups and clipping need no kernels of Apex.
What a step computes is the subclass's (:mod:`nemo_minitron.nemo.model`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel, mcore_model_customize
from nemo.collections.nlp.modules.common.megatron import build_model as nemo_build_model
from nemo.collections.nlp.modules.common.megatron import utils as nemo_utils
from omegaconf import DictConfig
from torch import Tensor

from nemo_minitron import parallel, runtime
from nemo_minitron.checkpoint.tokenizer_open import foreign
from nemo_minitron.config.keys import SEED
from nemo_minitron.data.masks import open_mask
from nemo_minitron.distill.fused import Head
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.nemo.documents import DocumentedDataset
from nemo_minitron.nemo.index_cache import with_index
from nemo_minitron.nemo.spec import RMSNorm, has_transformer_engine, layer_spec
from nemo_minitron.values.model import LEAN


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
    _rotary_positions: Tensor | None = None

    def forward(
        self, *args: Any, hidden_only: bool = False, rotary_positions: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Run the parent's; with ``hidden_only`` the last stage returns ``[s, b, H]`` (``[s/tp, b, H]`` under sequence
        parallelism) in place of logits.

        Args:
            rotary_positions: ``[b, s]``, where each token stands for its rotary embedding; along the sample when None,
                whatever the parent's ``position_ids`` say.
        """
        self._hidden_only, self._rotary_positions = hidden_only, rotary_positions
        return super().forward(*args, **kwargs)

    def _preprocess(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._preprocess(*args, **kwargs)
        if self._rotary_positions is None:
            return found
        self.config.apply_rope_fusion = False  # Transformer Engine's kernel takes one row of angles for all samples
        hidden, angles, *rest = found  # angles [s, 1, 1, d], of which each token is to have its own: [s, b, 1, d]
        return hidden, angles[self._rotary_positions.t()].squeeze(2), *rest

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._hidden_only:
            return hidden_states
        return super()._postprocess(hidden_states, *args, **kwargs)

    def head(self, hidden: Tensor) -> Head:
        """Hidden states with this rank's rows of the output weight, tied or not (last stage only)."""
        tied = self.share_embeddings_and_output_weights
        return Head(hidden, self.shared_embedding_or_output_weight() if tied else self.output_layer.weight)


class AnywhereGPTModel(MegatronGPTModel):
    """A Llama in NeMo that builds on any device and grid.

    Construct it after :func:`runtime.init_distributed`. Grids: any TP x PP, sequence parallel, data parallel;
    ``context_parallel_size > 1`` is refused on restore.

    Attributes:
        shape, checkpoint_config, storage_dtype, tokenizer_folder: what the ``.nemo`` says that the weights come from,
            given by :func:`nemo_minitron.nemo.restore.load_model`; what :func:`nemo_minitron.nemo.weights.save` writes.
        data_contents: fingerprint of each token file by its prefix, given before a training begins; which of its
            tokens count is looked up there.
    """

    tokenizer: Any  # NeMo's own class gives it no type
    shape: ModelShape
    checkpoint_config: dict[str, Any]
    storage_dtype: torch.dtype
    tokenizer_folder: Path

    def __init__(self, cfg: DictConfig, trainer: Trainer) -> None:
        _name_what_apex_would()
        super().__init__(cfg, trainer=trainer)
        self.data_contents: dict[str, str] = {}
        self.lean = (cfg.get("optim") or {}).get("name") == LEAN
        if self.lean:
            self.megatron_amp_O2 = False  # the parent would keep a float32 copy of the weights; they are half already

    # ---- construction -----------------------------------------------------------------------------------------------

    def model_provider_func(self, pre_process: bool, post_process: bool) -> HeadlessGPT:
        """Build this stage's GPTModel; the parent builds every known layer spec, which fails without TE.

        RoPE scaling of the checkpoint is applied by NeMo's ``mcore_model_customize`` for teacher and student alike
        (NeMo's own distillation script forgets it for the student).
        """
        use_te = bool(self.cfg.get("transformer_engine", False)) and has_transformer_engine()
        spec = layer_spec(use_te, self.transformer_config.qk_layernorm, self.cfg.get("minitron", {}).get("biases"))
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
        """The parent's datasets, none of whose tokens is padding, with an index of just these data.

        Where token files have masks, or documents are kept apart, their samples are those of
        :class:`DocumentedDataset`; the parent's own way to keep them apart goes by the end-of-text token.
        """
        tokenizer, limit = self.tokenizer, self.trainer.limit_val_batches
        self.tokenizer = _Unpadded(tokenizer)
        self.reset_attention_mask = self.reset_position_ids = False
        self.trainer.limit_val_batches = limit or 1  # Megatron has no blend of no samples
        self.trainer.limit_test_batches = 1
        try:
            build = super().build_train_valid_test_datasets
            built = with_index(self.cfg, self.trainer, tokenizer.unique_identifiers, build, self.data_contents)
        finally:
            self.tokenizer, self.trainer.limit_val_batches = tokenizer, limit
            self.trainer.limit_test_batches = 0
        masks = {prefix: open_mask(prefix) for prefix in self.data_contents}
        apart, restart = self.documents_apart, self.positions_restart
        if apart or restart or any(masks.values()):
            built = [None if data is None else DocumentedDataset(data, masks, apart, restart) for data in built]
            self._train_ds, self._validation_ds, self._test_ds = built
        return built

    @property
    def documents_apart(self) -> bool:
        """Whether tokens attend to those of their own document alone."""
        return bool((self.cfg.get("data") or {}).get("reset_attention_mask"))

    @property
    def positions_restart(self) -> bool:
        """Whether positions begin at 0 in every document."""
        return bool((self.cfg.get("data") or {}).get("reset_position_ids"))

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

    # ---- where this rank is ------------------------------------------------------------------------------------------

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

    # ---- what the parent does with Apex ------------------------------------------------------------------------------

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

    def setup_optimization(self, optim_config: Any = None, optim_kwargs: dict[str, Any] | None = None) -> Any:
        """The parent's, which gets ``adamw_8bit`` and its seed here."""
        if self.lean:
            from nemo_minitron.nemo import lean

            lean.register()
            optim_kwargs = {**(optim_kwargs or {}), "seed": int(self.cfg.get("seed") or SEED)}
        return super().setup_optimization(optim_config, optim_kwargs)

    def allreduce_gradients(self) -> None:
        """Average gradients over data-parallel ranks; alone, the parent would copy them all there and back.

        The lean mode has no room for the parent's copy of all gradients, which would be summed in bf16.
        """
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if parallel.size(group) == 1:
            return
        if self.lean:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.copy_(parallel.all_reduce(parameter.grad.float(), group) / parallel.size(group))
        else:
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
