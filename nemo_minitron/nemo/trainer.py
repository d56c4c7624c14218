"""Lightning trainers for NeMo models, with or without Apex and CUDA."""

from __future__ import annotations

import logging as python_logging
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from nemo.collections.nlp.parts import nlp_overrides
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.collections.nlp.parts.nlp_overrides import CustomProgressBar, NLPDDPStrategy
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_minitron import runtime
from nemo_minitron.values.model import LEAN


class MinitronDDPStrategy(NLPDDPStrategy):
    """NeMo's strategy without its demand for Apex, over gloo where there is no CUDA.

    Distributed checkpoints, model-parallel groups and the rest are the parent's.
    """

    def __init__(
        self,
        no_ddp_communication_hook: bool = True,
        nccl_communicator_config_path: str | None = None,
        sharp: bool = False,
        dist_ckpt_parallel_save: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("process_group_backend", runtime.backend())
        kwargs.setdefault("timeout", timedelta(minutes=30))
        DDPStrategy.__init__(self, **kwargs)
        # imported by NeMo in one block with Apex's, so they are missing together
        runtime.fill_missing(
            nlp_overrides,
            McoreDistributedOptimizer=DistributedOptimizer,
            MegatronDistributedFusedAdam=type("MegatronDistributedFusedAdam", (), {}),
        )
        self.no_ddp_communication_hook = no_ddp_communication_hook
        self.nccl_communicator_config_path = nccl_communicator_config_path
        self.sharp = sharp
        self._dist_ckpt_parallel_save = dist_ckpt_parallel_save

    def configure_ddp(self) -> None:
        """The parent's, without torch's DDP around a model in the lean mode, whose gradients it would keep twice."""
        if _is_lean(self.lightning_module.cfg):
            self._model = self.model
        else:
            super().configure_ddp()

    def optimizer_sharded_state_dict(self, unsharded_optim_state: Any = None, is_loading: bool = False) -> dict:
        """The parent's, with torch Adam's step counter moved from each parameter to its group; ``adamw_8bit``'s own.

        The parent shards every state tensor like its parameter, as Apex' FusedAdam has it; torch keeps a scalar
        ``step`` beside each parameter, which no shard describes.
        """
        optimizer = self.lightning_module.optimizers(use_pl_optimizer=False)
        if _is_lean(self.lightning_module.cfg):
            return optimizer.sharded_state_dict()
        steps = {}
        if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if "step" in optimizer.state.get(p, {}):
                        steps[p] = optimizer.state[p].pop("step")
                        group["step"] = float(steps[p])
        try:
            return super().optimizer_sharded_state_dict(unsharded_optim_state, is_loading)
        finally:
            for p, step in steps.items():
                optimizer.state[p]["step"] = step

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give torch's Adam its step counters back, then load."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
                for group in saved["param_groups"]:
                    for index in group["params"]:
                        saved["state"][index]["step"] = torch.tensor(group["step"], dtype=torch.float32)
        super().load_optimizer_state_dict(checkpoint)

    def _fix_tensors_device(self, ckpt: dict) -> dict:
        return super()._fix_tensors_device(ckpt) if runtime.has_cuda() else ckpt


class MinitronTrainerBuilder(MegatronTrainerBuilder):
    """NeMo's trainer builder with our strategy; all its keys under ``trainer`` and ``model`` keep their meaning.

    NeMo's bar gives way to the one among the callbacks that are given.
    """

    def _callbacks(self, callbacks: list[Callback] | None) -> list[Callback]:
        return [callback for callback in super()._callbacks(callbacks) if not isinstance(callback, CustomProgressBar)]

    def _training_strategy(self) -> MinitronDDPStrategy:
        model = self.cfg.model
        return MinitronDDPStrategy(
            no_ddp_communication_hook=True,
            gradient_as_bucket_view=model.get("gradient_as_bucket_view", True),
            find_unused_parameters=False,
            nccl_communicator_config_path=model.get("nccl_communicator_config_path", None),
            sharp=model.get("sharp", False),
            dist_ckpt_parallel_save=model.get("dist_ckpt_parallel_dist_opt", True),
        )


def build_trainer(cfg: DictConfig, callbacks: list[Callback] | None = None) -> Trainer:
    """Trainer of a training command from its full config (``trainer``, ``model``, ``exp_manager``)."""
    _quiet()
    cfg = plain(cfg)
    with open_dict(cfg):
        cfg.trainer.logger = False
        cfg.trainer.enable_checkpointing = False  # exp_manager makes both
        cfg.trainer.use_distributed_sampler = False
        cfg.trainer.accelerator = "gpu" if runtime.has_cuda() else "cpu"
        cfg.model.mcore_gpt = True
        if _is_lean(cfg.model) or not runtime.has_cuda():
            cfg.model.megatron_amp_O2 = False  # to the trainer it means an optimizer with copies of the weights
        cfg.exp_manager = {**(cfg.get("exp_manager") or {}), "log_tflops_per_sec_per_gpu": False}
    return MinitronTrainerBuilder(cfg).create_trainer(callbacks=callbacks)


def _is_lean(model: DictConfig) -> bool:
    """Whether a run's ``model`` section, or a model's config, asks for the lean mode's optimizer."""
    return (model.get("optim") or {}).get("name") == LEAN


def plain(cfg: DictConfig) -> DictConfig:
    """A resolved copy that may be changed."""
    return cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))


def inference_trainer(precision: str | int = 32, devices: int = 1, num_nodes: int = 1) -> Trainer:
    """A trainer for commands that only run a model forward; it fits nothing and writes nothing."""
    _quiet()
    return Trainer(
        devices=devices,
        num_nodes=num_nodes,
        accelerator="gpu" if runtime.has_cuda() else "cpu",
        strategy=MinitronDDPStrategy(),
        precision="bf16-mixed" if str(precision) in ("bf16", "bf16-mixed") else 32,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _quiet() -> None:
    """NeMo announces every absent config key and every default; its errors, and our own lines, are enough."""
    runtime.prepare()
    logging.setLevel(logging.ERROR)
    python_logging.getLogger("lightning.pytorch").setLevel(python_logging.WARNING)


def autocast(precision: str | int) -> torch.autocast:
    """Autocast context of a forward pass outside of Megatron's schedules."""
    bf16 = str(precision) in ("bf16", "bf16-mixed")
    return torch.autocast(runtime.device().type, dtype=torch.bfloat16, enabled=bf16)
